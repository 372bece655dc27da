"""Where each weight of a model is found in Hugging Face's and in Meta's files, and how it lies there (paper 2.2).

Both store a matrix as (outputs, inputs) with the heads flattened into one axis; ours keeps heads apart and inputs
first. Meta's rotary embedding pairs neighbours (2i, 2i+1) of a head, Hugging Face's and ours pair its two halves, so the
rows of the query and key matrices stand in another order. What can be a view of the stored bytes is one: nothing is
copied until it is written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model.transformer import Param, describe
from llama_jax.training.checkpoint import flat


@dataclass(frozen=True)
class Place:
    """Where one of our parameters lies in the other forms."""

    hf: str
    """Hugging Face's name; {} is the layer."""
    meta: str
    """Meta's name."""
    split: int | None
    """The axis of Meta's (outputs, inputs) matrix that model parallelism splits over files; None: every file has it."""


PLACES = {
    "embedding_VD": Place("model.embed_tokens.weight", "tok_embeddings.weight", 1),
    "layers.attention_norm_D": Place("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight", None),
    "layers.wq_DNH": Place("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight", 0),
    "layers.wk_DKH": Place("model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight", 0),
    "layers.wv_DKH": Place("model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight", 0),
    "layers.wo_NHD": Place("model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight", 1),
    "layers.ffn_norm_D": Place("model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight", None),
    "layers.w_gate_DF": Place("model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight", 0),
    "layers.w_up_DF": Place("model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight", 0),
    "layers.w_down_FD": Place("model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight", 1),
    "norm_D": Place("model.norm.weight", "norm.weight", None),
    "head_DV": Place("lm_head.weight", "output.weight", 0),
}

Weight = tuple[str, int | None]
"""One array of a checkpoint: our parameter's name, and its layer or None."""


def weights(config: LlamaConfig) -> list[Weight]:
    """Every array of a model in the order of the forward pass, one layer after the other."""
    names = [name for name in PLACES if name in parameters(config)]
    stacked = [name for name in names if is_stacked(name)]
    before, after = (
        [n for n in names if not is_stacked(n) and (n == "embedding_VD") is first] for first in (True, False)
    )
    layers = [(name, layer) for layer in range(config.n_layers) for name in stacked]
    return [*((n, None) for n in before), *layers, *((n, None) for n in after)]


@cache
def parameters(config: LlamaConfig) -> Mapping[str, Param]:
    """The declaration of every parameter by its name, layers stacked."""
    return flat(describe(config))


def is_stacked(name: str) -> bool:
    """Whether a parameter carries a leading layer axis."""
    return name.startswith("layers.")


def title(name: str, layer: int | None) -> str:
    """What a message calls one weight."""
    return name if layer is None else f"{name} of layer {layer}"


def shape(config: LlamaConfig, name: str) -> tuple[int, ...]:
    """Our shape of one layer's weight, or of one outside the layers."""
    return parameters(config)[name].shape[1 if is_stacked(name) else 0 :]


def matrix_shape(config: LlamaConfig, name: str) -> tuple[int, ...]:
    """The shape in which Hugging Face and (before its split) Meta store it."""
    own = shape(config, name)
    if _is_as_stored(name):
        return own
    n_in = _input_axes(name)
    return math.prod(own[n_in:]), math.prod(own[:n_in])


def to_matrix(weight: np.ndarray, name: str) -> np.ndarray:
    """Our weight as Hugging Face's matrix (outputs, inputs)."""
    if _is_as_stored(name):
        return weight
    inputs = math.prod(weight.shape[: _input_axes(name)])
    return weight.reshape(inputs, -1).T


def from_matrix(matrix: np.ndarray, config: LlamaConfig, name: str) -> np.ndarray:
    """Hugging Face's matrix as our weight."""
    return matrix if _is_as_stored(name) else matrix.T.reshape(shape(config, name))


def to_neighbours(matrix: np.ndarray, config: LlamaConfig, name: str) -> np.ndarray:
    """Hugging Face's matrix as Meta's: rows of queries and keys from pairs of halves to pairs of neighbours."""
    if not _is_rotated(name):
        return matrix
    heads, columns = _heads(config, name), matrix.shape[1]
    return matrix.reshape(heads, 2, config.head_dim // 2, columns).swapaxes(1, 2).reshape(matrix.shape)


def to_halves(matrix: np.ndarray, config: LlamaConfig, name: str) -> np.ndarray:
    """Meta's matrix as Hugging Face's; the inverse of `to_neighbours`."""
    if not _is_rotated(name):
        return matrix
    heads, columns = _heads(config, name), matrix.shape[1]
    return matrix.reshape(heads, config.head_dim // 2, 2, columns).swapaxes(1, 2).reshape(matrix.shape)


def fold_heads(matrix: np.ndarray, config: LlamaConfig, what: str) -> np.ndarray:
    """A key or value matrix whose heads were repeated for every query head, back to one of each.

    Args:
      matrix: (repeated heads * head_dim, inputs); either form's row order.
      what: its name in messages.

    Raises:
      UserError: the copies differ.
    """
    heads = matrix.reshape(config.n_kv_heads, -1, config.head_dim, matrix.shape[1])
    # Compared as bytes, so that equal NaNs are equal; a few heads at a time, so that no mask as large as the matrix exists.
    for group in heads:
        if any(copy.tobytes() != group[0].tobytes() for copy in group[1:]):
            raise UserError(
                f"{what} holds {heads.shape[0] * heads.shape[1]} heads that do not repeat {config.n_kv_heads}: "
                "its copies of a head differ; leave --fold-kv-heads out"
            )
    return heads[:, 0].reshape(-1, matrix.shape[1])


def repeats(matrix: np.ndarray, head_dim: int) -> int:
    """How many times in a row each head of a key matrix is repeated; 1 where they differ."""
    heads = matrix.reshape(-1, head_dim, matrix.shape[1])
    count = 1
    while count < len(heads) and heads[count].tobytes() == heads[0].tobytes():
        count += 1
    whole = len(heads) % count == 0 and all(
        heads[i].tobytes() == heads[i - i % count].tobytes() for i in range(len(heads))
    )
    return count if whole else 1


def _is_as_stored(name: str) -> bool:
    return name == "embedding_VD" or name.endswith("norm_D")


def _is_rotated(name: str) -> bool:
    return name.endswith(("wq_DNH", "wk_DKH"))


def _input_axes(name: str) -> int:
    return 2 if name.endswith("wo_NHD") else 1


def _heads(config: LlamaConfig, name: str) -> int:
    return config.n_heads if name.endswith("wq_DNH") else config.n_kv_heads
