"""A slow Llama in float64 NumPy, in Meta's layout, written from the paper's description and from nothing in `llama_jax`.

Flat matrices that act from the left (`wq (N H, D)`), w1/w2/w3, rotary pairs of neighbours multiplied as complex numbers,
key and value heads repeated, one sequence and one head at a time. `forward(..., wrong=...)` makes one of the mistakes
that implementations make.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.model.transformer import Param, Transformer, describe

MUTANTS = (
    "rope not permuted",
    "gate and up swapped",
    "epsilon 1e-6",
    "query heads regrouped",
    "no final norm",
    "positions off by one",
    "no causal mask",
    "scores not scaled",
    "rope on values",
    "norm weight forgotten",
    "rope scaling forgotten",
    "theta 10000",
)


def random_weights(config: LlamaConfig, seed: int, embedding_scale: float = 1.0) -> dict[str, np.ndarray]:
    """Weights in Meta's names and layout with sigma = 1 / sqrt(fan_in), so that every path carries signal, and norm weights around one.

    Args:
      config: the shape.
      seed: of NumPy's generator; equal seeds give equal weights everywhere.
      embedding_scale: standard deviation of the embedding. A small one makes the first norms' epsilon count.
    """
    rng = np.random.default_rng(seed)
    c = config

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / np.sqrt(columns)

    def norm() -> np.ndarray:
        return 1 + 0.3 * rng.standard_normal(c.dim)

    weights = {"tok_embeddings.weight": embedding_scale * rng.standard_normal((c.vocab_size, c.dim))}
    for i in range(c.n_layers):
        weights |= {
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.attention.wq.weight": matrix(c.n_heads * c.head_dim, c.dim),
            f"layers.{i}.attention.wk.weight": matrix(c.n_kv_heads * c.head_dim, c.dim),
            f"layers.{i}.attention.wv.weight": matrix(c.n_kv_heads * c.head_dim, c.dim),
            f"layers.{i}.attention.wo.weight": matrix(c.dim, c.n_heads * c.head_dim),
            f"layers.{i}.ffn_norm.weight": norm(),
            f"layers.{i}.feed_forward.w1.weight": matrix(c.ffn_dim, c.dim),
            f"layers.{i}.feed_forward.w2.weight": matrix(c.dim, c.ffn_dim),
            f"layers.{i}.feed_forward.w3.weight": matrix(c.ffn_dim, c.dim),
        }
    weights["norm.weight"] = norm()
    if not c.tie_embeddings:
        weights["output.weight"] = matrix(c.vocab_size, c.dim)
    # What float32 holds, so that both sides start from the same numbers.
    return {name: w.astype(np.float32).astype(np.float64) for name, w in weights.items()}


def forward(weights: dict[str, np.ndarray], tokens: np.ndarray, config: LlamaConfig, wrong: str = "") -> np.ndarray:
    """Logits (T, V) of one sequence of token ids (T,); `wrong` is one of `MUTANTS`, or empty."""
    c = config
    if wrong == "epsilon 1e-6":
        c = replace(c, norm_eps=1e-6)
    if wrong == "rope scaling forgotten":
        c = replace(c, rope_scaling=None)
    if wrong == "theta 10000":
        c = replace(c, rope_theta=10000.0)
    turns = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies(c)))  # (T, H/2)
    x = weights["tok_embeddings.weight"][tokens]
    for i in range(c.n_layers):
        w = {
            name.removeprefix(f"layers.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{i}.")
        }
        x = x + attention(norm(x, w["attention_norm.weight"], c.norm_eps), w, turns, c, wrong)
        ffn_weight = np.ones(c.dim) if wrong == "norm weight forgotten" else w["ffn_norm.weight"]
        x = x + feed_forward(norm(x, ffn_weight, c.norm_eps), w, wrong)
    if wrong != "no final norm":
        x = norm(x, weights["norm.weight"], c.norm_eps)
    return x @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def frequencies(c: LlamaConfig) -> np.ndarray:
    """Radians per position of each of the H/2 pairs, one at a time."""
    result = []
    for i in range(c.head_dim // 2):
        f = c.rope_theta ** (-2 * i / c.head_dim)
        if c.rope_scaling is not None:
            s = c.rope_scaling
            wavelength = 2 * np.pi / f
            if wavelength > s.original_context / s.low_freq_factor:
                f = f / s.factor
            elif wavelength >= s.original_context / s.high_freq_factor:
                share = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                f = (1 - share) * f / s.factor + share * f
        result.append(f)
    return np.array(result)


def attention(h: np.ndarray, w: dict[str, np.ndarray], turns: np.ndarray, c: LlamaConfig, wrong: str) -> np.ndarray:
    """Causal attention of the normed residual stream h (T, D), head by head."""
    T, H, G = len(h), c.head_dim, c.n_heads // c.n_kv_heads
    q = (h @ w["attention.wq.weight"].T).reshape(T, c.n_heads, H)
    k = (h @ w["attention.wk.weight"].T).reshape(T, c.n_kv_heads, H)
    v = (h @ w["attention.wv.weight"].T).reshape(T, c.n_kv_heads, H)
    # Rotary scores depend on the distance alone, so what can be off by one is a query against its keys.
    q_turns = turns * turns[1] if wrong == "positions off by one" else turns
    q, k = rotated(q, q_turns, wrong), rotated(k, turns, wrong)
    if wrong == "rope on values":
        v = rotated(v, turns, wrong)
    if wrong == "query heads regrouped":
        k, v = np.tile(k, (1, G, 1)), np.tile(v, (1, G, 1))
    else:
        k, v = np.repeat(k, G, axis=1), np.repeat(v, G, axis=1)
    heads = np.empty_like(q)
    for n in range(c.n_heads):
        scores = q[:, n] @ k[:, n].T
        if wrong != "scores not scaled":
            scores = scores / np.sqrt(H)
        if wrong != "no causal mask":
            scores = np.where(np.arange(T)[None, :] <= np.arange(T)[:, None], scores, -np.inf)
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads[:, n] = (e / e.sum(axis=1, keepdims=True)) @ v[:, n]
    return heads.reshape(T, c.n_heads * H) @ w["attention.wo.weight"].T


def rotated(x: np.ndarray, turns: np.ndarray, wrong: str) -> np.ndarray:
    """Neighbours (2i, 2i+1) of every head as one complex number, turned by its position's angle; x is (T, heads, H)."""
    if wrong == "rope not permuted":
        half = x.shape[-1] // 2
        z = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[:, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def feed_forward(h: np.ndarray, w: dict[str, np.ndarray], wrong: str) -> np.ndarray:
    """SwiGLU: w2(silu(w1 h) * (w3 h))."""
    gate, up = h @ w["feed_forward.w1.weight"].T, h @ w["feed_forward.w3.weight"].T
    if wrong == "gate and up swapped":
        gate, up = up, gate
    return (gate / (1 + np.exp(-gate)) * up) @ w["feed_forward.w2.weight"].T


def halves_from_neighbours(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a q or k matrix (heads * H, D) from pairs of neighbours to pairs of halves: even rows first."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}


def to_hf(weights: dict[str, np.ndarray], config: LlamaConfig) -> dict[str, np.ndarray]:
    """Meta's names and layout to Hugging Face's: other names, and q and k paired by halves."""
    result = {}
    for name, w in weights.items():
        part = name.removesuffix(".weight")
        if not part.startswith("layers."):
            result[f"{HF_NAMES[part]}.weight"] = w
            continue
        _, i, part = part.split(".", 2)
        if part in ("attention.wq", "attention.wk"):
            w = halves_from_neighbours(w, config.n_heads if part.endswith("q") else config.n_kv_heads)
        result[f"model.layers.{i}.{HF_NAMES[part]}.weight"] = w
    return result


def hf_to_ours(state: dict[str, np.ndarray], config: LlamaConfig) -> Transformer:
    """Hugging Face's names and layout to ours, float32; gradients map as weights do."""
    c = config
    D, N, K, H, F = c.dim, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_dim
    used = set()

    def take(name: str) -> np.ndarray:
        used.add(name)
        return state[name].T

    def stacked(name: str, *shape: int) -> np.ndarray:
        return np.stack([take(f"model.layers.{i}.{name}.weight").reshape(shape) for i in range(c.n_layers)])

    leaves = {
        ".embedding_VD": take("model.embed_tokens.weight").T,
        ".layers.attention_norm_D": stacked("input_layernorm", D),
        ".layers.wq_DNH": stacked("self_attn.q_proj", D, N, H),
        ".layers.wk_DKH": stacked("self_attn.k_proj", D, K, H),
        ".layers.wv_DKH": stacked("self_attn.v_proj", D, K, H),
        ".layers.wo_NHD": stacked("self_attn.o_proj", N, H, D),
        ".layers.ffn_norm_D": stacked("post_attention_layernorm", D),
        ".layers.w_gate_DF": stacked("mlp.gate_proj", D, F),
        ".layers.w_up_DF": stacked("mlp.up_proj", D, F),
        ".layers.w_down_FD": stacked("mlp.down_proj", F, D),
        ".norm_D": take("model.norm.weight"),
    }
    if not c.tie_embeddings:
        leaves[".head_DV"] = take("lm_head.weight")
    assert used == set(state), f"not used: {set(state) - used}"

    def pick(path: tuple, declared: Param) -> jax.Array:
        leaf = leaves[jax.tree_util.keystr(path)]
        assert leaf.shape == declared.shape, (path, leaf.shape, declared.shape)
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree_util.tree_map_with_path(pick, describe(config))


def to_ours(weights: dict[str, np.ndarray], config: LlamaConfig) -> Transformer:
    """Meta's names and layout to ours, float32."""
    return hf_to_ours(to_hf(weights, config), config)
