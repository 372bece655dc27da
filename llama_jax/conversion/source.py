"""What every form of checkpoint offers to whoever reads it, and the strict checks they share."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B, LlamaConfig
from llama_jax.conversion import layout
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.errors import UserError

WEIGHT_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
TOKENIZER = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers derives from it and reads instead of it."""


@dataclass(frozen=True)
class Overrides:
    """What the reader is told because a file does not say it, or says it wrongly."""

    norm_eps: float | None = None
    """The epsilon of every RMSNorm, instead of the file's."""
    context_length: int | None = None
    """Tokens the model was trained on, instead of the file's; Meta's params.json and llama2.c's later versions name none."""
    fold_kv_heads: int | None = None
    """Key/value heads that the file holds repeated; they are checked to be equal and folded back to so many."""


class Source(Protocol):
    """A checkpoint that is read one array at a time; opening it has checked every name, shape and dtype."""

    form: str
    """hf, meta, llama2c or ours."""
    config: LlamaConfig
    dtypes: dict[str, np.dtype]
    """Of every parameter, by our name."""
    assets: dict[str, bytes]
    """Small files that travel with the weights, by name: the tokenizer's and Hugging Face's."""
    notes: list[str]
    """What reading had to decide, for people."""

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One weight in our layout: a view of the stored bytes where that is possible."""
        ...

    def finish(self) -> None:
        """Called after everything was read; raises UserError if what was read is not what was once saved."""
        ...


def check_names(where: str, found: Iterable[str], expected: Iterable[str], remedy: str) -> None:
    """Raises UserError unless a checkpoint holds exactly the names it must."""
    found, expected = set(found), set(expected)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it holds {_some(extra)} too many"] * bool(extra)
        raise UserError(f"{where} is not the checkpoint of its configuration: {' and '.join(parts)}; {remedy}")


def check_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError unless a tensor has the shape that the configuration gives it."""
    if found != expected:
        raise UserError(
            f"{where}: {name} has shape {found} where its configuration makes {expected}; "
            "the configuration or the file belongs to another model"
        )


def check_rank(where: str, name: str, found: tuple[int, ...], rank: int) -> None:
    """Raises UserError unless a tensor has so many axes; for what is looked at before its shape is known."""
    if len(found) != rank:
        raise UserError(
            f"{where}: {name} has shape {found} where a Llama's has {rank} axes; the file is another model's"
        )


def check_numbers(path: str, fields: Mapping[str, Any], whole: Iterable[str], real: Iterable[str]) -> None:
    """Raises UserError unless these fields of a JSON file are whole and real numbers above zero, where they are not null or absent."""
    kinds = dict.fromkeys(whole, (int,)) | dict.fromkeys(real, (int, float))
    for name, types in kinds.items():
        value = fields.get(name)
        if value is not None and (type(value) not in types or not 0 < value < math.inf):
            raise UserError(
                f"{path} has {name} {value!r}; expected a {'whole ' * (len(types) == 1)}number above zero: "
                "take the original checkpoint's file"
            )


def parameter_dtypes(
    where: str, config: LlamaConfig, specs: Mapping[layout.Weight, TensorSpec], stored: Callable[..., str]
) -> dict[str, np.dtype]:
    """The dtype of each parameter, which all its layers must share; `stored` gives a weight's name in the file.

    Raises:
      UserError: a tensor holds something else than floating-point weights, or a layer differs from the first.
    """
    dtypes: dict[str, np.dtype] = {}
    for name, layer in layout.weights(config):
        dtype = specs[name, layer].dtype
        if dtype not in WEIGHT_DTYPES.values():
            raise UserError(
                f"{where}: {stored(name, layer)} is {dtype}; weights are {', '.join(WEIGHT_DTYPES)}. "
                "A quantised checkpoint cannot be converted; take the one it was made from"
            )
        if dtypes.setdefault(name, dtype) != dtype:
            raise UserError(
                f"{where}: {stored(name, layer)} is {dtype} and {stored(name, 0)} {dtypes[name]}; "
                "one parameter has one dtype in all layers"
            )
    return dtypes


def correct_norm_eps(config: LlamaConfig, overrides: Overrides, is_llama2: bool, notes: list[str]) -> LlamaConfig:
    """The configuration with the epsilon asked for, or with that of the first 7B-chat files put right.

    Llama 2 7B-chat was first released with 1e-6; Meta later confirmed 1e-5. Llama 1 7B has the same shapes and a true 1e-6,
    so the caller says from something else whether the file is a Llama 2's.
    """
    if overrides.norm_eps is not None:
        return replace(config, norm_eps=overrides.norm_eps)
    if is_llama2 and config.norm_eps == 1e-6 and has_shape_of(config, LLAMA2_7B):
        notes.append(
            "its norm_eps is 1e-6, a known error of the first Llama 2 7B-chat files; 1e-5 is used (--norm-eps 1e-6 keeps it)"
        )
        return replace(config, norm_eps=1e-5)
    return config


def check_tying(where: str, config: LlamaConfig) -> None:
    """Raises UserError if a Llama 2 claims that its output head is its embedding: no Llama 2 does that."""
    llama2 = (LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B)
    if config.tie_embeddings and any(has_shape_of(config, preset) for preset in llama2):
        raise UserError(
            f"{where} has the shape of a Llama 2 and ties its output head to the embedding, which Llama 2 does not: "
            "its head was lost when it was saved; take the original checkpoint"
        )


def has_shape_of(config: LlamaConfig, preset: LlamaConfig) -> bool:
    """Whether every parameter that both have is of the same shape."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
    return all(getattr(config, name) == getattr(preset, name) for name in names)


def kv_heads(where: str, config: LlamaConfig, stored: int, overrides: Overrides, notes: list[str]) -> LlamaConfig:
    """The configuration with the number of key/value heads that the model really has.

    Args:
      where: the checkpoint, in messages.
      config: as its file has it.
      stored: heads that its key matrices hold.
      overrides: says whether repeated heads are to be folded.
      notes: gets a line if they are.

    Raises:
      UserError: the file and the matrices differ, or cannot be folded as asked.
    """
    heads = overrides.fold_kv_heads or config.n_kv_heads
    if stored == heads:
        return replace(config, n_kv_heads=heads)
    if not heads <= stored <= config.n_heads or stored % heads:
        raise UserError(
            f"{where} holds {stored} key/value heads, which are not a repetition of {heads}; "
            f"its configuration says {config.n_kv_heads}"
        )
    if overrides.fold_kv_heads is None:
        raise UserError(
            f"{where} holds {stored} key/value heads where its configuration has {heads}: each may be repeated for every "
            f"query head; --fold-kv-heads {heads} checks that the copies are equal and folds them"
        )
    notes.append(f"{stored} stored key/value heads are folded to {heads}; every copy is checked to be equal")
    return replace(config, n_kv_heads=heads)


def note_repeated_heads(config: LlamaConfig, read: Callable[[str], np.ndarray], notes: list[str]) -> None:
    """Adds a line if every query head has a key/value head of its own and these are copies of fewer.

    Args:
      config: as it was read.
      read: gives the first layer's matrix of a name as it is stored.
      notes: gets the line.
    """
    if not config.n_kv_heads == config.n_heads > 1:
        return
    times = layout.repeats(read("layers.wk_DKH"), config.head_dim)
    if times > 1 and layout.repeats(read("layers.wv_DKH"), config.head_dim) == times:
        notes.append(
            f"in layer 0 each key/value head is there {times} times: --fold-kv-heads {config.n_kv_heads // times} folds them"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
