"""Next-token cross-entropy in which the (B, T, V) logits never exist whole."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.parallel.mesh import constrain


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars; only `loss` carries a gradient."""

    loss: jax.Array
    """Weighted sum of what is minimised: cross-entropy and, where asked for, the z-loss."""
    nats: jax.Array
    """Weighted sum of the cross-entropy alone, in nats."""
    correct: jax.Array
    """Weighted number of tokens that no other was predicted to be likelier than."""
    extras: Any = ()
    """What else an objective wants reported: a tree of float32 scalars."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_loss(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    z_loss: float = 0.0,
) -> LossSums:
    """Weighted sums of next-token cross-entropy, computed a chunk of every sequence at a time.

    The gradient is formed in the forward pass while a chunk's logits exist: the loss is a plain weighted sum, so its
    gradient needs no knowledge of
    what comes after, and the head matmul is done three times (logits, two gradients) instead of four.

    Args:
      x_BTD: hidden states after the final norm.
      head_DV: output head, in x's dtype.
      targets_BT: int32 ids of the tokens to predict.
      weights_BT: float32 weight of each target; 0 leaves it out.
      chunk: tokens of a sequence whose logits exist at once.
      z_loss: weight of log(Z)^2, which keeps logits from drifting; 0 for the paper's plain cross-entropy.
    """
    return _forward(x_BTD, head_DV, targets_BT, weights_BT, chunk, z_loss, with_grads=False)[0]


def _token_loss_fwd(x_BTD, head_DV, targets_BT, weights_BT, chunk, z_loss):
    return _forward(x_BTD, head_DV, targets_BT, weights_BT, chunk, z_loss, with_grads=True)


def _token_loss_bwd(chunk, z_loss, grads, cotangent):
    dx_BTD, dhead_DV = grads
    scale = cotangent.loss
    # The head's gradient is a sum over every token: it stays in float32 until here, and leaves in the dtype of the
    # head, which is x's.
    return (dx_BTD * scale).astype(dx_BTD.dtype), (dhead_DV * scale).astype(dx_BTD.dtype), None, None


def _forward(x_BTD, head_DV, targets_BT, weights_BT, chunk, z_loss, with_grads):
    B, T, D = x_BTD.shape
    n_chunks = -(-T // min(chunk, T))
    pad = -T % n_chunks

    def split(a):
        # (B, T, ...) -> (n_chunks, B * chunk, ...), the padding with weight 0. Every n-th token makes a chunk, so that each
        # device of a split sequence has a part in every chunk; and sequences are joined, see `per_token`.
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        a = jnp.moveaxis(a.reshape(B, -1, n_chunks, *a.shape[2:]), 2, 0)
        return a.reshape(n_chunks, -1, *a.shape[3:])

    def step(carry, inputs):
        sums, dhead_DV = carry
        x_MD, targets_M, weights_M = inputs
        # where, not multiplication by the weight: an infinity at a masked token must not become a NaN
        x_MD = jnp.where(weights_M[:, None] > 0, x_MD, 0)
        logits_MV = constrain(jnp.einsum("MD,DV->MV", x_MD, head_DV), "tokens", "vocab").astype(jnp.float32)
        top_M = logits_MV.max(axis=-1)
        log_z_M = top_M + jnp.log(jnp.sum(jnp.exp(logits_MV - top_M[:, None]), axis=-1))
        hit_MV = jnp.arange(logits_MV.shape[-1]) == targets_M[:, None]
        # A sum, not a lookup, which would gather a sharded vocabulary.
        target_logit_M = jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1)
        nats_M = log_z_M - target_logit_M
        sums = LossSums(
            sums.loss + jnp.sum(weights_M * (nats_M + z_loss * log_z_M**2)),
            sums.nats + jnp.sum(weights_M * nats_M),
            sums.correct + jnp.sum(weights_M * (target_logit_M == top_M)),
        )
        if not with_grads:
            return (sums, dhead_DV), None
        probabilities_MV = jnp.exp(logits_MV - log_z_M[:, None])
        dlogits_MV = weights_M[:, None] * (probabilities_MV * (1 + 2 * z_loss * log_z_M[:, None]) - hit_MV)
        dlogits_MV = dlogits_MV.astype(x_MD.dtype)
        dx_MD = jnp.einsum("MV,DV->MD", dlogits_MV, head_DV)
        dhead_DV = dhead_DV + jnp.einsum("MV,MD->DV", dlogits_MV, x_MD, preferred_element_type=jnp.float32)
        return (sums, dhead_DV), dx_MD

    zero = jnp.zeros((), jnp.float32)
    dhead_DV = jnp.zeros(head_DV.shape if with_grads else (), jnp.float32)
    carry = (LossSums(zero, zero, zero), dhead_DV)
    (sums, dhead_DV), dx = jax.lax.scan(step, carry, (split(x_BTD), split(targets_BT), split(weights_BT)))
    if not with_grads:
        return sums, None
    dx_BTD = jnp.moveaxis(dx.reshape(n_chunks, B, -1, D), 0, 2).reshape(B, -1, D)[:, :T]
    return sums, (dx_BTD, dhead_DV)


token_loss.defvjp(_token_loss_fwd, _token_loss_bwd)
