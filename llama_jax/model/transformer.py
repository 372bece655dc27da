"""The Llama 2 transformer (paper 2.2): pre-norm RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

A model is a value: a Flax module whose attributes are arrays, built once and never assigned to again, passed through
JAX's own transforms as any other pytree. Blocks are stacked on a leading layer axis and scanned, so compile time does
not grow with depth. It departs from the reference code in two places: the rotary embedding pairs the two halves of a
head instead of neighbours (no strided access on TPU; converters permute), and head axes are kept apart (`wq_DNH`)
instead of flattened.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from llama_jax.config import Compute, LlamaConfig
from llama_jax.model.attention import attend_with_cache, causal_attention
from llama_jax.model.low_rank import Lora, lora_einsum
from llama_jax.model.nf4 import Nf4, nf4_einsum
from llama_jax.model.quantize import Int8, int8_einsum
from llama_jax.parallel.mesh import constrain, gathered, sharding, ways


@dataclass(frozen=True)
class Param:
    """The one declaration of a parameter: its shape, the logical name of each axis, and the spread of its initial
    values (None: ones).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None


class Block(nnx.Module):
    """One transformer block; where a `Transformer` stacks its blocks, every array carries a leading layer axis, which the
    scan takes off.
    """

    def __init__(self, config: LlamaConfig, make: Callable[[Param], Any]):
        c, n = config, config.n_layers
        # Our choice: normal(0.02), and projections back into the residual stream narrowed by 1/sqrt(2 L), as GPT-2
        # did; the paper is silent.
        std, out_std = 0.02, 0.02 / (2 * n) ** 0.5

        def layers(shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> Any:
            return make(Param((n, *shape), ("layer", *axes), std))

        self.attention_norm_D = layers((c.dim,), ("embed",), None)
        self.wq_DNH = layers((c.dim, c.n_heads, c.head_dim), ("embed", "heads", "head_dim"), std)
        self.wk_DKH = layers((c.dim, c.n_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), std)
        self.wv_DKH = layers((c.dim, c.n_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), std)
        self.wo_NHD = layers((c.n_heads, c.head_dim, c.dim), ("heads", "head_dim", "embed"), out_std)
        self.ffn_norm_D = layers((c.dim,), ("embed",), None)
        self.w_gate_DF = layers((c.dim, c.ffn_dim), ("embed", "ffn"), std)
        self.w_up_DF = layers((c.dim, c.ffn_dim), ("embed", "ffn"), std)
        self.w_down_FD = layers((c.ffn_dim, c.dim), ("ffn", "embed"), out_std)

    def qkv(self, x_BTD: jax.Array, rope: "Rope", eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalised input to rotated queries (B, T, N, H), rotated keys and values (B, T, K, H)."""
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, eps)
        q_BTNH = rotate(per_token("BTD,DNH->BTNH", h_BTD, self.wq_DNH), rope)
        k_BTKH = rotate(per_token("BTD,DKH->BTKH", h_BTD, self.wk_DKH), rope)
        v_BTKH = per_token("BTD,DKH->BTKH", h_BTD, self.wv_DKH)
        return (
            checkpoint_name(constrain(q_BTNH, "batch", "length", "heads", "head_dim"), "qkv"),
            checkpoint_name(constrain(k_BTKH, "batch", "kv_length", "kv_heads", "head_dim"), "qkv"),
            checkpoint_name(constrain(v_BTKH, "batch", "kv_length", "kv_heads", "head_dim"), "qkv"),
        )

    def finish(self, x_BTD: jax.Array, heads_BTNH: jax.Array, eps: float) -> jax.Array:
        """Adds the attention output and then the feed-forward to the residual stream."""
        # One axis instead of two to sum over: XLA on CPU would copy both sides into another order first. (A quantised
        # weight's scale has the output axis alone, which stays the last; an adapted one's dropout key has none.)
        wo_AD = jax.tree.map(lambda w: w.reshape(-1, w.shape[-1]) if w.ndim else w, self.wo_NHD)
        x_BTD = x_BTD + per_token("BTA,AD->BTD", heads_BTNH.reshape(*x_BTD.shape[:2], -1), wo_AD)
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        h_BTD = rms_norm(x_BTD, self.ffn_norm_D, eps)
        gate_BTF = per_token("BTD,DF->BTF", h_BTD, self.w_gate_DF)
        up_BTF = per_token("BTD,DF->BTF", h_BTD, self.w_up_DF)
        x_BTD = x_BTD + per_token("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.w_down_FD)
        return constrain(x_BTD, "batch", "length", "act_embed")


class Transformer(nnx.Module):
    """A Llama as an immutable pytree of arrays; `model(tokens_BT)` is a pure function of the model and the tokens."""

    def __init__(self, config: LlamaConfig, make: Callable[[Param], Any]):
        c = config

        def data(param: Param) -> Any:
            return nnx.data(
                make(param)
            )  # declares the leaf a pytree child whatever its type: array, shape, sharding or declaration

        self.config = config
        self.embedding_VD = data(Param((c.vocab_size, c.dim), ("vocab", "embed"), 0.02))
        self.layers = Block(config, data)
        self.norm_D = data(Param((c.dim,), ("embed",), None))
        if not c.tie_embeddings:
            self.head_DV = data(Param((c.dim, c.vocab_size), ("embed", "vocab"), 0.02))

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        compute: Compute = Compute(),
    ) -> jax.Array:
        """Logits of the next token at every position.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary positions; 0, 1, 2, ... if none.
          segment_ids_BT: int32; a token attends only to earlier tokens of its own segment. One segment if none.
          compute: precision, kernel and rematerialisation.

        Returns:
          logits_BTV, float32.
        """
        x_BTD = self.hidden(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, compute=compute)
        return self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        compute: Compute = Compute(),
    ) -> jax.Array:
        """The residual stream after the final norm, what the head reads: (B, T, D) in `compute.dtype`. Arguments as
        `__call__`.
        """
        model, c = self.cast(compute.dtype), self.config
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        rope = rope_table(c, positions_BT)

        declared = describe(c).layers

        def block(x_BTD: jax.Array, weights: Block) -> tuple[jax.Array, None]:
            weights = jax.tree.map(gather_plain, weights, declared, is_leaf=lambda w: isinstance(w, Int8 | Nf4 | Lora))
            q_BTNH, k_BTKH, v_BTKH = weights.qkv(x_BTD, rope, c.norm_eps)
            heads_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, implementation=compute.attention)
            return weights.finish(x_BTD, heads_BTNH, c.norm_eps), None

        x_BTD, block = model.embed(tokens_BT), remat(block, compute.remat)
        if isinstance(model.layers, Block):
            x_BTD, _ = jax.lax.scan(block, x_BTD, model.layers)
        else:
            for weights in model.layers:
                x_BTD, _ = block(x_BTD, weights)
        return rms_norm(x_BTD, model.norm_D, c.norm_eps)

    def extend(
        self, tokens_BT: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, length_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Continues sequences whose earlier keys and values are cached.

        The cache is only read inside the scan over layers; the caller writes the returned keys and values once for all
        layers, in place.

        Args:
          tokens_BT: int32, the next T tokens of every sequence.
          k_LBKSH: cached keys, already rotated; their dtype is the dtype of the computation.
          v_LBKSH: cached values.
          length_B: int32, slots of the cache that are filled; the new tokens stand at positions length_B, length_B +
            1, ...

        Returns:
          the residual stream after the final norm (B, T, D), and the new keys and values (L, B, K, T, H).
        """
        model, c = self.cast(k_LBKSH.dtype), self.config
        positions_BT = length_B[:, None] + jnp.arange(tokens_BT.shape[1])
        rope = rope_table(c, positions_BT)

        def block(
            x_BTD: jax.Array, layer: tuple[Block, jax.Array, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            weights, k_BKSH, v_BKSH = layer
            q_BTNH, k_BTKH, v_BTKH = weights.qkv(x_BTD, rope, c.norm_eps)
            k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
            heads_BTNH = attend_with_cache(q_BTNH, k_BKTH, v_BKTH, k_BKSH, v_BKSH, length_B)
            return weights.finish(x_BTD, heads_BTNH, c.norm_eps), (k_BKTH, v_BKTH)

        x_BTD, (k_LBKTH, v_LBKTH) = jax.lax.scan(block, model.embed(tokens_BT), (model.layers, k_LBKSH, v_LBKSH))
        return rms_norm(x_BTD, model.norm_D, c.norm_eps), k_LBKTH, v_LBKTH

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Token embeddings (B, T, D), in the dtype of the embedding."""
        # Gathered along D first: a lookup in a table sharded along D would come out sharded along D and be resharded
        # at once.
        table_VD = constrain(self.embedding_VD, "vocab", "act_embed")
        return constrain(table_VD[tokens_BT], "batch", "length", "act_embed")

    def output_head(self) -> jax.Array | Int8:
        """The head (D, V): its own matrix, or the transposed embedding where the configuration ties them."""
        return self.embedding_VD.T if self.config.tie_embeddings else self.head_DV

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits (B, T, V) of normed hidden states: the matmul in the hidden states' dtype, the result in float32."""
        head_DV = self.output_head()
        if isinstance(head_DV, Int8):
            logits_BTV = int8_einsum("BTD,DV->BTV", x_BTD, head_DV)
        else:
            logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV.astype(x_BTD.dtype))
        return constrain(logits_BTV, "batch", "length", "vocab").astype(jnp.float32)

    def cast(self, dtype: Any) -> "Transformer":
        """The same model with every array in `dtype`, quantised weights and keys aside; inside jit, before the layers
        are gathered, so that the gathers move the narrow type.
        """

        def leaf(w: Any) -> Any:
            return w if isinstance(w, Int8 | Nf4) or not jnp.issubdtype(w.dtype, jnp.floating) else w.astype(dtype)

        return jax.tree.map(leaf, self, is_leaf=lambda w: isinstance(w, Int8 | Nf4))


def scan_copies(layout: jax.sharding.Sharding) -> bool:
    """Whether a scan copies each layer's weights, and all of a cache, before it reads them, which takes longer than decoding a
    token: on GPUs and on a CPU. On TPUs it reads them in place; several devices of a CPU stand for a TPU's.
    """
    platform = next(iter(layout.device_set)).platform
    return platform == "gpu" or (platform == "cpu" and len(layout.device_set) == 1)


def layers_apart(model: Transformer, *, consume: bool = False) -> Transformer:
    """The same model with a tuple of blocks, each with arrays of its own, in place of the stacked ones.

    Its forward pass is a loop instead of a scan, so that compile time grows with depth: to decode where `scan_copies`.

    Args:
      model: with stacked layers.
      consume: delete each stacked array once it is apart, so that no more than one lies twice in memory.
    """

    def split(stacked: jax.Array) -> list[jax.Array]:
        layers = [stacked[i] for i in range(model.config.n_layers)]
        if consume:
            jax.block_until_ready(layers)
            stacked.delete()
        return layers

    return split_layers(model, split)


def split_layers(model: Transformer, split: Callable[[Any], Sequence[Any]]) -> Transformer:
    """A model, or a description of one, with a tuple of blocks in place of the stacked one; `split` gives a leaf's layers."""

    def blocks(node: Any) -> Any:
        if not isinstance(node, Block):
            return node
        stacked, structure = jax.tree.flatten(node)
        return tuple(structure.unflatten(layer) for layer in zip(*map(split, stacked), strict=True))

    return jax.tree.map(blocks, model, is_leaf=lambda node: isinstance(node, Block))


def gather_plain(weight: Any, declared: Param) -> Any:
    """One layer's weight gathered for its matmuls, inside the scan, so that no more than a layer is whole at a time; a
    quantised or adapted one is left as it is.
    """
    return gathered(weight, declared.axes[1:]) if isinstance(weight, jax.Array) else weight


def per_token(spec: str, x: jax.Array, weight: jax.Array | Int8 | Nf4 | Lora) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` for an x whose first axes are B and T and a weight that has neither, quantised,
    adapted or plain.

    Where a sequence is not split over devices, the two axes are joined for the matmul: the weight's gradient then sums
    over one axis, while for a sum over two XLA on CPU copies the activations into another order.
    """
    if ways("length") > 1:
        return _multiply(spec, x, weight).astype(x.dtype)
    B, T = x.shape[:2]
    out = _multiply(spec.replace("B", ""), x.reshape(B * T, *x.shape[2:]), weight).astype(x.dtype)
    return out.reshape(B, T, *out.shape[1:])


def _multiply(spec: str, x: jax.Array, weight: jax.Array | Int8 | Nf4 | Lora) -> jax.Array:
    match weight:
        case Lora():
            return lora_einsum(spec, x, weight, _multiply)
        case Int8():
            return int8_einsum(spec, x, weight)
        case Nf4():
            return nf4_einsum(spec, x, weight)
        case _:
            return jnp.einsum(spec, x, weight)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of every position's rotation, float32, (B, T, 1, H/2)."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float32 (H/2,): theta^(-2i/H), stretched where the configuration
    scales them.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if (s := config.rope_scaling) is not None:
        wavelengths = 2 * np.pi / frequencies
        smooth = (s.original_context / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        # Clipping covers both ends: above high_freq_factor nothing is stretched, below low_freq_factor everything is.
        smooth = np.clip(smooth, 0, 1)
        frequencies = (1 - smooth) * frequencies / s.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def rope_table(config: LlamaConfig, positions_BT: jax.Array) -> Rope:
    """Rotations at these positions, in float32 whatever the model's precision: bfloat16 cannot tell position 257 from
    256.
    """
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * rope_frequencies(config)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Rotary embedding, pairing element i of the first half of a head with element i of the second; in float32,
    returned in x's dtype.
    """
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm as the reference: in float32, cast back to x's dtype, then times the weight."""
    x32 = x_BTD.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x_BTD.dtype) * weight_D


def remat(block: Callable, policy: str) -> Callable:
    """Wraps a block so that its backward pass recomputes what `Compute.remat` says."""
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "attention": jax.checkpoint_policies.save_only_these_names("qkv", "attention_out"),
        "full": jax.checkpoint_policies.nothing_saveable,
        # Kept for the backward pass, gathered weights would be the whole model on every device.
        "none": lambda primitive, *_, **__: primitive.name not in ("linear_call", "reshape", "transpose"),
    }
    if policy == "none" and ways("embed") == 1:
        return block
    # Inside a scan XLA cannot merge the recomputation with the forward pass anyway; the barrier that prevents it costs
    # memory traffic.
    return jax.checkpoint(block, policy=policies[policy], prevent_cse=False)


def describe(config: LlamaConfig) -> Transformer:
    """The model as a tree of `Param` declarations: what abstract shapes, shardings and initial values are made from."""
    return Transformer(config, lambda param: param)


def abstract(config: LlamaConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Transformer:
    """The model as shapes and dtypes alone, with shardings if a mesh is given: a 70B costs nothing."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=None if mesh is None else sharding(mesh, *p.axes)),
        describe(config),
    )


def shardings(config: LlamaConfig, mesh: Mesh) -> Transformer:
    """The sharding of every parameter on `mesh`, as a tree of the model's shape."""
    return jax.tree.map(lambda p: sharding(mesh, *p.axes), describe(config))


def init(config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32) -> Transformer:
    """Random initial weights; each parameter's values depend on the key and its own name only, not on the mesh or on
    the other parameters.
    """

    def draw(path: tuple, p: Param) -> jax.Array:
        if p.std is None:
            return jnp.ones(p.shape, dtype)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return p.std * jax.random.normal(own_key, p.shape, dtype)

    return jax.tree_util.tree_map_with_path(draw, describe(config))
