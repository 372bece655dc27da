"""The loss on preferences (paper 3.2.2): the better answer's score ahead of the other's, by a margin that grows with strength."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

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
    """Scores (B, K, 2) of a batch's chosen and rejected answers, float32; with `left`, padding stands before the dialogues
    of a row instead of behind, which changes nothing but rounding.
    """
    tokens_BT, segment_ids_BT = batch.tokens_BT, batch.segment_ids_BT
    last_BK2 = jnp.stack([batch.chosen_last_BK, batch.rejected_last_BK], -1)
    B, T = tokens_BT.shape
    if left:
        shift_B1 = jnp.sum(segment_ids_BT == 0, axis=1, keepdims=True)
        source_BT = (jnp.arange(T) - shift_B1) % T
        tokens_BT, segment_ids_BT = (jnp.take_along_axis(a, source_BT, axis=1) for a in (tokens_BT, segment_ids_BT))
        last_BK2 = (last_BK2 + shift_B1[..., None]) % T
    return score(model, tokens_BT, segment_ids_BT, last_BK2.reshape(B, -1), compute).reshape(last_BK2.shape)


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array) -> jax.Array:
    """The paper's loss of each pair, nats: -log sigmoid(chosen - rejected - margin)."""
    return jax.nn.softplus(margin - (chosen - rejected))


def safety_loss(scores_BK2: jax.Array, safe_BK2: jax.Array) -> jax.Array:
    """Cross-entropy of each answer's safety label under sigmoid(score), nats, meaned over a pair; 0 where unknown.

    Our choice: the paper gives no equation for its auxiliary loss, only that a score below 0 then tells unsafe answers.
    """
    nats_BK2 = jax.nn.softplus(scores_BK2) - safe_BK2 * scores_BK2
    return jnp.where(safe_BK2 == UNKNOWN, 0.0, nats_BK2).mean(-1)


def preferences_objective(margins: Sequence[float], safety_weight: float = 0.0) -> Objective:
    """The mean over a batch's pairs of ranking loss and weighted safety loss; margins from the greatest strength down."""
    by_strength = np.array([0.0, *reversed(margins)], np.float32)  # UNKNOWN is -1

    def sums(model: RewardModel, batch: PairBatch, weights_BK: jax.Array, compute: Compute) -> LossSums:
        scores_BK2 = pair_scores(model, batch, compute)
        # Before anything is computed from it: a NaN at a place without a pair must reach neither loss nor gradient.
        scores_BK2 = jnp.where(batch.pair_mask_BK[..., None], scores_BK2, 0.0)
        chosen_BK, rejected_BK = scores_BK2[..., 0], scores_BK2[..., 1]
        nats_BK = ranking_loss(chosen_BK, rejected_BK, jnp.asarray(by_strength)[batch.strength_BK - UNKNOWN])
        safe_BK2 = jnp.stack([batch.chosen_safe_BK, batch.rejected_safe_BK], -1)
        loss_BK = nats_BK + safety_weight * safety_loss(scores_BK2, safe_BK2)
        right_BK = jnp.heaviside(chosen_BK - rejected_BK, 0.5)
        return LossSums(*(jnp.sum(weights_BK * value_BK) for value_BK in (loss_BK, nats_BK, right_BK)))

    return Objective(lambda batch: batch.pair_mask_BK, sums)
