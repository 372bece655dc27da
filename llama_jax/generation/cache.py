"""The cache of rotated keys and values, which grouped-query attention (paper A.2.1) makes N / K times smaller.

One buffer for all layers, so that a step writes once (on a CPU one for each, see `layers_apart`). Rows fill at their own pace: each has its own
length, and slots beyond it are never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.model.attention import attend_to_cache
from llama_jax.model.transformer import Transformer, rms_norm, rope_table
from llama_jax.parallel.mesh import constrain, partition_spec, per_device

KV_AXES = ("layer", "batch", "kv_heads", "kv_length", "head_dim")


class Cache(NamedTuple):
    """Keys and values of B sequences: slot s of a row holds its position s, and the first `length_B` slots are filled.

    Heads come before slots, so that a matmul reads a head's keys in one piece.
    """

    k_LBKSH: jax.Array | tuple[jax.Array, ...]
    """One buffer for all layers; where the model's layers are apart (`layers_apart`), one of a single layer for each."""
    v_LBKSH: jax.Array | tuple[jax.Array, ...]
    length_B: jax.Array

    @property
    def slots(self) -> int:
        """How many tokens fit in a row."""
        return jax.tree.leaves(self.k_LBKSH)[0].shape[3]


@dataclass
class Kept:
    """What one generation leaves to the next: the tokens of a single row, and the cache that holds them; empty at first."""

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def take(self, ids: Sequence[int]) -> tuple[Cache | None, int]:
        """Gives away the cache, cut to what `ids` begins with, and how many tokens that are; None and 0 if there is none.

        The last of `ids` is always left to be read, for the logits behind it.
        """
        cache, self.cache = self.cache, None
        if cache is None:
            return None, 0
        pairs = enumerate(zip(self.ids, ids[:-1], strict=False))
        same = next((n for n, (ours, theirs) in pairs if ours != theirs), min(len(self.ids), len(ids) - 1))
        same = min(same, int(cache.length_B[0]))
        return cache._replace(length_B=jnp.full_like(cache.length_B, same)), same

    def put(self, ids: list[int], cache: Cache) -> None:
        """Keeps a cache whose first slots hold `ids`, unless an interrupt came while it was given away."""
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
            self.ids, self.cache = ids, cache


def slots_for(tokens: int) -> int:
    """How many slots a cache gets for rows of so many tokens, so that few shapes are compiled."""
    slots = max(64, 1 << (tokens - 1).bit_length())
    # Every slot is read at every token: the half between two powers spares some.
    return slots * 3 // 4 if tokens <= slots * 3 // 4 else slots


@partial(jax.jit, static_argnames=("config", "rows", "slots", "dtype", "apart"))
def init_cache(config: LlamaConfig, rows: int, slots: int, dtype: Any, apart: bool = False) -> Cache:
    """An empty cache, laid out over the ambient mesh (rows over batch, heads over kv_heads).

    Args:
      config: gives layers, key/value heads and head size.
      rows: sequences; divides over the mesh's batch axes.
      slots: tokens that fit in a row.
      dtype: of the keys and values, and so of the computation that reads them.
      apart: a buffer for each layer, for a model whose layers are apart.
    """
    shape = (1 if apart else config.n_layers, rows, config.n_kv_heads, slots, config.head_dim)

    def zeros() -> Any:
        buffers = tuple(constrain(jnp.zeros(shape, dtype), *KV_AXES) for _ in range(config.n_layers if apart else 1))
        return buffers if apart else buffers[0]

    return Cache(zeros(), zeros(), constrain(jnp.zeros(rows, jnp.int32), "batch"))


@partial(jax.jit, static_argnames="slots")
def widen(cache: Cache, slots: int) -> Cache:
    """The same with more slots."""

    def wider(x_LBKSH: jax.Array) -> jax.Array:
        added = ((0, 0), (0, 0), (0, 0), (0, slots - cache.slots), (0, 0))
        return constrain(jnp.pad(x_LBKSH, added), *KV_AXES)

    return Cache(*jax.tree.map(wider, (cache.k_LBKSH, cache.v_LBKSH)), cache.length_B)


@partial(jax.jit, static_argnames="copies")
def repeat(cache: Cache, logits_BV: jax.Array, copies: int) -> tuple[Cache, jax.Array]:
    """Each row of a cache, and the logits behind it, so many times side by side, to be gone on with in different ways."""

    def repeated(x_LBKSH: jax.Array) -> jax.Array:
        return constrain(jnp.repeat(x_LBKSH, copies, axis=1), *KV_AXES)

    length_B, logits_BV = (jnp.repeat(x, copies, axis=0) for x in (cache.length_B, logits_BV))
    length_B, logits_BV = constrain(length_B, "batch"), constrain(logits_BV, "batch", None)
    return Cache(*jax.tree.map(repeated, (cache.k_LBKSH, cache.v_LBKSH)), length_B), logits_BV


