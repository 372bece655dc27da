"""The loss on preferences (paper 3.2.2): the better answer's score ahead of the other's, by a margin that grows with strength."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llama_jax.config import Compute
from llama_jax.data.pairs import UNKNOWN, PairBatch
from llama_jax.model.heads import RewardModel, score
from llama_jax.training.loss import LossSums
from llama_jax.training.step import Objective

# Margins of the paper's Table 27, from significantly better to negligibly better.
NO_MARGINS = (0.0, 0.0, 0.0, 0.0)
SMALL_MARGINS = (1.0, 2 / 3, 1 / 3, 0.0)
LARGE_MARGINS = (3.0, 2.0, 1.0, 0.0)


def pair_scores(model: RewardModel, batch: PairBatch, compute: Compute, left: bool = False) -> jax.Array:
    """Scores (B, 2) of a batch's chosen and rejected answers, float32; with `left`, padding stands before the dialogues
    instead of behind, which changes nothing but rounding.
    """
    # Side by side before they become rows: so a pair stays on its device.
    T = batch.chosen_BT.shape[1]
    tokens_RT = jnp.stack([batch.chosen_BT, batch.rejected_BT], 1).reshape(-1, T)
    last_R1 = jnp.stack([batch.chosen_last_B, batch.rejected_last_B], 1).reshape(-1, 1)
    place_T = jnp.arange(T)
    if left:
        shift_R1 = T - 1 - last_R1
        tokens_RT = jnp.take_along_axis(tokens_RT, (place_T - shift_R1) % T, axis=1)
        return score(model, tokens_RT, (place_T >= shift_R1).astype(jnp.int32), 0 * last_R1 + T - 1, compute).reshape(
            -1, 2
        )
    return score(model, tokens_RT, (place_T <= last_R1).astype(jnp.int32), last_R1, compute).reshape(-1, 2)


def ranking_loss(chosen_B: jax.Array, rejected_B: jax.Array, margin_B: jax.Array) -> jax.Array:
    """The paper's loss of each pair, nats: -log sigmoid(chosen - rejected - margin)."""
    return jax.nn.softplus(margin_B - (chosen_B - rejected_B))


def safety_loss(scores_B2: jax.Array, safe_B2: jax.Array) -> jax.Array:
    """Cross-entropy of each answer's safety label under sigmoid(score), nats, meaned over a pair; 0 where unknown.

    Our choice: the paper gives no equation for its auxiliary loss, only that a score below 0 then tells unsafe answers.
    """
    nats_B2 = jax.nn.softplus(scores_B2) - safe_B2 * scores_B2
    return jnp.where(safe_B2 == UNKNOWN, 0.0, nats_B2).mean(1)


def preferences_objective(margins: Sequence[float], safety_weight: float = 0.0) -> Objective:
    """The mean over a batch's pairs of ranking loss and weighted safety loss; margins from the greatest strength down."""
    by_strength = jnp.array([0.0, *reversed(margins)], jnp.float32)  # UNKNOWN is -1

    def sums(model: RewardModel, batch: PairBatch, weights_B: jax.Array, compute: Compute) -> LossSums:
        scores_B2 = pair_scores(model, batch, compute)
        # Before anything is computed from it: a NaN at a place without a pair must reach neither loss nor gradient.
        scores_B2 = jnp.where(batch.pair_mask_B[:, None], scores_B2, 0.0)
        nats_B = ranking_loss(scores_B2[:, 0], scores_B2[:, 1], by_strength[batch.strength_B - UNKNOWN])
        safe_B2 = jnp.stack([batch.chosen_safe_B, batch.rejected_safe_B], 1)
        loss_B = nats_B + safety_weight * safety_loss(scores_B2, safe_B2)
        right_B = jnp.heaviside(scores_B2[:, 0] - scores_B2[:, 1], 0.5)
        return LossSums(*(jnp.sum(weights_B * value_B) for value_B in (loss_B, nats_B, right_B)))

    return Objective(lambda batch: batch.pair_mask_B, sums)
