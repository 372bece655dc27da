"""Low-rank adapters, beside a frozen model (LoRA, arXiv 2106.09685, section 4.1; QLoRA, arXiv 2305.14314; not in the paper).

Adapters are a tree of their own, named as the weights they adapt: they alone are trained, saved and exported. `adapt`
is a function from a model's tree to a model's tree, whose adapted leaves compute base(x) + scale * (dropout(x) a) b;
`merge` adds the corrections to the weights themselves. The frozen base may be quantised.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model.low_rank import Lora
from llama_jax.model.nf4 import Nf4, widen
from llama_jax.model.quantize import Int8, dequantize, input_axes
from llama_jax.model.transformer import Param, Transformer, describe
from llama_jax.parallel.mesh import sharding

MATRICES = ("wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "w_gate_DF", "w_up_DF", "w_down_FD")


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how.

    Our choice: all seven matrices of a block, which QLoRA (section 4) found to be needed to equal full fine-tuning;
    rank, alpha and no dropout are the common ones.
    """

    rank: int = 16
    """Rank of every correction."""
    alpha: float = 32.0
    """A correction is scaled by alpha / rank, so that a change of rank needs no other learning rate."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are zeroed while training."""
    targets: tuple[str, ...] = MATRICES
    """The matrices that are adapted, in every layer."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}; it must be positive (twice the rank is common)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it is the share that is zeroed, from 0 to below 1")
        if not self.targets or len(set(self.targets)) < len(self.targets) or set(self.targets) - set(MATRICES):
            raise UserError(
                f"lora.targets is {', '.join(self.targets) or 'empty'}; expected one or more of {', '.join(MATRICES)}, "
                "each once"
            )

    @property
    def scale(self) -> float:
        """Weight of a correction."""
        return self.alpha / self.rank


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Adapter:
    """The trained factors of one matrix's correction in every layer."""

    a: Any
    """(L, *inputs, rank)."""
    b: Any
    """(L, rank, *outputs); zeros at first, so that training begins from the frozen model."""


Adapters = dict[str, Adapter]
"""By the adapted parameter's name, such as `layers.wq_DNH`."""


def describe_adapters(config: LlamaConfig, lora: LoraConfig) -> Adapters:
    """The adapters as a tree of `Param` declarations: their axes lie as those of the weights they adapt.

    Our choice: `a` is normal with the variance that PEFT's uniform one has, a third of 1 / inputs.
    """
    model = describe(config)

    def one(target: str) -> Adapter:
        weight: Param = getattr(model.layers, target)
        first = 1 + input_axes(target)  # of the output axes, behind layer and inputs
        inputs, outputs = weight.shape[1:first], weight.shape[first:]
        return Adapter(
            Param(
                (config.n_layers, *inputs, lora.rank), (*weight.axes[:first], "rank"), (3 * math.prod(inputs)) ** -0.5
            ),
            Param((config.n_layers, lora.rank, *outputs), ("layer", "rank", *weight.axes[first:]), 0.0),
        )

    return {f"layers.{target}": one(target) for target in lora.targets}


def abstract_adapters(config: LlamaConfig, lora: LoraConfig, mesh: Mesh | None = None) -> Adapters:
    """The adapters as shapes and dtypes alone, with shardings if a mesh is given."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(
            p.shape, jnp.float32, sharding=None if mesh is None else sharding(mesh, *p.axes)
        ),
        describe_adapters(config, lora),
    )


def init_adapters(config: LlamaConfig, lora: LoraConfig, key: jax.Array) -> Adapters:
    """Fresh adapters in float32, which change nothing yet; each depends on the key and its own name only."""

    def draw(path: tuple, p: Param) -> jax.Array:
        if not p.std:
            return jnp.zeros(p.shape, jnp.float32)
        return p.std * jax.random.normal(jax.random.fold_in(key, _hash(jax.tree_util.keystr(path))), p.shape)

    return jax.tree_util.tree_map_with_path(draw, describe_adapters(config, lora))


def adapt(
    model: Transformer, adapters: Adapters, lora: LoraConfig, dropout_key: jax.Array | None = None
) -> Transformer:
    """The model with its adapted weights in the place of the frozen ones; the same arrays, none of them copied.

    Args:
      model: floating or quantised weights.
      adapters: for any of its matrices.
      lora: their scale and dropout.
      dropout_key: for training; without it nothing is dropped.
    """
    drops = dropout_key is not None and lora.dropout > 0

    def leaf(name: str, weight: Any) -> Any:
        if name not in adapters:
            return weight
        own = jax.random.split(jax.random.fold_in(dropout_key, _hash(name)), model.config.n_layers) if drops else None
        return Lora(weight, adapters[name].a, adapters[name].b, own, lora.scale, lora.dropout)

    return _map_weights(leaf, model)


def merge(model: Transformer, adapters: Adapters, lora: LoraConfig) -> Transformer:
    """The model with plain weights, to which the corrections are added in float32; no adapter is left.

    A floating weight keeps its dtype. Every quantised one is widened to float32, adapted or not: the adapters were
    trained beside its rounded values, and rounding the sum again would round most of the correction away.
    """

    def leaf(name: str, weight: Any) -> Any:
        if isinstance(weight, Int8 | Nf4):
            weight = _widen(weight, name.startswith("layers."))
        return _add(weight, adapters[name], lora.scale) if name in adapters else weight

    return _map_weights(leaf, model)


@partial(jax.jit, static_argnums=1)
def _widen(weight: Int8 | Nf4, stacked: bool) -> jax.Array:
    if isinstance(weight, Nf4):
        return widen(weight, jnp.float32)
    return (jax.vmap(dequantize) if stacked else dequantize)(weight)


@partial(jax.jit, static_argnums=2)
def _add(weight: jax.Array, adapter: Adapter, scale: float) -> jax.Array:
    def layer(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        correction = jnp.tensordot(a, b, 1, precision="highest")
        return (w.astype(jnp.float32) + scale * correction).astype(w.dtype)

    return jax.vmap(layer)(weight, adapter.a, adapter.b)


def _map_weights(function: Callable[[str, Any], Any], model: Transformer) -> Transformer:
    """`function(name, weight)` in the place of every weight, quantised ones whole."""
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: function(jax.tree_util.keystr(path, simple=True, separator="."), weight),
        model,
        is_leaf=lambda weight: isinstance(weight, Int8 | Nf4),
    )


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())
