"""The cache of rotated keys and values, which grouped-query attention (paper A.2.1) makes N / K times smaller.

One buffer for all layers, so that a step writes once. Rows fill at their own pace: each has its own length, and slots beyond it are never read.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.parallel.mesh import constrain, partition_spec, per_device

KV_AXES = ("layer", "batch", "kv_length", "kv_heads", "head_dim")


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
    k_LBSKH, v_LBSKH = (constrain(jnp.zeros(shape, dtype), *KV_AXES) for _ in "kv")
    return Cache(k_LBSKH, v_LBSKH, constrain(jnp.zeros(rows, jnp.int32), "batch"))


def write(cache: Cache, k_LBTKH: jax.Array, v_LBTKH: jax.Array, count_B: jax.Array) -> Cache:
    """Appends to every row the first `count_B` of its T new tokens; in place where the cache is donated.

    Args:
      cache: what is extended.
      k_LBTKH: rotated keys of the new tokens.
      v_LBTKH: values of the new tokens.
      count_B: int32, 0 to T; the rest is padding and is not written. Nothing is written beyond the last slot either.
    """
    kv_spec, row_spec = partition_spec(KV_AXES), partition_spec(("batch",))
    # One slice after another, each device for its own rows: a scatter would have the whole cache transposed, and back.
    write_rows = per_device(_write_rows, in_specs=(kv_spec, kv_spec, row_spec, row_spec), out_specs=kv_spec)
    return Cache(
        write_rows(cache.k_LBSKH, k_LBTKH, cache.length_B, count_B),
        write_rows(cache.v_LBSKH, v_LBTKH, cache.length_B, count_B),
        cache.length_B + count_B,
    )


def _write_rows(old_LBSKH: jax.Array, new_LBTKH: jax.Array, start_B: jax.Array, count_B: jax.Array) -> jax.Array:
    old, new = old_LBSKH, new_LBTKH
    if old.shape[3] == 1:
        # One head per device: TPU would tile this axis for the update, and copy the whole cache to that layout and back.
        old, new = old.squeeze(3), new.squeeze(3)
    (L, B, S), rest = old.shape[:3], old.shape[3:]
    T = min(new.shape[2], S)

    def write_row(b: jax.Array, old: jax.Array) -> jax.Array:
        # Near the end of a row the slice begins earlier, and keeps what stands there.
        first = jnp.minimum(start_B[b], S - T)
        place_T = first + jnp.arange(T) - start_B[b]
        is_new_T = ((place_T >= 0) & (place_T < count_B[b])).reshape(T, *(1 for _ in rest))
        there = (0, b, first, *(0 for _ in rest))
        new_row = jnp.take(jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1), place_T, axis=2, mode="clip")
        old_row = jax.lax.dynamic_slice(old, there, (L, 1, T, *rest))
        return jax.lax.dynamic_update_slice(old, jnp.where(is_new_T, new_row, old_row), there)

    return jax.lax.fori_loop(0, B, write_row, old).reshape(old_LBSKH.shape)
