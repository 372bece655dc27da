"""llama2.c's .bin files, versions 0 and 1: a header of seven numbers, then float32 arrays parameter after parameter.

Rotary pairs are neighbours, as in Meta's files. The header names neither the norm's epsilon nor the rotary base: both
are Llama 2's. A tokenizer.model beside the file belongs to it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, source
from llama_jax.conversion.source import Overrides
from llama_jax.conversion.tensor_files import write_array
from llama_jax.errors import UserError
from llama_jax.model.transformer import rope_frequencies
from llama_jax.text.tokenizer import Tokenizer

MAGIC = 0x616B3432  # "ak42", which opens version 1
_HEADER_1 = 256  # bytes
_FLOAT = np.dtype("<f4")

_NORMS = ("layers.attention_norm_D", "layers.ffn_norm_D", "norm_D")
_ATTENTION = ("layers.wq_DNH", "layers.wk_DKH", "layers.wv_DKH", "layers.wo_NHD")
_FEED_FORWARD = ("layers.w_gate_DF", "layers.w_down_FD", "layers.w_up_DF")
_ROTATIONS = "rotations"  # version 0's cosines and sines, which readers skip
_ORDER = {
    0: ("embedding_VD", _NORMS[0], *_ATTENTION, _NORMS[1], *_FEED_FORWARD, _NORMS[2], _ROTATIONS, "head_DV"),
    1: (*_NORMS, "embedding_VD", *_ATTENTION, *_FEED_FORWARD, "head_DV"),
}


@dataclass(frozen=True)
class _Header:
    version: int
    config: LlamaConfig
    start: int


class Llama2cSource:
    """A llama2.c checkpoint file, memory-mapped."""

    form = "llama2c"

    def __init__(self, path: Path, overrides: Overrides = Overrides()):
        """Opens the file and checks its header and its size.

        Raises:
          UserError: it is not of version 0 or 1, or is too short or too long for its header.
        """
        self.notes: list[str] = []
        if overrides.fold_kv_heads:
            raise UserError("--fold-kv-heads is for Hugging Face and Meta checkpoints; llama2.c never repeats heads")
        header = _read_header(path)
        self.config = source.replace(
            header.config,
            norm_eps=overrides.norm_eps or header.config.norm_eps,
            context_length=overrides.context_length or header.config.context_length,
        )
        tokenizer = path.parent / source.TOKENIZER
        self.assets = {source.TOKENIZER: tokenizer.read_bytes()} if tokenizer.is_file() else {}
        self.dtypes = dict.fromkeys(layout.parameters(self.config), np.dtype(np.float32))
        self._path = path
        end = _size(header)
        if path.stat().st_size != end:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes where its header makes {end}; copy or download it again"
            )
        self._offsets = dict(_offsets(self.config, header))

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One weight in our layout."""
        shape, offset = layout.matrix_shape(self.config, name), self._offsets[name, layer]
        matrix = np.memmap(self._path, _FLOAT, "r", offset, shape).view(np.ndarray)
        return layout.from_matrix(layout.to_halves(matrix, self.config, name), self.config, name)

    def finish(self) -> None:
        """Nothing is left to check."""


class Llama2cSink:
    """Writes model.bin and tokenizer.bin, which llama2.c's programs read, and tokenizer.model, which this one reads; inside a `with`."""

    def __init__(
        self, folder: Path, config: LlamaConfig, dtypes: dict[str, np.dtype], tokenizer: bytes | None, version: int
    ):
        """Writes the tokenizer.

        Raises:
          UserError: the form cannot hold the model.
        """
        like = LlamaConfig(1, 1, 1, 1, 1)
        fixed = {name: getattr(like, name) for name in ("norm_eps", "rope_theta", "rope_scaling")}
        fixed["head_dim"] = config.dim // config.n_heads
        if odd := [
            f"{name} {getattr(config, name)}" for name, value in fixed.items() if getattr(config, name) != value
        ]:
            raise UserError(f"llama2.c's form has no field for {', '.join(odd)}; it can only hold {fixed}")
        if set(dtypes.values()) != {np.dtype(np.float32)}:
            raise UserError("llama2.c's form holds float32 alone, and these weights are not; say --dtype float32")
        self._config, self._version = config, version
        self.order = [w for w in _file_order(config, version) if w[0] != _ROTATIONS]
        self._path = folder / "model.bin"
        if tokenizer is not None:
            (folder / source.TOKENIZER).write_bytes(tokenizer)
            (folder / "tokenizer.bin").write_bytes(tokenizer_bin(Tokenizer(tokenizer)))

    def __enter__(self) -> Self:
        """Writes the header."""
        self._file = self._path.open("wb")
        self._file.write(_header_bytes(self._config, self._version))
        return self

    def write(self, name: str, layer: int | None, weight: np.ndarray) -> None:
        """Writes one weight, given in our layout and in `order`."""
        matrix = layout.to_neighbours(layout.to_matrix(weight, name), self._config, name)
        write_array(self._file, matrix)
        if name == "norm_D" and self._version == 0:
            angles = np.outer(np.arange(self._config.context_length), rope_frequencies(self._config))
            write_array(self._file, np.cos(angles).astype(_FLOAT))
            write_array(self._file, np.sin(angles).astype(_FLOAT))

    def __exit__(self, *error: object) -> None:
        """Closes the file; whoever caught an exception removes it."""
        self._file.close()


def tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as llama2.c reads it: the longest piece's length, then score, length and bytes of each piece."""
    control = {tokenizer.bos_id: "\n<s>\n", tokenizer.eos_id: "\n</s>\n"}
    pieces = [
        (score, control.get(i, piece).replace("\u2581", " ").encode())
        for i, (piece, score) in enumerate(tokenizer.pieces())
    ]
    longest = max(len(piece) for _, piece in pieces)
    return struct.pack("<I", longest) + b"".join(struct.pack("<fI", s, len(p)) + p for s, p in pieces)


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        head = file.read(_HEADER_1)
    if len(head) < 28:
        raise UserError(f"{path} has {len(head)} bytes, fewer than a llama2.c header; copy or download it again")
    version, start = 0, 28
    fields = struct.unpack_from("<7i", head)
    if struct.unpack_from("<I", head)[0] == MAGIC:
        version, start = struct.unpack_from("<i", head, 4)[0], _HEADER_1
        if version != 1 or len(head) < _HEADER_1:
            raise UserError(f"{path} is of llama2.c's version {version}; versions 0 and 1 (float32) can be read")
        fields = struct.unpack_from("<7i", head, 8)
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, context_length = fields
    tied = bool(head[36]) if version == 1 else vocab_size > 0  # version 0 marks a head of its own by a minus sign
    if min(dim, ffn_dim, n_layers, n_heads, n_kv_heads, context_length, abs(vocab_size)) < 1 or dim % n_heads:
        raise UserError(f"{path} does not begin with a llama2.c header (its numbers are {fields}); name another --from")
    config = LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=ffn_dim,
        vocab_size=abs(vocab_size),
        context_length=context_length,
        head_dim=dim // n_heads,
        tie_embeddings=tied,
    )
    return _Header(version, config, start)


def _header_bytes(config: LlamaConfig, version: int) -> bytes:
    c = config
    vocab_size = c.vocab_size if version == 1 or c.tie_embeddings else -c.vocab_size
    fields = struct.pack("<7i", c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab_size, c.context_length)
    if version == 0:
        return fields
    return (struct.pack("<Ii", MAGIC, 1) + fields + struct.pack("<B", c.tie_embeddings)).ljust(_HEADER_1, b"\0")


def _file_order(config: LlamaConfig, version: int) -> list[layout.Weight]:
    order: list[layout.Weight] = []
    for name in _ORDER[version]:
        if layout.is_stacked(name):
            order += [(name, layer) for layer in range(config.n_layers)]
        elif name != "head_DV" or not config.tie_embeddings:
            order.append((name, None))
    return order


def _size(header: _Header) -> int:
    """Bytes of the whole file, by arithmetic alone: a header that promises too much costs nothing."""
    rotations = header.config.context_length * header.config.head_dim if header.version == 0 else 0
    return header.start + 4 * (header.config.n_params + rotations)


def _offsets(config: LlamaConfig, header: _Header) -> Iterator[tuple[layout.Weight, int]]:
    at = header.start
    # The stored rotations have as many rows as the header says, whatever context is asked for.
    rotations = header.config.context_length * config.head_dim
    for name, layer in _file_order(config, header.version):
        yield (name, layer), at
        size = rotations if name == _ROTATIONS else int(np.prod(layout.matrix_shape(config, name), dtype=np.int64))
        at += 4 * size
