"""The leaf that stands for an adapted weight: a frozen one, and a low-rank correction of what it computes (LoRA, arXiv
2106.09685, section 4.1; not in the paper).

Apart from `lora`, which makes the adapters, because the transformer's matmuls know this leaf and the adapters are
declared from the transformer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "dropout_key"], meta_fields=["scale", "dropout"]
)
@dataclass(frozen=True, eq=False)
class Lora:
    """An adapted weight, which computes x -> base(x) + scale * (dropout(x) a) b; layers may be stacked in front."""

    base: Any
    """The frozen weight, its input axes first: an array, or quantised."""
    a: Any
    """(*inputs, rank)."""
    b: Any
    """(rank, *outputs)."""
    dropout_key: Any
    """Key of this layer's dropout mask; None: no dropout."""
    scale: float
    """Weight of the correction."""
    dropout: float
    """Share of the inputs of `a` that are zeroed where there is a key."""


def lora_einsum(spec: str, x: jax.Array, weight: Lora, einsum: Callable) -> jax.Array:
    """`einsum(spec, x, weight)` in float32 for a weight whose output axes are the last of the result.

    Args:
      spec: such as "TD,DNH->TNH".
      x: multiplied in its own dtype.
      weight: of one layer.
      einsum: what multiplies with the frozen weight.
    """
    x_axes, matrix_axes, out_axes = spec.replace("->", ",").split(",")
    tokens = "".join(axis for axis in x_axes if axis not in matrix_axes)
    inputs = "".join(axis for axis in matrix_axes if axis in x_axes)
    outputs = matrix_axes.removeprefix(inputs)
    a, b = weight.a.astype(x.dtype), weight.b.astype(x.dtype)
    low = jnp.einsum(f"{x_axes},{inputs}r->{tokens}r", _drop(x, weight), a)
    correction = jnp.einsum(f"{tokens}r,r{outputs}->{out_axes}", low, b)
    # Added in float32: what a bfloat16 sum would round away is what is being learned.
    return einsum(spec, x, weight.base).astype(jnp.float32) + weight.scale * correction.astype(jnp.float32)


def _drop(x: jax.Array, weight: Lora) -> jax.Array:
    if weight.dropout_key is None:
        return x
    kept = jax.random.bernoulli(weight.dropout_key, 1 - weight.dropout, x.shape)
    return jnp.where(kept, x / (1 - weight.dropout), 0).astype(x.dtype)
