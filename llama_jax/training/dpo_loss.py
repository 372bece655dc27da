"""The loss of direct preference optimisation (Rafailov et al. 2023, equation 7), which the paper does not use.

The policy is its own reward model: what an answer's probability has grown by, against that of a frozen reference, says how
good it is. The reward of an answer is beta * (log policy(answer) - log reference(answer)), up to a term that depends on the
prompt alone, and the loss is that of the reward model of two such rewards, without a margin.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import Compute
from llama_jax.data.pairs import PairBatch
from llama_jax.model.heads import positions
from llama_jax.model.transformer import Transformer
from llama_jax.training.loss import LossSums
from llama_jax.training.ppo_loss import token_log_probs
from llama_jax.training.preference_loss import ranking_loss
from llama_jax.training.step import Objective


class Policies(NamedTuple):
    """The model that learns and the one it is measured against."""

    policy: Transformer
    reference: Transformer


def answer_log_probs(model: Transformer, batch: PairBatch, compute: Compute) -> jax.Array:
    """Log-probabilities (B, K, 2) of a batch's chosen and rejected last answers after their prompts, nats, float32.

    Each is a sum over the answer's tokens, the id that ends it included; 0 at places without a pair.
    """
    tokens_BT, segment_ids_BT = batch.tokens_BT, batch.segment_ids_BT
    last_BK2 = jnp.stack([batch.chosen_last_BK, batch.rejected_last_BK], -1)
    count_BK2 = jnp.stack([batch.chosen_answer_BK, batch.rejected_answer_BK], -1)
    # An answer's tokens are predicted one place before they stand.
    place_T = jnp.arange(tokens_BT.shape[1])
    within_BK2T = (place_T >= (last_BK2 - count_BK2)[..., None]) & (place_T < last_BK2[..., None])
    x_BTD = model.hidden(
        tokens_BT, positions_BT=positions(segment_ids_BT), segment_ids_BT=segment_ids_BT, compute=compute
    )
    # What is not finite outside of answers must reach neither loss nor gradient.
    x_BTD = jnp.where(within_BK2T.any((1, 2))[..., None], x_BTD, 0)
    head_DV = model.output_head().astype(x_BTD.dtype)
    log_probs_BT, _ = token_log_probs(x_BTD, head_DV, jnp.roll(tokens_BT, -1, axis=1), 1.0, compute.loss_chunk)
    return jnp.sum(jnp.where(within_BK2T, log_probs_BT[:, None, None], 0.0), -1)


def drifts(policies: Policies, batch: PairBatch, compute: Compute) -> jax.Array:
    """By how much the policy finds each answer likelier than the reference does, (B, K, 2), nats, float32."""
    return answer_log_probs(policies.policy, batch, compute) - answer_log_probs(policies.reference, batch, compute)


def pair_terms(drift_BK2: jax.Array, beta: float, label_smoothing: float = 0.0) -> dict[str, jax.Array]:
    """What is reported of each pair, whatever the leading axes.

    Args:
      drift_BK2: see `drifts`, of the chosen and the rejected answer.
      beta: what a nat of drift is worth; the greater, the sooner the policy stays near the reference.
      label_smoothing: the share of pairs that are taken to be labelled the wrong way round (conservative DPO).

    Returns:
      loss, in nats; accuracy, 1 where the rewards rank the pair right and a half at a tie; margin, by how much the chosen
      answer's reward is ahead; and both drifts.
    """
    chosen_BK, rejected_BK = drift_BK2[..., 0], drift_BK2[..., 1]
    margin_BK = beta * (chosen_BK - rejected_BK)
    as_labelled_BK, other_BK = ranking_loss(margin_BK, 0.0, 0.0), ranking_loss(0.0, margin_BK, 0.0)
    return {
        "loss": (1 - label_smoothing) * as_labelled_BK + label_smoothing * other_BK,
        "accuracy": jnp.heaviside(margin_BK, 0.5),
        "margin": margin_BK,
        "chosen_drift": chosen_BK,
        "rejected_drift": rejected_BK,
    }


def dpo_objective(beta: float, label_smoothing: float = 0.0) -> Objective:
    """The mean over a batch's pairs of the loss, of `Policies`; margin and drifts are its extras."""

    def sums(policies: Policies, batch: PairBatch, weights_BK: jax.Array, compute: Compute) -> LossSums:
        terms = pair_terms(drifts(policies, batch, compute), beta, label_smoothing)
        means = {name: jnp.sum(weights_BK * value_BK) for name, value_BK in terms.items()}
        loss, accuracy = means.pop("loss"), means.pop("accuracy")
        return LossSums(loss, loss, accuracy, means)

    return Objective(lambda batch: batch.pair_mask_BK, sums)
