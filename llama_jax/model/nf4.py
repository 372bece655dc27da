"""Weights in 4 bits: the NormalFloat of QLoRA (arXiv 2305.14314, section 3 and appendix E; not in the paper).

Each block of 64 weights has one float32 scale, its largest magnitude; a weight is the nearest of 16 levels, which are
quantiles of a normal distribution. Our choices: no second quantisation of the scales (they are a sixteenth of the
rest, each half a byte a weight); blocks lie along the residual stream's axis, which every matrix of a block has, so
that they fit every mesh; embedding, head and norms stay as they are. A layer's matrices are widened inside the scan.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llama_jax.errors import UserError

Model = TypeVar("Model")

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Every matrix that is quantised, and its residual-stream axis, counted from the end: a layer axis in front changes nothing.
_BLOCK_AXIS = {
    "wq_DNH": -3,
    "wk_DKH": -3,
    "wv_DKH": -3,
    "wo_NHD": -1,
    "w_gate_DF": -2,
    "w_up_DF": -2,
    "w_down_FD": -1,
}


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["axis"])
@dataclass(frozen=True, eq=False)
class Nf4:
    """A quantised weight, which stands where the weight stood in the model's tree."""

    codes: Any
    """uint8: a block's first 32 levels in the low halves of its 32 bytes, the other 32 in the high ones."""
    scale: Any
    """float32, one per block: weight = LEVELS[code] * scale."""
    axis: int
    """The axis that blocks lie along, counted from the end."""


@partial(jax.jit, static_argnums=1)
def quantize_nf4(w: jax.Array, axis: int) -> Nf4:
    """Rounds a weight, or a stack of them, to the nearest levels.

    Args:
      w: any floating dtype.
      axis: the axis that blocks lie along, counted from the end; a multiple of 64 long.

    Raises:
      UserError: it is not.
    """
    if w.shape[axis] % BLOCK:
        raise UserError(
            f"nf4 takes weights in blocks of {BLOCK} along the width of the model, and {w.shape[axis]} is no multiple "
            "of that; use int8"
        )
    blocks = _split(w.astype(jnp.float32), axis, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True)
    relative = blocks / jnp.where(largest > 0, largest, 1)
    # Its level's number is the number of borders between levels that a weight lies beyond.
    borders = [(low + high) / 2 for low, high in pairwise(LEVELS)]
    levels = sum((relative > border).astype(jnp.uint8) for border in borders)
    low, high = jnp.split(levels, 2, axis=axis)
    return Nf4(_join(low | high << 4, axis), jnp.squeeze(largest, axis), axis)


def widen(q: Nf4, dtype: Any) -> jax.Array:
    """The weight in `dtype`, with the error that quantising left in it."""
    codes = _split(q.codes, q.axis, BLOCK // 2)
    levels = jnp.concatenate([_level(codes & 15), _level(codes >> 4)], axis=q.axis)
    return _join(levels * jnp.expand_dims(q.scale, q.axis), q.axis).astype(dtype)


def nf4_einsum(spec: str, x: jax.Array, q: Nf4) -> jax.Array:
    """`jnp.einsum(spec, x, weight)`, in x's dtype."""
    return jnp.einsum(spec, x, widen(q, x.dtype))


def nf4_model(model: Model) -> Model:
    """The model with 4-bit matrices in its blocks; every other leaf is the same."""
    return _map_matrices(quantize_nf4, model)


def nf4_abstract(model: Model) -> Model:
    """What `nf4_model` makes of a tree of `jax.ShapeDtypeStruct`: codes and scales lie as the weight does.

    Raises:
      UserError: the mesh splits the width of the model into parts that are no multiples of a block.
    """

    def leaf(w: jax.ShapeDtypeStruct, axis: int) -> Nf4:
        shapes = jax.eval_shape(partial(quantize_nf4, axis=axis), jax.ShapeDtypeStruct(w.shape, w.dtype))
        if w.sharding is None:
            return shapes
        if w.sharding.shard_shape(w.shape)[axis] % BLOCK:
            raise UserError(
                f"nf4 has blocks of {BLOCK} weights, and the mesh leaves {w.sharding.shard_shape(w.shape)[axis]} of "
                f"{w.shape[axis]} to a device; take a mesh with less fsdp and context"
            )
        return jax.tree.map(lambda part: part.update(sharding=w.sharding), shapes)

    return _map_matrices(leaf, model)


def _level(codes: jax.Array) -> jax.Array:
    """LEVELS[codes] by selections alone: a lookup would be slow on a TPU, and is not fused into what reads it."""
    levels: list[Any] = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        levels = [jnp.where(is_set, odd, even) for even, odd in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def _split(w: jax.Array, axis: int, size: int) -> jax.Array:
    """(..., n * size, ...) to (..., n, size, ...) along an axis counted from the end, where it stays."""
    place = w.ndim + axis
    return w.reshape(*w.shape[:place], -1, size, *w.shape[place + 1 :])


def _join(w: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_split`."""
    place = w.ndim + axis
    return w.reshape(*w.shape[: place - 1], -1, *w.shape[place + 1 :])


def _map_matrices(function: Any, model: Model) -> Model:
    def leaf(path: tuple, w: Any) -> Any:
        axis = _BLOCK_AXIS.get(jax.tree_util.keystr(path).rpartition(".")[2])
        return w if axis is None else function(w, axis)

    return jax.tree_util.tree_map_with_path(leaf, model)
