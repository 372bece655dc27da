"""What the recipes of all stages share: declared once, and listed behind what is a stage's own."""

import dataclasses
from types import SimpleNamespace

import pytest

from llama_jax.config import LLAMA2_7B
from llama_jax.errors import UserError
from llama_jax.training.loop import LoopConfig
from llama_jax.training.run_config import (
    RunConfig,
    TuningConfig,
    check_bits,
    check_counts,
    length_within,
    run_dataclass,
)


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


def test_adapters_are_none_where_every_weight_is_trained():
    made = TuningConfig(out="runs/tuned")
    assert made.adapters is None and dataclasses.replace(made, train="lora").adapters is made.lora


def test_counts_are_one_or_more_in_nested_fields_too():
    config = SimpleNamespace(mini_batch=1, data=SimpleNamespace(join=1), rows=0)
    check_counts(config, "mini_batch", "data.join")
    with pytest.raises(UserError, match="^--rows is 0; it must be 1 or more$"):
        check_counts(config, "mini_batch", "rows")
    config.data.join, config.mini_batch = -1, 0
    with pytest.raises(UserError, match="^--data.join is -1; it must be 1 or more$"):
        check_counts(config, "data.join", "mini_batch")
    with pytest.raises(UserError, match="^--mini-batch is 0"):
        check_counts(config, "mini_batch")


@pytest.mark.parametrize(
    ("bits", "train", "message"),
    [("int8", "all", "say --train lora"), ("nf4", "all", "say --train lora"), ("int8 nf4", "lora", "were both given")],
)
def test_few_bits_are_for_frozen_weights(bits, train, message):
    given = {name: name in bits for name in ("int8", "nf4")}
    with pytest.raises(UserError, match=message):
        check_bits(SimpleNamespace(**given, train=train))
    check_bits(SimpleNamespace(int8=False, nf4="nf4" in bits, train="lora"))
    check_bits(SimpleNamespace(int8=False, nf4=False, train=train))


def test_a_length_is_within_the_context_and_zero_means_all_of_it():
    assert (length_within(0, LLAMA2_7B), length_within(7, LLAMA2_7B), length_within(4096, LLAMA2_7B)) == (4096, 7, 4096)
    with pytest.raises(UserError, match="--length 4097 is more than the model's context of 4096 tokens"):
        length_within(4097, LLAMA2_7B)
