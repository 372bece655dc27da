"""The shape of every Llama of the paper and its family (paper 2.2, A.2.1), as frozen values.

The paper prints no dimensions; these are the released checkpoints' own. 34B was never released: its dimensions are
those of Code Llama 34B, which was
initialised from it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from llama_jax.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of low rotary frequencies beyond the trained context (Llama 3.1 reference code)."""

    factor: float = 8.0
    """How far wavelengths longer than the original context are stretched."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_context / low_freq_factor are stretched fully."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_context / high_freq_factor are left alone."""
    original_context: int = 8192
    """Positions the unscaled model was trained on."""


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one model: everything that decides the parameter shapes and the function they compute."""

    dim: int
    """Width of the residual stream (D)."""
    n_layers: int
    """Transformer blocks (L)."""
    n_heads: int
    """Query heads (N)."""
    n_kv_heads: int
    """Key/value heads (K); fewer than n_heads is grouped-query attention."""
    ffn_dim: int
    """Hidden width of the SwiGLU feed-forward (F)."""
    vocab_size: int = 32000
    """Pieces of the tokenizer (V)."""
    context_length: int = 4096
    """Tokens in a training sequence, the longest the model has seen."""
    head_dim: int = 128
    """Width of one attention head (H); even, because rotary embedding pairs its halves."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's frequency scaling; none for Llama 2."""
    norm_eps: float = 1e-5
    """The epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output head is the transposed embedding (Llama 3.2 1B and 3B); Llama 2 unties them."""

    def __post_init__(self) -> None:
        for field in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "ffn_dim",
            "vocab_size",
            "context_length",
            "head_dim",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must be at least 1")
        if self.n_heads % self.n_kv_heads:
            sizes = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise UserError(
                f"model.n_kv_heads is {self.n_kv_heads}, which does not divide n_heads {self.n_heads}; "
                f"it may be one of {sizes}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def n_params(self) -> int:
        """Exact number of parameters, embedding and head included."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * block + embeddings + self.dim

    def matmul_flops_per_token(self) -> int:
        """Forward FLOPs of one token in the weight matmuls (two per weight), the head included and the embedding
        lookup not.
        """
        norms = self.dim * (2 * self.n_layers + 1)
        lookup = 0 if self.tie_embeddings else self.vocab_size * self.dim
        return 2 * (self.n_params - norms - lookup)

    def causal_attention_flops_per_token(self, length: int) -> float:
        """Forward FLOPs of one token's attention to the mean (length + 1) / 2 keys a causal mask leaves it: scores and
        values.
        """
        return 2 * 2 * self.n_layers * self.n_heads * self.head_dim * (length + 1) / 2


def feed_forward_dim(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """The reference code's rule for the feed-forward width: two thirds of 4 * dim, scaled, rounded up to a multiple.

    Args:
      dim: width of the residual stream.
      multiple_of: the width is rounded up to a multiple of this.
      multiplier: `ffn_dim_multiplier` of params.json.
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


_change = dataclasses.replace

LLAMA2_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008)
LLAMA2_13B = LlamaConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824)
LLAMA2_34B = LlamaConfig(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, ffn_dim=22016)
LLAMA2_70B = LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672)

LLAMA1_7B = _change(LLAMA2_7B, context_length=2048, norm_eps=1e-6)
LLAMA1_13B = _change(LLAMA2_13B, context_length=2048, norm_eps=1e-6)
LLAMA1_33B = LlamaConfig(
    dim=6656, n_layers=60, n_heads=52, n_kv_heads=52, ffn_dim=17920, context_length=2048, norm_eps=1e-6
)
LLAMA1_65B = LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=64, ffn_dim=22016, context_length=2048)

CODE_LLAMA_7B = _change(LLAMA2_7B, vocab_size=32016, context_length=16384, rope_theta=1e6)
CODE_LLAMA_13B = _change(LLAMA2_13B, vocab_size=32016, context_length=16384, rope_theta=1e6)
CODE_LLAMA_34B = _change(LLAMA2_34B, context_length=16384, rope_theta=1e6)
CODE_LLAMA_70B = _change(LLAMA2_70B, vocab_size=32016, context_length=16384, rope_theta=1e6)

TINYLLAMA_1B = LlamaConfig(
    dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632, head_dim=64, context_length=2048
)

LLAMA3_8B = LlamaConfig(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    ffn_dim=14336,
    vocab_size=128256,
    context_length=8192,
    rope_theta=5e5,
)
LLAMA3_70B = _change(LLAMA2_70B, vocab_size=128256, context_length=8192, rope_theta=5e5)
LLAMA31_8B = _change(LLAMA3_8B, context_length=131072, rope_scaling=RopeScaling())
LLAMA31_70B = _change(LLAMA3_70B, context_length=131072, rope_scaling=RopeScaling())
LLAMA31_405B = _change(LLAMA31_70B, dim=16384, n_layers=126, n_heads=128, ffn_dim=53248)
LLAMA32_1B = _change(
    LLAMA31_8B,
    dim=2048,
    n_layers=16,
    head_dim=64,
    ffn_dim=8192,
    tie_embeddings=True,
    rope_scaling=RopeScaling(factor=32.0),
)
LLAMA32_3B = _change(LLAMA32_1B, dim=3072, n_layers=28, n_heads=24, head_dim=128)


@dataclass(frozen=True)
class Compute:
    """How a model is run, none of which changes what it computes beyond rounding."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the matmuls; norms, softmax, rotary embedding and loss stay in float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel: splash on TPU, cuDNN on GPU, XLA's own elsewhere; auto picks by platform."""
    remat: Literal["none", "dots", "attention", "full"] = "full"
    """What the backward pass recomputes: nothing; all but the weight matmuls; all but q, k, v and the attention
    output; the whole block.
    """
    loss_chunk: int = 2048
    """Tokens of a sequence whose logits exist at once while the loss is computed."""
    offload: bool = False
    """Keep the optimizer's moments in the host's memory between steps: 8 bytes a trained parameter less on the devices, for
    the time that fetching them and putting them back takes.
    """


def llama_config_from_json(fields: dict) -> LlamaConfig:
    """Rebuilds a configuration from what `dataclasses.asdict` made of it and JSON kept."""
    scaling = fields.get("rope_scaling")
    return LlamaConfig(**{**fields, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})