def extend(model: Transformer, tokens_BT: jax.Array, count_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads the first `count_B` of each row's T tokens behind those in the cache.

    Returns:
      the residual stream after the final norm (B, T, D), without meaning beyond `count_B`; and the cache with the tokens in it.
    """
    if not isinstance(cache.k_LBKSH, tuple):
        x_BTD, k_LBKTH, v_LBKTH = model.extend(tokens_BT, *cache)
        return x_BTD, write(cache, k_LBKTH, v_LBKTH, count_B)
    # Written before it is read: nothing else reads the old buffer then, so that it need not be copied.
    model, c = model.cast(cache.k_LBKSH[0].dtype), model.config
    positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    rope, x_BTD, layers = rope_table(c, positions_BT), model.embed(tokens_BT), []
    for weights, k_1BKSH, v_1BKSH in zip(model.layers, cache.k_LBKSH, cache.v_LBKSH, strict=True):
        q_BTNH, k_BTKH, v_BTKH = weights.qkv(x_BTD, rope, c.norm_eps)
        new = (x_BTKH.swapaxes(1, 2)[None] for x_BTKH in (k_BTKH, v_BTKH))
        layers.append(write(Cache(k_1BKSH, v_1BKSH, cache.length_B), *new, count_B))
        heads_BTNH = attend_to_cache(q_BTNH, layers[-1].k_LBKSH[0], layers[-1].v_LBKSH[0], positions_BT)
        x_BTD = weights.finish(x_BTD, heads_BTNH, c.norm_eps)
    k, v, length = zip(*layers, strict=True)
    return rms_norm(x_BTD, model.norm_D, c.norm_eps), Cache(k, v, length[0])


def write(cache: Cache, k_LBKTH: jax.Array, v_LBKTH: jax.Array, count_B: jax.Array) -> Cache:
    """Appends to every row the first `count_B` of its T new tokens; in place where the cache is donated.

    Args:
      cache: what is extended.
      k_LBKTH: rotated keys of the new tokens.
      v_LBKTH: values of the new tokens.
      count_B: int32, 0 to T; the rest is padding and is not written. Nothing is written beyond the last slot either.
    """
    kv_spec, row_spec = partition_spec(KV_AXES), partition_spec(("batch",))
    # One slice after another, each device for its own rows: a scatter would have the whole cache transposed, and back.
    write_rows = per_device(_write_rows, in_specs=(kv_spec, kv_spec, row_spec, row_spec), out_specs=kv_spec)
    return Cache(
        write_rows(cache.k_LBKSH, k_LBKTH, cache.length_B, count_B),
        write_rows(cache.v_LBKSH, v_LBKTH, cache.length_B, count_B),
        cache.length_B + count_B,
    )


def _write_rows(old_LBKSH: jax.Array, new_LBKTH: jax.Array, start_B: jax.Array, count_B: jax.Array) -> jax.Array:
    L, B, K, S, H = old_LBKSH.shape
    T = min(new_LBKTH.shape[3], S)

    def write_row(b: jax.Array, old_LBKSH: jax.Array) -> jax.Array:
        # Near the end of a row the slice begins earlier, and keeps what stands there.
        first = jnp.minimum(start_B[b], S - T)
        place_T = first + jnp.arange(T) - start_B[b]
        is_new_T1 = ((place_T >= 0) & (place_T < count_B[b]))[:, None]
        there = (0, b, 0, first, 0)
        new_row = jnp.take(jax.lax.dynamic_slice_in_dim(new_LBKTH, b, 1, axis=1), place_T, axis=3, mode="clip")
        old_row = jax.lax.dynamic_slice(old_LBKSH, there, (L, 1, K, T, H))
        return jax.lax.dynamic_update_slice(old_LBKSH, jnp.where(is_new_T1, new_row, old_row), there)

    # Up to the last row that brings something. That the number is not known beforehand keeps XLA on CPU from taking the loop over a single row away,
    # and then copying what it writes into.
    rows = jnp.max(jnp.where(count_B > 0, jnp.arange(1, B + 1), 0))
    return jax.lax.fori_loop(0, rows, write_row, old_LBKSH)
