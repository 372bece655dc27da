"""Our own checkpoints: those of a run, and those that conversion writes.

Both are Orbax checkpoints. Orbax saves whole trees, and a tree of 70B parameters fits few hosts; so conversion lets Orbax
lay the folder out with placeholders and then fills in the arrays through TensorStore, as plain Zarr files, a layer at a
time. Reading goes a layer at a time through TensorStore too.
"""

import dataclasses
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from llama_jax.config import LlamaConfig, llama_config_from_json
from llama_jax.conversion import layout, source
from llama_jax.conversion.source import Overrides
from llama_jax.conversion.tensor_files import contiguous
from llama_jax.errors import UserError
from llama_jax.training.checkpoint import check_speaks, find_checkpoints, installed_versions, load_files, read_metadata

ASSETS = "huggingface"  # the item of small files that a Hugging Face export will want
_BLOCK_BYTES = 16 * 2**20  # the most that is copied at once; also the size of a file on disk
_THREADS = 4  # each copies, writes and sums one block at a time
_COLUMNS, _ROWS = 4096, 64  # of the table whose columns are summed: it fits a processor's cache


class OurSource:
    """The newest checkpoint of a run, one checkpoints/<step> folder, or a converted folder."""

    form = "ours"

    def __init__(self, path: Path, overrides: Overrides = Overrides()):
        """Opens the checkpoint; what it holds is compared with its fingerprints as it is read.

        Raises:
          UserError: it is none, or not whole.
        """
        if overrides != Overrides():
            raise UserError("a checkpoint of our own knows its configuration; leave --norm-eps and the like out")
        self.notes: list[str] = []
        self._folder = find_checkpoints(path)[-1]
        metadata = read_metadata(self._folder)
        check_speaks(self._folder, metadata)
        self.config = llama_config_from_json(metadata["model"])
        self._fingerprints = metadata["fingerprints"]["model"]
        self._sums = dict.fromkeys(self._fingerprints, 0)
        declared = layout.parameters(self.config)
        source.check_names(str(self._folder), self._fingerprints, declared, "it was written by another version")
        self._arrays = {name: self._open(name) for name in declared}
        for name, array in self._arrays.items():
            source.check_shape(str(self._folder), name, tuple(array.shape), declared[name].shape)
        self.dtypes = {name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()}
        tokenizer = load_files(self._folder, "tokenizer").get("sentencepiece")
        self.assets = load_files(self._folder, ASSETS) | ({source.TOKENIZER: tokenizer} if tokenizer else {})

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One weight in our layout."""
        array = self._arrays[name] if layer is None else self._arrays[name][layer]
        try:
            weight = array.read().result()
        except ValueError as error:
            raise UserError(
                f"checkpoint {self._folder} is damaged: {name} cannot be read: {str(error)[:200]}"
            ) from error
        self._sums[name] += sum_of_bits(weight, (layer or 0) * weight.size)
        return weight

    def finish(self) -> None:
        """Compares what was read with the fingerprints of what was saved.

        Raises:
          UserError: something has changed.
        """
        changed = [name for name, total in self._sums.items() if total % 2**32 != self._fingerprints[name]]
        if changed:
            raise UserError(f"checkpoint {self._folder} is damaged: {changed[:4]} are not what was saved")

    def _open(self, name: str) -> Any:
        folder = self._folder.resolve() / "model"
        if (folder / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{folder / name}/"}
        try:
            return tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
        except ValueError as error:
            raise UserError(f"checkpoint {self._folder} is not whole: {name}: {str(error)[:200]}") from error


class OurSink:
    """Writes one complete checkpoint folder, from which any verb can start, inside a `with`."""

    def __init__(self, folder: Path, config: LlamaConfig, dtypes: dict[str, np.dtype], assets: dict[str, bytes]):
        """Lays the folder out."""
        self._folder, self._config, self._dtypes = folder, config, dtypes
        self.order = layout.weights(config)
        self._sums = dict.fromkeys(dtypes, 0)
        self._arrays = {
            name: self._create(name, p.shape, dtypes[name]) for name, p in layout.parameters(config).items()
        }
        self._assets = assets
        self._threads = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Self:
        """The arrays are there already."""
        return self

    def write(self, name: str, layer: int | None, weight: np.ndarray) -> None:
        """Writes one weight, given in our layout."""
        target = self._arrays[name] if layer is None else self._arrays[name][layer]
        rows = _block_rows(weight.shape, weight.dtype)
        offset, width = (layer or 0) * weight.size, weight.size // len(weight)

        def copy(start: int) -> int:
            block = contiguous(weight[start : start + rows])
            part = target[start : start + len(block)]
            part.write(block, can_reference_source_data_indefinitely=True).result()
            return sum_of_bits(block, offset + start * width)

        self._sums[name] += sum(self._threads.map(copy, range(0, len(weight), rows)))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Completes the checkpoint; after an exception only waits, for nothing may be written once its folder is removed."""
        self._threads.shutdown(cancel_futures=True)
        if kind is None:
            self._complete()

    def _complete(self) -> None:
        """Lets Orbax write what makes the folder a checkpoint, around the arrays that are there."""
        metadata = {
            "model": dataclasses.asdict(self._config),
            "fingerprints": {"model": {name: total % 2**32 for name, total in self._sums.items()}},
            "versions": installed_versions(),
        }
        items: dict[str, Any] = {"model": {name: np.zeros(1, np.int8) for name in self._sums}}
        files = {name: np.frombuffer(content, np.uint8) for name, content in self._assets.items()}
        if source.TOKENIZER in files:
            items["tokenizer"] = {"sentencepiece": files.pop(source.TOKENIZER)}
        if files:
            items[ASSETS] = files
        context = ocp.Context()
        context.array.saving.use_ocdbt = False
        frame = self._folder / "frame"
        absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
        absl.setLevel(logging.ERROR)  # without OCDBT, Orbax warns that there is nothing of OCDBT to merge
        try:
            with context:
                ocp.save_checkpointables(frame.resolve(), items, custom_metadata=metadata)
        finally:
            absl.setLevel(level)
        for name in self._sums:
            placeholder = frame / "model" / name
            for path in sorted(placeholder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            placeholder.rmdir()
            (self._folder / "arrays" / name).rename(placeholder)
        (self._folder / "arrays").rmdir()
        for path in frame.iterdir():
            path.rename(self._folder / path.name)
        frame.rmdir()

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        chunk = (1, *shape[1:]) if layout.is_stacked(name) else shape
        at = 1 if layout.is_stacked(name) else 0
        rows = _block_rows(shape[at:], dtype)
        grid = {"name": "regular", "configuration": {"chunk_shape": [*chunk[:at], rows, *chunk[at + 1 :]]}}
        metadata = {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": grid,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._folder.resolve() / 'arrays' / name}/"},
            "metadata": metadata,
        }
        # What is zero is written too: a file that is not there would be a file that was lost.
        return tensorstore.open(spec | {"create": True, "store_data_equal_to_fill_value": True}).result()


