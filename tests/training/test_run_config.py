"""What the recipes of all stages share: declared once, and listed behind what is a stage's own."""

import dataclasses

import pytest

from llama_jax.training.loop import LoopConfig
from llama_jax.training.run_config import RunConfig, run_dataclass


@run_dataclass
class Stage(RunConfig):
    """A stage with a field of its own, one that is required, and a default in place of the common one."""

    model: str
    seed: int = 7
    width: int = 3
    out: str = "runs/stage"


def test_a_stages_own_fields_come_first_and_the_shared_ones_in_their_order():
    names = [field.name for field in dataclasses.fields(Stage)]
    assert names == ["model", "width", *(field.name for field in dataclasses.fields(RunConfig))]


def test_defaults_are_the_shared_ones_where_a_stage_has_none():
    made = Stage(model="tiny")
    assert (made.seed, made.out, made.width) == (7, "runs/stage", 3)
    assert (made.loop, made.mesh, made.resume) == (LoopConfig(eval_every=100, save_every=100), "auto", "auto")
    assert dataclasses.replace(made, mesh="fsdp=2").mesh == "fsdp=2" and made == Stage(model="tiny")
    assert list(dataclasses.asdict(made))[:2] == ["model", "width"]


def test_a_recipe_names_its_values_and_does_not_change():
    with pytest.raises(TypeError):
        Stage("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stage(model="tiny").seed = 1
