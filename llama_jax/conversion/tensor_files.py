"""What every file of named tensors offers, whatever its format: specs known at once, tensors read and written one at a time.

Memory stays bounded: a tensor is read as a memory map of its own bytes, and written in blocks. All formats here are little-endian,
as is every machine that JAX runs on, so bytes are never swapped.
"""

import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self

import numpy as np

from llama_jax.errors import UserError

# Large enough for full disk speed, small enough to stay in the processor's cache between checksum and write.
BLOCK_BYTES = 16 * 2**20
# Columns copied together; 64 to 256 are equally fast.
_BAND = 128


class TensorSpec(NamedTuple):
    """What a file says of one tensor; bfloat16 is the dtype of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, in an unbounded integer."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader(Protocol):
    """An opened file of tensors; opening reads and checks the file's directory, and no tensor."""

    path: Path
    specs: dict[str, TensorSpec]  # in file order

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only map of its own byte range: once the array is dropped, its pages leave the process."""
        ...


class TensorWriter:
    """A file that is filled with declared tensors in the declared order, inside a `with`.

    Leaving the `with` normally flushes to the disk; leaving it through an exception removes the file, so that no half-written one
    looks whole. A subclass says what stands before, around and after the tensors.
    """

    def __init__(self, path: str | os.PathLike, specs: dict[str, TensorSpec]):
        self.path = Path(path)
        self.specs = dict(specs)
        self._pending = iter(self.specs)

    def __enter__(self) -> Self:
        """Creates the file and writes what stands before the tensors."""
        self._file = self.path.open("wb")
        try:
            self._begin()
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor; a view of any strides is copied in blocks, a contiguous array is written without a copy.

        Raises ValueError if it is not the declared one: name in order, shape and dtype.
        """
        expected = next(self._pending, None)
        if name != expected:
            raise ValueError(f"{self.path}: tensor {name} was written where {expected or 'the end'} was declared")
        if (array.shape, array.dtype) != self.specs[name]:
            raise ValueError(f"{self.path}: {name} is {array.dtype}{array.shape}, declared as {self.specs[name]}")
        self._put(name, array)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Completes the file, or removes it after an exception; raises ValueError if a declared tensor is missing."""
        if kind is not None:
            self._abandon()
            return
        try:
            if (missing := next(self._pending, None)) is not None:
                raise ValueError(f"{self.path}: {missing} was declared and not written")
            self._end()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except BaseException:
            self._abandon()
            raise

    def _begin(self) -> None:
        raise NotImplementedError

    def _put(self, name: str, array: np.ndarray) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Writes what stands after the tensors."""

    def _abandon(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # what a full disk refused is not wanted any more
        self.path.unlink(missing_ok=True)


def write_array(file: BinaryIO, array: np.ndarray) -> int:
    """Writes an array's bytes in C order, at most BLOCK_BYTES of them copied at a time; returns their number."""
    blocks = _blocks(array)
    with ThreadPoolExecutor(1) as copier:  # copies the next block while this one is written
        copying = copier.submit(next, blocks, None)
        while (block := copying.result()) is not None:
            copying = copier.submit(next, blocks, None)
            file.write(block)
    return array.nbytes


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(flat), BLOCK_BYTES):
            yield flat[start : start + BLOCK_BYTES]
        return
    rows = BLOCK_BYTES // max(array[0].nbytes, 1)
    if not rows:
        for row in array:
            yield from _blocks(row)
        return
    for start in range(0, len(array), rows):
        yield contiguous(array[start : start + rows]).reshape(-1).view(np.uint8).data


def contiguous(array: np.ndarray) -> np.ndarray:
    """A copy in C order, several times faster for transposed matrices than NumPy's own.

    Where neighbours in the copy lie far apart in the source, each row would visit a page per element; a band of columns at a time
    stays in the processor's cache.
    """
    copy = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[-1], _BAND):
        copy[..., start : start + _BAND] = array[..., start : start + _BAND]
    return copy


def map_bytes(path: Path, start: int, nbytes: int) -> np.ndarray:
    """Maps one byte range of a file, and nothing around it, as a read-only array of uint8."""
    if not nbytes:
        return np.frombuffer(b"", np.uint8)
    lead = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), lead + nbytes, offset=start - lead, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint8, nbytes, lead)


def are_sizes(value: object) -> bool:
    """Whether a value that a file gave for strides or offsets is a tuple of numbers of elements that NumPy can hold."""
    return (
        isinstance(value, tuple) and len(value) <= 32 and all(type(size) is int and 0 <= size < 2**59 for size in value)
    )


def is_shape(value: object) -> bool:
    """Whether a value that a file gave for a shape is one that NumPy can hold."""
    return are_sizes(value) and math.prod(size for size in value if size) < 2**59


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises UserError for a Git LFS pointer, the small text that a clone without LFS leaves in place of weights."""
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull` in {path.parent}, or `llama-jax download`"
        )
