"""The cache of rotated keys and values, which grouped-query attention (paper A.2.1) makes N / K times smaller.

One buffer for all layers, so that a step writes once. Rows fill at their own pace: each has its own length, and slots beyond it are never read.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.parallel.mesh import constrain


class Cache(NamedTuple):
    """Keys and values of B sequences: slot s of a row holds its position s, and the first `length_B` slots are filled."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array


@partial(jax.jit, static_argnames=("config", "rows", "slots", "dtype"))
def init_cache(config: LlamaConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """An empty cache, laid out over the ambient mesh (rows over batch, heads over kv_heads).

    Args:
      config: gives layers, key/value heads and head size.
      rows: sequences; divides over the mesh's batch axes.
      slots: tokens that fit in a row.
      dtype: of the keys and values, and so of the computation that reads them.
    """
    shape = (config.n_layers, rows, slots, config.n_kv_heads, config.head_dim)
    return Cache(_lay_out(jnp.zeros(shape, dtype)), _lay_out(jnp.zeros(shape, dtype)), jnp.zeros(rows, jnp.int32))


def write(cache: Cache, k_LBTKH: jax.Array, v_LBTKH: jax.Array, count_B: jax.Array) -> Cache:
    """Appends to every row the first `count_B` of its T new tokens; in place where the cache is donated.

    Args:
      cache: what is extended.
      k_LBTKH: rotated keys of the new tokens.
      v_LBTKH: values of the new tokens.
      count_B: int32, 0 to T; the rest is padding and is not written. Nothing is written beyond the last slot either.
    """
    S, T = cache.k_LBSKH.shape[2], k_LBTKH.shape[2]
    steps_T = jnp.arange(T)
    slots_BT = jnp.where(steps_T < count_B[:, None], cache.length_B[:, None] + steps_T, S)

    # Row by row under vmap: the rows are then a batch of the scatter, which the partitioner leaves where they are.
    @partial(jax.vmap, in_axes=(1, 1, 0), out_axes=1)
    def put(old_LSKH: jax.Array, new_LTKH: jax.Array, slots_T: jax.Array) -> jax.Array:
        return old_LSKH.at[:, slots_T].set(new_LTKH, mode="drop")

    return Cache(
        _lay_out(put(cache.k_LBSKH, k_LBTKH, slots_BT)),
        _lay_out(put(cache.v_LBSKH, v_LBTKH, slots_BT)),
        cache.length_B + count_B,
    )


def _lay_out(kv_LBSKH: jax.Array) -> jax.Array:
    return constrain(kv_LBSKH, "layer", "batch", "kv_length", "kv_heads", "head_dim")
