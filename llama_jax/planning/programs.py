"""The training step of a recipe, as the recipe's own stage makes it, without checkpoint, tokenizer or data.

What a run would find in its data, a plan assumes, and says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from llama_jax import config as presets
from llama_jax.config import LlamaConfig
from llama_jax.data.pairs import BatchShape
from llama_jax.errors import UserError
from llama_jax.model.heads import trunk_config
from llama_jax.parallel.mesh import RULES, check_divides
from llama_jax.stages import dpo, pretrain, reward, sft
from llama_jax.training.metrics import forward_flops_per_token, train_flops_per_token
from llama_jax.training.optimizer import make_optimizer, warmed_up
from llama_jax.training.run_config import RunConfig
from llama_jax.training.step import declared

# A schedule's length changes a constant of the step and nothing else.
_STEPS = 1000


@dataclass(frozen=True)
class Job:
    """What is compiled for a recipe, and what a step of it works through."""

    stage: str
    config: Any
    model: LlamaConfig
    rows: int
    """In a global batch."""
    length: int
    """Tokens in a row."""
    total_tokens: int | None
    """Of the whole run, where the recipe says."""
    describe: Callable[[Mesh], tuple[Callable, tuple]]
    """The step, and its arguments as shapes, dtypes and shardings; to be called outside `jax.set_mesh`, because the optimizer
    computes a few numbers, which a mesh of absent devices cannot.
    """
    model_flops: float
    """The model's own in a step: forward, and twice that backward, or once where adapters alone are trained, because the frozen
    weights take no gradient.
    """
    assumptions: tuple[str, ...] = ()
    trains: bool = True
    """Whether it has micro-batches and recomputes, as a step does."""
    runs: int = 1
    """How often an iteration of the recipe runs the program."""
    data_loops: int | None = None
    """How often those loops run whose number the data decides: at the most once for each row of a device."""
    beside: Callable[[Mesh], Any] = lambda mesh: ()
    """What lies on the chips meanwhile and is no argument, as shapes with shardings."""


def job_of(config: RunConfig, model: LlamaConfig | None, sizes: dict[str, int]) -> Job:
    """What to compile for a recipe on a mesh of these sizes.

    Args:
      config: of pretraining, fine-tuning, reward modelling or DPO.
      model: the architecture, where the recipe names a checkpoint instead.
      sizes: devices per mesh axis.

    Raises:
      UserError: the recipe does not suit the mesh, or its model is not known.
    """
    match config:
        case pretrain.PretrainConfig():
            return _pretrain(config if model is None else replace(config, model=model), sizes)
        case sft.SFTConfig():
            return _sft(config, model or named_model(config.checkpoint), sizes)
        case dpo.DPOConfig():
            return _dpo(config, model or named_model(config.checkpoint), sizes)
        case _:
            return _reward(config, model or named_model(config.checkpoint), sizes)


def preset(name: str) -> LlamaConfig:
    """The architecture of a name such as LLAMA2_7B or llama2-7b. Raises UserError for others; lists them."""
    known = {key: value for key, value in vars(presets).items() if isinstance(value, LlamaConfig)}
    found = known.get(name.upper().replace("-", "_"))
    if found is None:
        raise UserError(f"--model-preset {name}: there is no such model; it is one of {', '.join(known)}")
    return found


def named_model(checkpoint: str) -> LlamaConfig:
    """The architecture that a checkpoint's usual name says (Llama-2-7b-hf): a plan reads no checkpoint."""
    sizes = {"7b": presets.LLAMA2_7B, "13b": presets.LLAMA2_13B, "34b": presets.LLAMA2_34B, "70b": presets.LLAMA2_70B}
    name = checkpoint.rstrip("/").rpartition("/")[2].lower()
    found = [model for size, model in sizes.items() if "llama-2" in name and size in name.split("-")]
    if not found:
        raise UserError(
            f"a plan reads no checkpoint, and the name {checkpoint!r} does not say what model it is; "
            "name it with --model-preset, such as --model-preset llama2-7b"
        )
    return found[0]


def _pretrain(config: pretrain.PretrainConfig, sizes: dict[str, int]) -> Job:
    pretrain.check_batch(config)
    check_divides(sizes, config.model, config.rows // config.micro_batches, config.length)
    optimizer = make_optimizer(config.optimizer, config.model, config.total_steps)
    return Job(
        "pretrain",
        config,
        config.model,
        config.rows,
        config.length,
        config.train_tokens,
        lambda mesh: pretrain.describe_step(config, optimizer, mesh),
        _flops(config, config.model, config.rows, config.length),
    )


def _sft(config: sft.SFTConfig, model: LlamaConfig, sizes: dict[str, int]) -> Job:
    length = sft.check(config, model, sizes)
    optimizer = make_optimizer(config.optimizer, declared(model, config.adapters), _STEPS)
    return Job(
        "sft",
        config,
        model,
        config.rows,
        length,
        None,
        lambda mesh: sft.describe_step(config, model, length, optimizer, mesh),
        _flops(config, model, config.rows, length),
        ("rows are full: the dialogues are not read",),
    )


def _reward(config: reward.RewardConfig, whole: LlamaConfig, sizes: dict[str, int]) -> Job:
    shape, model = _pairs_shape(config, whole, sizes), trunk_config(whole)
    optimizer = make_optimizer(warmed_up(config.optimizer, _STEPS), reward.declared(config, model), _STEPS)
    return _pairs_job(
        "reward", config, model, shape, lambda mesh: reward.describe_step(config, model, shape, optimizer, mesh)
    )


def _dpo(config: dpo.DPOConfig, model: LlamaConfig, sizes: dict[str, int]) -> Job:
    shape = _pairs_shape(config, model, sizes)
    optimizer = make_optimizer(warmed_up(config.optimizer, _STEPS), declared(model, config.adapters), _STEPS)
    job = _pairs_job("dpo", config, model, shape, lambda mesh: dpo.describe_step(config, model, shape, optimizer, mesh))
    # The reference reads every batch too.
    return replace(
        job, model_flops=job.model_flops + shape.rows * shape.length * forward_flops_per_token(model, shape.length)
    )


def _pairs_shape(config: Any, model: LlamaConfig, sizes: dict[str, int]) -> BatchShape:
    """The most that data can ask for: every pair as long as is allowed, so that it fills a row of its own."""
    length = config.length or model.context_length
    multiple = config.micro_batches * math.prod(sizes[axis] for axis in RULES["batch"])
    shape = BatchShape(config.pairs + -config.pairs % multiple, length, 1)
    check_divides(sizes, model, shape.rows // config.micro_batches, length)
    return shape


def _pairs_job(stage: str, config: Any, model: LlamaConfig, shape: BatchShape, describe: Callable) -> Job:
    assumed = f"every pair fills a row of {shape.length} tokens, the most that data can ask for: the pairs are not read"
    flops = _flops(config, model, shape.rows, shape.length)
    return Job(stage, config, model, shape.rows, shape.length, None, describe, flops, (assumed,))


def _flops(config: RunConfig, model: LlamaConfig, rows: int, length: int) -> float:
    share = 2 / 3 if getattr(config, "train", "all") == "lora" else 1
    return share * rows * length * train_flops_per_token(model, length)
