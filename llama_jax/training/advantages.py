"""From scores to advantages (paper 3.2.3): the piecewise reward of two models, its whitened logit, the penalty on leaving the
reference, and generalised advantage estimation, of which the paper says nothing.

Place t of a per-token array belongs to the token drawn from the state at t. `answer_mask_BT` keeps the places of drawn tokens,
the end-of-sequence token among them: in every row one run of places, or none. What stands at other places is never computed
with, so that not even a NaN leaves them. All arithmetic is in float32.
"""

import jax
import jax.numpy as jnp

THRESHOLD = 0.15
"""Safety scores below it take the place of the helpfulness score (paper 3.2.3)."""
LOGIT_CLAMP = 1e-4
"""Our choice: probabilities are kept so far from 0 and 1 before their logit is taken, which then is at most 9.21 in size."""
VARIANCE_FLOOR = 1e-8
"""Our choice: added to a variance before it is divided by, so that rounding is not blown up into a signal."""


def chosen_reward(
    safety_B: jax.Array, helpfulness_B: jax.Array, is_adversarial_B: jax.Array, threshold: float = THRESHOLD
) -> tuple[jax.Array, jax.Array]:
    """The paper's R_c: the safety score where the prompt is adversarial or that score is low, else the helpfulness score.

    Args:
      safety_B: the safety model's scores after the sigmoid.
      helpfulness_B: the helpfulness model's, likewise.
      is_adversarial_B: bool, prompts tagged as such.
      threshold: safety scores below it are low.

    Returns:
      the reward (B,), float32, and where it is the safety score (B,), bool.
    """
    safety_B, helpfulness_B = (jnp.asarray(scores, jnp.float32) for scores in (safety_B, helpfulness_B))
    by_safety_B = jnp.asarray(is_adversarial_B, bool) | (safety_B < threshold)
    return jnp.where(by_safety_B, safety_B, helpfulness_B), by_safety_B


def logit(p: jax.Array) -> jax.Array:
    """The inverse of the sigmoid, float32, finite at 0 and 1; see LOGIT_CLAMP."""
    p = jnp.clip(jnp.asarray(p, jnp.float32), LOGIT_CLAMP, 1 - LOGIT_CLAMP)
    return jnp.log(p) - jnp.log1p(-p)


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` with mean 0 and variance 1 over all that the mask keeps, float32; elsewhere 0.

    Our choices: the mean is subtracted, the statistics are those of the global batch at hand, the variance is the unbiased
    one. Of a single entry, or of equal ones, nothing but zeros remain.
    """
    x = jnp.asarray(x, jnp.float32)
    # Counted from the smallest entry, equal entries are exactly 0; from their mean they would be a rounding off.
    x = jnp.where(mask, x - jnp.min(x, where=mask, initial=jnp.inf), 0)
    n = jnp.sum(mask)
    x = jnp.where(mask, x - jnp.sum(x) / jnp.maximum(n, 1), 0)
    variance = jnp.sum(x * x) / jnp.maximum(n - 1, 1)
    return x * jax.lax.rsqrt(variance + VARIANCE_FLOOR)


def token_rewards(
    score_B: jax.Array, kl_BT: jax.Array, answer_mask_BT: jax.Array, beta: float | jax.Array
) -> jax.Array:
    """Rewards (B, T), float32: every drawn token pays for leaving the reference, and the last one is given the score.

    Args:
      score_B: of each answer. It falls to the end-of-sequence token, or to the last token of an answer that was cut.
      kl_BT: of each drawn token, log-probability under the policy that drew it less that under the reference.
      answer_mask_BT: bool, places of drawn tokens.
      beta: weight of the penalty.
    """
    goes_on_BT = jnp.pad(answer_mask_BT[:, 1:], ((0, 0), (0, 1)))
    score_B1 = jnp.asarray(score_B, jnp.float32)[:, None]
    penalty_BT = beta * jnp.where(answer_mask_BT, kl_BT, 0).astype(jnp.float32)
    return jnp.where(answer_mask_BT & ~goes_on_BT, score_B1, 0) - penalty_BT


def gae(
    rewards_BT: jax.Array, values_BT: jax.Array, answer_mask_BT: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates.

    Our choice: an answer is over behind its last drawn token, and what comes then is worth 0, for an answer that was cut too:
    its last token was given the score of all of it.

    Args:
      rewards_BT: from `token_rewards`.
      values_BT: the critic's estimate of the state before each drawn token.
      answer_mask_BT: bool, places of drawn tokens.
      gamma: discount for each token.
      lam: 1 trusts the rewards alone, 0 one reward and the critic's estimate after it.

    Returns:
      advantages and returns (B, T), float32, 0 where nothing was drawn. A return is advantage plus value, what the critic is
      to learn: whitening the advantages must come after.
    """
    rewards_BT, values_BT = (jnp.where(answer_mask_BT, a, 0).astype(jnp.float32) for a in (rewards_BT, values_BT))

    def step(after: tuple[jax.Array, jax.Array], place: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        advantage_after_B, value_after_B = after
        reward_B, value_B, drawn_B = place
        surprise_B = reward_B + gamma * value_after_B - value_B
        advantage_B = jnp.where(drawn_B, surprise_B + gamma * lam * advantage_after_B, 0)
        return (advantage_B, value_B), advantage_B

    nothing_B = jnp.zeros_like(rewards_BT[:, 0])
    by_place = tuple(a_BT.T for a_BT in (rewards_BT, values_BT, answer_mask_BT))
    _, advantages_TB = jax.lax.scan(step, (nothing_B, nothing_B), by_place, reverse=True)
    return advantages_TB.T, advantages_TB.T + values_BT
