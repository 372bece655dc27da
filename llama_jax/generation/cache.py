"""The cache of keys and values: filled once per token for all layers, in place."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.config import LlamaConfig
from llama_jax.parallel.mesh import constrain


@struct.dataclass
class Cache:
    """Keys and values of every token so far; sequence b has filled slots 0 to length_B[b] - 1."""

    k_LBSKH: jax.Array
    """Rotated keys."""
    v_LBSKH: jax.Array
    """Values."""
    length_B: jax.Array
    """int32, filled slots of every sequence."""


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache for `batch` sequences of up to `slots` tokens; its dtype is that of the computation."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    k_LBSKH, v_LBSKH = (
        constrain(jnp.zeros(shape, dtype), "layer", "batch", "kv_length", "kv_heads", "head_dim") for _ in range(2)
    )
    return Cache(k_LBSKH, v_LBSKH, jnp.zeros((batch,), jnp.int32))


def append(cache: Cache, k_LBTKH: jax.Array, v_LBTKH: jax.Array, count_B: jax.Array) -> Cache:
    """Writes the first `count_B` of T new tokens behind those that are there; what no longer fits is dropped.

    Args:
      cache: donated to the enclosing jit, so that it is updated in place.
      k_LBTKH: new rotated keys.
      v_LBTKH: new values.
      count_B: int32, how many of the T are real, sequence by sequence.
    """
    B, T = k_LBTKH.shape[1:3]
    slots = cache.k_LBSKH.shape[2]
    place_T = jnp.arange(T)
    # Padding goes to a slot that does not exist, which "drop" leaves out.
    slot_BT = jnp.where(place_T < count_B[:, None], cache.length_B[:, None] + place_T, slots)
    row_BT = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
    return Cache(
        cache.k_LBSKH.at[:, row_BT, slot_BT].set(k_LBTKH, mode="drop"),
        cache.v_LBSKH.at[:, row_BT, slot_BT].set(v_LBTKH, mode="drop"),
        jnp.minimum(cache.length_B + count_B, slots),
    )
