"""The losses of PPO (paper 3.2.3; Schulman et al. 2017): the policy's clipped surrogate and the critic's squared error.

The paper gives the clip threshold 0.2 and says nothing of the critic. Our choices: the critic is a model of its own, a reward
model read at every place, and there is no bonus for entropy. Place t of a per-token array belongs to the token `targets_BT[:, t]`,
drawn from the state at t.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Compute
from llama_jax.model.heads import RewardModel, positions
from llama_jax.model.quantize import Int8, dequantize
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import constrain
from llama_jax.training.loss import LossSums
from llama_jax.training.step import Objective


class Experience(NamedTuple):
    """Prompts, the answers that the policy drew, and what was found of them then: the batch of a step, in rows."""

    tokens_BT: Any
    """int32."""
    targets_BT: Any
    """int32, the token after each."""
    segment_ids_BT: Any
    """int32, 0 for padding, another number for each prompt with its answer that stands in a row."""
    answer_mask_BT: Any
    """bool, where the target is a token that the policy drew, the end-of-sequence token included."""
    old_log_probs_BT: Any
    """float32, of the targets under the policy that drew them."""
    advantages_BT: Any
    """float32."""
    returns_BT: Any
    """float32, what the critic is to learn."""


class PolicySums(NamedTuple):
    """Of one micro-batch; sums are over drawn tokens, each weighted by 1 / those of the whole batch: added, they are means."""

    drawn: jax.Array
    """Of 1: the micro-batch's share of the drawn tokens. Where it is 0, everything else is too, extremes as well."""
    kl: jax.Array
    """Of (r - 1) - log r, where r is the ratio of new to old probability: never negative, its mean estimates KL(old || new)."""
    clipped: jax.Array
    """Of 1 where the ratio lies outside the clip range."""
    entropy: jax.Array
    """Of the new policy's entropy at the sampling temperature, nats."""
    least_ratio: jax.Array
    """Not a sum."""
    greatest_ratio: jax.Array
    """Not a sum."""


class ValueSums(NamedTuple):
    """Of one micro-batch, weighted sums as in `PolicySums`."""

    returns: jax.Array
    returns_squared: jax.Array
    errors: jax.Array
    """Of return less value."""
    errors_squared: jax.Array


