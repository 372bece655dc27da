"""The fields that the recipes of several stages share, and what of them cannot be."""

import dataclasses
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, dataclass_transform

from llama_jax.config import Compute, LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model.lora import LoraConfig
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


@run_dataclass
class TuningConfig(RunConfig):
    """What every run that trains a model further has to say of it."""

    checkpoint: str = ""
    """The model to begin with, of any form."""
    plain: bool = False
    """Prompt and answer as plain text, instead of Llama 2's chat format."""
    train: Literal["all", "lora"] = "all"
    """What is trained: every weight, or low-rank adapters beside frozen ones."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters, where they are trained."""

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained; None where every weight is."""
        return self.lora if self.train == "lora" else None


def check_counts(config: Any, *names: str) -> None:
    """Raises UserError unless the fields of these names, dotted where they are nested, are 1 or more."""
    for name in names:
        if (value := attrgetter(name)(config)) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")


def check_bits(config: Any) -> None:
    """Raises UserError unless `int8` and `nf4` are of what is frozen, and one of them at the most."""
    if (config.int8 or config.nf4) and config.train != "lora":
        raise UserError("--int8 and --nf4 are for frozen weights, and --train all trains them; say --train lora")
    if config.int8 and config.nf4:
        raise UserError("--int8 and --nf4 were both given; the frozen weights have 8 bits or 4")


def length_within(length: int, model: LlamaConfig) -> int:
    """The tokens that `--length` asks for, where 0 means the model's context. Raises UserError if these are more."""
    if length > model.context_length:
        raise UserError(f"--length {length} is more than the model's context of {model.context_length} tokens")
    return length or model.context_length