def sum_of_bits(weight: np.ndarray, offset: int) -> int:
    """This part's share of an array's fingerprint: its bits, each weighted by its place in the whole array.

    On the host and by columns of a table, because sums along rows are what neither NumPy nor XLA vectorises on a CPU.

    Args:
      weight: a part that is contiguous in the whole; 16 or 32 bits a number.
      offset: elements of the whole before it.
    """
    bits = weight.reshape(-1).view(np.uint16 if weight.dtype.itemsize == 2 else np.uint32)
    rows = bits.size // _COLUMNS
    column, row = np.zeros(_COLUMNS, np.uint32), np.arange(_ROWS, dtype=np.uint32)[:, None]
    by_column, by_row = column.copy(), column.copy()
    for start in range(0, rows, _ROWS):
        part = bits[start * _COLUMNS : min(start + _ROWS, rows) * _COLUMNS].reshape(-1, _COLUMNS).astype(np.uint32)
        sums = part.sum(0, dtype=np.uint32)
        by_column += sums
        by_row += sums * np.uint32(start % 2**32) + (part * row[: len(part)]).sum(0, dtype=np.uint32)
    rest = bits[rows * _COLUMNS :].astype(np.uint32)
    total = int((by_column * _places(_COLUMNS, offset)).sum(dtype=np.uint32))
    total += int((by_row * np.uint32(2 * _COLUMNS)).sum(dtype=np.uint32))
    return total + int((rest * _places(rest.size, offset + rows * _COLUMNS)).sum(dtype=np.uint32))


def _places(count: int, offset: int) -> np.ndarray:
    """Twice the place plus one, modulo 2**32, of `count` elements behind `offset` others."""
    return np.arange(count, dtype=np.uint32) * np.uint32(2) + np.uint32((2 * offset + 1) % 2**32)


def _block_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows of the first axis in one block: all of them, or an even share that stays under the limit."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    parts = max(1, math.ceil(shape[0] * row_bytes / _BLOCK_BYTES))
    return math.ceil(shape[0] / min(parts, shape[0]))
