"""Weights in 8 bits: int8 values and one float32 scale per output channel (not in the paper).

Only weights are narrow. They are int8 in memory, a layer's matrices are widened inside the scan as its matmuls read them, and the scale, which
belongs to output channels alone, multiplies the product. The embedding, which is looked up and may be the head too, and the norms stay as they are.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.parallel.mesh import compute_capability, platform

Model = TypeVar("Model")

# Every matrix that is quantised, and how many of its first axes a matmul sums over.
_INPUT_AXES = {
    "wq_DNH": 1,
    "wk_DKH": 1,
    "wv_DKH": 1,
    "wo_NHD": 2,
    "w_gate_DF": 1,
    "w_up_DF": 1,
    "w_down_FD": 1,
    "head_DV": 1,
}


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Int8:
    """A quantised weight, which stands where the weight stood in the model's tree."""

    values: Any
    """int8, -127 to 127, in the weight's shape."""
    scale: Any
    """float32, one per index of the weight's output axes (and per layer where layers are stacked): weight = values * scale."""


def is_quantized_name(name: str) -> bool:
    """Whether the parameter of this name, such as `layers.wq_DNH` or `head_DV`, is one that is quantised."""
    return name.rpartition(".")[2] in _INPUT_AXES


def input_axes(name: str) -> int:
    """How many axes, its first ones, a quantised parameter's matmul sums over; the layer axis of `layers.wq_DNH` is not counted."""
    return _INPUT_AXES[name.rpartition(".")[2]]


def quantize(w: jax.Array, n_in: int) -> Int8:
    """Rounds one layer's matrix to the nearest of 255 levels between plus and minus its output channel's largest.

    The same bits alone, under `jit` and under `vmap`: a model quantised layer by layer as it is read is the one quantised whole.

    Args:
      w: without a layer axis; any floating dtype.
      n_in: its first axes, which the matmul sums over.
    """
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=range(n_in))
    # Multiplications only: XLA turns some divisions into them and others not, as the program around them has it.
    levels = jnp.where(largest > 0, 127 / jnp.where(largest > 0, largest, 1), 0)
    return Int8(jnp.round(w * levels).astype(jnp.int8), largest * np.float32(1 / 127))


def dequantize(q: Int8) -> jax.Array:
    """One layer's matrix in float32."""
    return q.values.astype(jnp.float32) * q.scale


def quantization_error(w: jax.Array, q: Int8) -> jax.Array:
    """Root mean square of what quantising one layer's matrix changed, relative to that of the matrix; float32 scalar."""
    w = w.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((dequantize(q) - w) ** 2) / jnp.sum(w**2))


def int8_einsum(spec: str, x: jax.Array, q: Int8) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in float32 for a weight whose first axis alone is summed and whose others are the last of the
    result; multiplied in x's dtype.
    """
    if x.size == x.shape[-1] and platform() == "gpu" and 0 < compute_capability() < 8:
        # A single token on a GPU without units for bfloat16: a matmul there is of float32, and the whole weight would be written
        # out as such and read again, eight times its bytes. A sum of products reads it as it is.
        products = x.reshape(-1, 1).astype(jnp.float32) * q.values.reshape(x.size, -1)
        return products.sum(0).reshape(*x.shape[:-1], *q.values.shape[1:]) * q.scale
    return jnp.einsum(spec, x, q.values.astype(x.dtype), preferred_element_type=jnp.float32) * q.scale


def quantize_model(model: Model) -> Model:
    """The model with int8 matrices; every other leaf is the same. On a mesh each matrix stays where it lies."""
    return _map_matrices(lambda name, w: _quantize_matrix(w, input_axes(name), _is_stacked(name)), model)


def dequantize_model(model: Model, dtype: Any) -> Model:
    """The model with matrices of `dtype` again, each with the error that quantising left in it."""

    def leaf(name: str, q: Int8) -> jax.Array:
        return (jax.vmap(dequantize) if _is_stacked(name) else dequantize)(q).astype(dtype)

    return _map_matrices(leaf, model)


def quantize_abstract(model: Model) -> Model:
    """What `quantize_model` makes of a tree of `jax.ShapeDtypeStruct`: values lie as the weight does, scales as its output axes."""

    def leaf(name: str, w: jax.ShapeDtypeStruct) -> Int8:
        layers = int(_is_stacked(name))

        def outputs(axes: tuple) -> tuple:
            return (*axes[:layers], *axes[layers + input_axes(name) :])

        lies = w.sharding
        scale_lies = None if lies is None else NamedSharding(lies.mesh, PartitionSpec(*outputs(tuple(lies.spec))))
        return Int8(
            jax.ShapeDtypeStruct(w.shape, jnp.int8, sharding=lies),
            jax.ShapeDtypeStruct(outputs(w.shape), jnp.float32, sharding=scale_lies),
        )

    return _map_matrices(leaf, model)


@partial(jax.jit, static_argnums=(1, 2))  # or the widened copy of all layers would exist
def _quantize_matrix(w: jax.Array, n_in: int, stacked: bool) -> Int8:
    one = partial(quantize, n_in=n_in)
    return jax.vmap(one)(w) if stacked else one(w)


def _map_matrices(function, model: Model) -> Model:
    """`function(name, matrix)` in the place of every matrix that is, or is to be, quantised."""

    def leaf(path: tuple, w: Any) -> Any:
        name = jax.tree_util.keystr(path)
        return function(name, w) if is_quantized_name(name) else w

    return jax.tree_util.tree_map_with_path(leaf, model, is_leaf=lambda leaf: isinstance(leaf, Int8))


def _is_stacked(name: str) -> bool:
    return "layers" in name.split(".")