def token_log_probs(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of given tokens, computed a chunk of every sequence at a time, in the backward pass again.

    Args:
      x_BTD: hidden states after the final norm.
      head_DV: output head, in x's dtype.
      targets_BT: int32 ids.
      temperature: at which the tokens were drawn; logits are divided by it.
      chunk: tokens of a sequence whose logits exist at once.

    Returns:
      log-probabilities of the targets, and entropies of the distributions they are of, in nats, (B, T), float32. Only the
      log-probabilities carry a gradient.
    """
    B, T, _ = x_BTD.shape
    n_chunks = -(-T // min(chunk, T))
    head32_DV = head_DV.astype(jnp.float32)  # so that the chunks' gradients are added in float32

    def split(a: jax.Array) -> jax.Array:
        # Every n-th token makes a chunk, so that each device of a split sequence has a part in every chunk.
        a = jnp.pad(a, ((0, 0), (0, -T % n_chunks)) + ((0, 0),) * (a.ndim - 2))
        a = jnp.moveaxis(a.reshape(B, -1, n_chunks, *a.shape[2:]), 2, 0)
        return a.reshape(n_chunks, -1, *a.shape[3:])

    @jax.checkpoint
    def read(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_MD, targets_M = inputs
        logits_MV = jnp.einsum("MD,DV->MV", x_MD, head32_DV.astype(x_MD.dtype))
        logits_MV = constrain(logits_MV, "tokens", "vocab").astype(jnp.float32) / temperature
        logits_MV = logits_MV - jax.lax.stop_gradient(logits_MV.max(axis=-1, keepdims=True))
        log_z_M = jnp.log(jnp.sum(jnp.exp(logits_MV), axis=-1))
        hit_MV = jnp.arange(logits_MV.shape[-1]) == targets_M[:, None]
        # A sum, not a lookup, which would gather a sharded vocabulary.
        log_probs_M = jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1) - log_z_M
        log_probs_MV = jax.lax.stop_gradient(logits_MV - log_z_M[:, None])
        return log_probs_M, -jnp.sum(jnp.exp(log_probs_MV) * log_probs_MV, axis=-1)

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(n_chunks, B, -1), 0, 2).reshape(B, -1)[:, :T]

    log_probs, entropy = jax.lax.map(read, (split(x_BTD), split(targets_BT)))
    return join(log_probs), join(entropy)


def policy_log_probs(
    model: Transformer,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    temperature: float,
    compute: Compute,
    answer_mask_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` under a model: the one function for the policy that drew, the one that learns, and the reference.

    Rows are sequences, or hold several, told apart by `segment_ids_BT`. Given a mask, what is not finite in the hidden states
    outside of it stays there, and the results there mean nothing.
    """
    x_BTD = _hidden(model, tokens_BT, compute, answer_mask_BT, segment_ids_BT)
    head_DV = model.output_head()
    if isinstance(head_DV, Int8):  # frozen: widened once, not for every chunk of tokens
        head_DV = dequantize(head_DV)
    return token_log_probs(x_BTD, head_DV.astype(x_BTD.dtype), targets_BT, temperature, compute.loss_chunk)


def token_values(
    model: RewardModel,
    tokens_BT: jax.Array,
    compute: Compute,
    answer_mask_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """The critic's estimate at every place, from the tokens of its segment up to there: (B, T), float32; mask and segments as
    in `policy_log_probs`.
    """
    return model.read(_hidden(model.trunk, tokens_BT, compute, answer_mask_BT, segment_ids_BT))


def _hidden(
    trunk: Transformer,
    tokens_BT: jax.Array,
    compute: Compute,
    answer_mask_BT: jax.Array | None,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Final hidden states (B, T, D) of sequences that may share rows; given a mask, zeros outside of it: a head's gradient is a
    sum over all places, in which 0 times what is not finite would not be 0.
    """
    apart = {}
    if segment_ids_BT is not None:
        apart = {"positions_BT": positions(segment_ids_BT), "segment_ids_BT": segment_ids_BT}
    x_BTD = trunk.hidden(tokens_BT, **apart, compute=compute)
    return x_BTD if answer_mask_BT is None else jnp.where(answer_mask_BT[..., None], x_BTD, 0)


def policy_objective(clip: float, temperature: float) -> Objective:
    """The clipped surrogate of a policy, meaned over the drawn tokens of a mini-batch; its extras are `PolicySums`.

    Where the ratio of new to old probability has left 1 ± clip to the side that the advantage asks for, nothing is left to
    gain. The objective has nothing to be right about: the step's accuracy is 0.
    """

    def sums(model: Transformer, batch: Experience, weights_BT: jax.Array, compute: Compute) -> LossSums:
        mask_BT = batch.answer_mask_BT
        log_probs_BT, entropy_BT = policy_log_probs(
            model, batch.tokens_BT, batch.targets_BT, temperature, compute, mask_BT, batch.segment_ids_BT
        )
        # Before anything is computed from it: what is not finite elsewhere must reach neither loss nor gradient.
        log_ratio_BT = jnp.where(mask_BT, log_probs_BT - batch.old_log_probs_BT, 0.0)
        advantages_BT = jnp.where(mask_BT, batch.advantages_BT, 0.0)
        ratio_BT = jnp.exp(log_ratio_BT)
        within_BT = jnp.clip(ratio_BT, 1 - clip, 1 + clip)
        loss = -jnp.sum(weights_BT * jnp.minimum(ratio_BT * advantages_BT, within_BT * advantages_BT))
        seen = PolicySums(
            drawn=jnp.sum(weights_BT),
            kl=jnp.sum(weights_BT * (jnp.expm1(log_ratio_BT) - log_ratio_BT)),
            clipped=jnp.sum(weights_BT * (within_BT != ratio_BT)),
            entropy=jnp.sum(weights_BT * entropy_BT),
            least_ratio=jnp.min(ratio_BT, where=mask_BT, initial=jnp.inf),
            greatest_ratio=jnp.max(ratio_BT, where=mask_BT, initial=-jnp.inf),
        )
        return LossSums(loss, loss, jnp.zeros((), jnp.float32), seen)

    return Objective(lambda batch: batch.answer_mask_BT, sums)


def value_objective() -> Objective:
    """Half the squared error of a critic, meaned over the drawn tokens of a mini-batch; its extras are `ValueSums`.

    Our choice: values are not clipped around those that the advantages were made with.
    """

    def sums(model: RewardModel, batch: Experience, weights_BT: jax.Array, compute: Compute) -> LossSums:
        mask_BT = batch.answer_mask_BT
        estimated_BT = token_values(model, batch.tokens_BT, compute, mask_BT, batch.segment_ids_BT)
        values_BT, returns_BT = (jnp.where(mask_BT, a, 0.0) for a in (estimated_BT, batch.returns_BT))
        errors_BT = returns_BT - values_BT
        loss = 0.5 * jnp.sum(weights_BT * errors_BT**2)
        seen = ValueSums(*(jnp.sum(weights_BT * a) for a in (returns_BT, returns_BT**2, errors_BT, errors_BT**2)))
        return LossSums(loss, loss, jnp.zeros((), jnp.float32), seen)

    return Objective(lambda batch: batch.answer_mask_BT, sums)


def policy_metrics(steps: Sequence[PolicySums]) -> dict[str, float]:
    """What the steps on a batch come to, from each one's extras: means of the steps' means, and the extremes of all ratios."""
    drawn = [np.asarray(step.drawn) > 0 for step in steps]
    return {
        "approx_kl": _mean(steps, "kl"),
        "clip_fraction": _mean(steps, "clipped"),
        "entropy": _mean(steps, "entropy"),
        "ratio_min": min(
            float(np.asarray(step.least_ratio)[some].min()) for step, some in zip(steps, drawn, strict=True)
        ),
        "ratio_max": max(
            float(np.asarray(step.greatest_ratio)[some].max()) for step, some in zip(steps, drawn, strict=True)
        ),
    }


def explained_variance(steps: Sequence[ValueSums]) -> float:
    """The share of the returns' variance that the critic foresaw, from each step's extras; nan if they do not vary.

    Below 0, a constant would have been the better critic.
    """
    returns, errors = _mean(steps, "returns"), _mean(steps, "errors")
    spread = _mean(steps, "returns_squared") - returns**2
    return 1 - (_mean(steps, "errors_squared") - errors**2) / spread if spread > 0 else float("nan")


def _mean(steps: Sequence[PolicySums] | Sequence[ValueSums], name: str) -> float:
    """The mean over steps of a weighted sum, added over each step's micro-batches."""
    return float(np.mean([np.asarray(getattr(step, name), np.float64).sum() for step in steps]))
