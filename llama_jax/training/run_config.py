"""The fields that the recipe of every training run has, whatever its stage."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, dataclass_transform

from llama_jax.config import Compute
from llama_jax.training.loop import LoopConfig

# How a run computes, not what: a continuation may do it another way.
HOW_IT_COMPUTES = ("compute.attention", "compute.remat", "compute.loss_chunk", "compute.offload")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How and where a run computes, whatever it trains; a stage overrides what it has another default or more to say for."""

    compute: Compute = field(default_factory=Compute)
    """Precision, attention kernel and what is recomputed; memory and speed, not the result."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(eval_every=100, save_every=100))
    """How often to log, evaluate and save."""
    micro_batches: int = 1
    """Parts a batch is split into, one after the other, to save memory; the result is the same."""
    mesh: str = "auto"
    """Devices per axis, such as data=2,fsdp=4,tensor=2; auto is fsdp over all."""
    seed: int = 0
    """Of all that is random."""
    out: str
    """The run's folder."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from the newest checkpoint in the folder: if there is one; never (refuses a folder that has one); or fail
    without one.
    """
    dry_run: bool = False
    """Print what would be done, the mesh and the memory, and touch nothing."""
    json: bool = False
    """Print the dry run as JSON."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def run_dataclass(stage_config: Any) -> Any:
    """Makes a stage's subclass of `RunConfig` a frozen dataclass, in which the fields that all runs share stand last.

    A plain dataclass would begin with those it inherits, and so would `--help`, where what only this stage has comes first.
    """
    made = dataclass(frozen=True, kw_only=True)(stage_config)
    shared = {one.name for one in dataclasses.fields(RunConfig)}
    made.__dataclass_fields__ = dict(sorted(made.__dataclass_fields__.items(), key=lambda item: item[0] in shared))
    return made
