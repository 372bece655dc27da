"""AdamW with a clipped gradient and a warmed-up cosine (paper 2.2)."""

import math
from dataclasses import dataclass, replace

import jax
import optax

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model.lora import Adapters
from llama_jax.model.transformer import describe


@dataclass(frozen=True)
class OptimizerConfig:
    """The paper's optimizer; the peak learning rate is the only number that depends on the size of the model."""

    peak_lr: float = 3e-4
    """Learning rate at the end of the warm-up: 3e-4 for 7B and 13B, 1.5e-4 for 34B and 70B."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises linearly."""
    final_lr_ratio: float = 0.1
    """Learning rate of the last step, as a share of the peak."""
    b1: float = 0.9
    """Decay of the gradient's running mean."""
    b2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-5
    """Added to the root of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Decoupled decay of every matrix; norms do not decay."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; a longer one is scaled down to it."""


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear warm-up, then a cosine that reaches `final_lr_ratio` on the last step.

    Our choice: step s of the warm-up runs at (s + 1) / warmup_steps of the peak, so that the first step already moves.

    Raises:
      UserError: the warm-up is as long as the run, or longer.
    """
    warmup = max(config.warmup_steps, 1)
    if total_steps <= config.warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps is {config.warmup_steps}, but the whole run has {total_steps} steps; "
            f"lower --optimizer.warmup-steps (say to {total_steps // 50}) or train for longer"
        )
    rise = optax.linear_schedule(config.peak_lr / warmup, config.peak_lr, max(warmup - 1, 1))
    fall = optax.cosine_decay_schedule(config.peak_lr, max(total_steps - warmup, 1), alpha=config.final_lr_ratio)
    return optax.join_schedules([rise, fall], [warmup - 1])


def warmed_up(config: OptimizerConfig, total_steps: int) -> OptimizerConfig:
    """The optimizer with the warm-up of the paper's reward models, 3% of the steps and at least 5, where none is given; fewer
    where a run has no more than these.
    """
    steps = min(max(5, math.ceil(0.03 * total_steps)), max(total_steps - 1, 0))
    return replace(config, warmup_steps=config.warmup_steps or steps)


def make_optimizer(
    config: OptimizerConfig, model: LlamaConfig | Adapters, total_steps: int
) -> optax.GradientTransformation:
    """The chain that turns gradients into updates.

    Our choice: weight decay acts on every matrix, embedding and head included, and on no norm weight; the paper does
      not say.

    Args:
      config: its numbers.
      model: what is trained: an architecture's every weight, or a tree of declarations, as `describe_adapters` gives.
      total_steps: the step at which the learning rate reaches its end.
    """
    declared = describe(model) if isinstance(model, LlamaConfig) else model
    decays = jax.tree.map(lambda param: param.std is not None, declared)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
