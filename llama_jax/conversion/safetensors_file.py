"""safetensors files: eight bytes of header length, a JSON header, then the tensors' bytes without gaps.

Our choice: a parser of our own rather than the safetensors package, because the package maps the whole file and keeps every page that was
touched until the file is closed. Here each tensor is a map of its own, so that a 14 GB file is read in the memory of its largest tensor.
"""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from llama_jax.conversion.tensor_files import (
    TensorReader,
    TensorSpec,
    TensorWriter,
    are_sizes,
    is_shape,
    map_bytes,
    refuse_pointer,
    write_array,
)
from llama_jax.errors import UserError

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own bound; a header of Llama 2 70B takes 80 KB.
MAX_HEADER_BYTES = 100_000_000


class SafetensorsReader(TensorReader):
    """An opened safetensors file.

    Raises UserError for a file that is truncated, too long, or no safetensors file, and for a dtype that NumPy has no name for.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._size = self.path.stat().st_size
        header, self._data_start = self._header()
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            self._refuse("its __metadata__ is not a table of texts")
        self.metadata: dict[str, str] = metadata
        found = {name: self._entry(name, entry) for name, entry in header.items()}
        found = dict(sorted(found.items(), key=lambda item: item[1][1:]))
        self.specs = {name: spec for name, (spec, _, _) in found.items()}
        self._offsets = {name: begin for name, (_, begin, _) in found.items()}
        self._check_cover([(begin, end) for _, begin, end in found.values()])

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only map of its own byte range: once the array is dropped, its pages leave the process."""
        spec = self.specs[name]
        flat = map_bytes(self.path, self._data_start + self._offsets[name], spec.nbytes)
        return flat.view(spec.dtype).reshape(spec.shape)

    def _header(self) -> tuple[dict[str, Any], int]:
        """The JSON header, and where the tensors' bytes begin."""
        with self.path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            refuse_pointer(self.path, head + file.read(32))
            if len(head) < 8 or length > MAX_HEADER_BYTES:
                self._refuse(f"its first eight bytes give no header length up to {MAX_HEADER_BYTES}")
            if 8 + length > self._size:
                self._refuse(f"it has {self._size} bytes, and its header alone ends at byte {8 + length}")
            file.seek(8)
            text = file.read(length)
        try:
            header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            self._refuse(f"its header is not JSON with unique keys ({str(error)[:200]})")
        if not isinstance(header, dict):
            self._refuse("its header is not a JSON object")
        return header, 8 + length

    def _entry(self, name: str, entry: object) -> tuple[TensorSpec, int, int]:
        """The spec of one tensor, and its first and last byte in the data."""
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            self._refuse(f"tensor {name} has no entry of dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} has dtype {str(entry['dtype'])[:40]}; known are {', '.join(DTYPES)}. "
                "Use a checkpoint that is not quantised, or convert it to one of these first"
            )
        shape, offsets = _tuple(entry["shape"]), _tuple(entry["data_offsets"])
        if not is_shape(shape) or not are_sizes(offsets) or len(offsets) != 2:
            self._refuse(f"tensor {name} has no usable shape and data_offsets")
        spec = TensorSpec(shape, DTYPES[entry["dtype"]])
        if offsets[1] - offsets[0] != spec.nbytes:
            self._refuse(f"tensor {name} of {spec.nbytes} bytes has the byte range {offsets[0]} to {offsets[1]}")
        return spec, *offsets

    def _check_cover(self, ranges: list[tuple[int, int]]) -> None:
        """The ranges, in order, must follow each other without gap or overlap and end where the file ends."""
        for (_, end), (begin, _) in pairwise([(0, 0), *ranges]):
            if begin != end:
                self._refuse(f"its tensors have a gap or overlap at byte {min(begin, end)} of the data")
        expected = self._data_start + (ranges[-1][1] if ranges else 0)
        if self._size != expected:
            self._refuse(f"it has {self._size} bytes, and its header promises {expected}")

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.path} is not a whole safetensors file: {why}; download or copy it again")


class SafetensorsWriter(TensorWriter):
    """A safetensors file in the making; raises UserError for a dtype that the format does not name."""

    def __init__(self, path: str | os.PathLike, specs: dict[str, TensorSpec], metadata: dict[str, str] | None = None):
        super().__init__(path, specs)
        for name, spec in specs.items():
            if spec.dtype not in NAMES:
                raise UserError(
                    f"safetensors cannot hold {name} of dtype {spec.dtype}; it knows {', '.join(map(str, NAMES))}"
                )
        # transformers refuses a file whose metadata does not say which framework's layout it holds.
        self._metadata = {"format": "pt"} if metadata is None else metadata

    def _begin(self) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        end = 0
        for name, spec in self.specs.items():
            begin, end = end, end + spec.nbytes
            header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned to eight bytes
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _put(self, name: str, array: np.ndarray) -> None:
        write_array(self._file, array)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
