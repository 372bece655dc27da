"""PyTorch's .pth and .bin files, without PyTorch: a zip of uncompressed storages, and a pickle that says how tensors lie in them."""

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from llama_jax.conversion.tensor_files import (
    TensorReader,
    TensorSpec,
    TensorWriter,
    map_bytes,
    refuse_pointer,
    write_array,
)
from llama_jax.conversion.torch_pickle import STORAGE_NAMES, BadPickle, StoredTensor, read_pickle, write_pickle
from llama_jax.errors import UserError

# Room for 80,000 tensors; that of Llama 2 70B takes 150 KB.
MAX_PICKLE_BYTES = 16 * 2**20
# torch.load with mmap=True wants a storage at a multiple of its element size; torch.save aligns to this.
ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled magic number


class TorchReader(TensorReader):
    """An opened .pth or .bin file; nothing in it is run.

    A file may hold the dict of tensors itself or one level down, under `model` or `state_dict`. The checksums of the tensors' bytes are not
    compared, as torch.load does not compare them under mmap=True. Raises UserError for any other file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self.path.open("rb") as file:
            head = file.read(64)
        refuse_pointer(self.path, head)
        if head.startswith(_LEGACY_HEAD):
            raise UserError(
                f"{self.path} is in the form that torch.save had before PyTorch 1.6; where PyTorch is, write it anew with "
                f"torch.save(torch.load({str(self.path)!r}, weights_only=True), {str(self.path)!r})"
            )
        try:
            with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
                self._records, folder = self._find_records(archive, file)
                contents = self._read_pickle(archive, folder)
        # What the zip module raises for damage of one kind or another.
        except (
            zipfile.BadZipFile,
            EOFError,
            ValueError,
            OSError,
            NotImplementedError,
            RuntimeError,
            struct.error,
        ) as error:
            self._refuse(f"its {self.path.stat().st_size} bytes do not form a readable zip archive ({error})")
        self._tensors = self._tensors_in(contents)
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        self.specs = {name: TensorSpec(tensor.shape, tensor.storage.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only map of its own byte range: once the array is dropped, its pages leave the process."""
        storage, offset, shape, strides = self._tensors[name]
        itemsize = storage.dtype.itemsize
        extent = _extent(shape, strides)
        flat = map_bytes(self.path, self._records[f"data/{storage.key}"].start + offset * itemsize, extent * itemsize)
        steps = tuple(stride * itemsize if extent else 0 for stride in strides)
        return np.lib.stride_tricks.as_strided(flat.view(storage.dtype), shape, steps, writeable=False)

    def _find_records(self, archive: zipfile.ZipFile, file: BinaryIO) -> tuple[dict[str, range], str]:
        """The byte range of each record by its name without the top folder, and that folder."""
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            self._refuse(f"it holds {len(pickles)} records FOLDER/data.pkl where torch.save writes one")
        folder = pickles[0].removesuffix("data.pkl")
        records: dict[str, range] = {}
        expected = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.header_offset != expected:
                self._refuse(f"its records overlap or leave a gap at byte {expected}")
            start = self._start(file, info)
            name = info.filename.removeprefix(folder)
            if name in records:
                self._refuse(f"record {name} stands in it twice")
            records[name] = range(start, start + info.file_size)
            expected = self._end(file, info, start + info.file_size)
        if archive.start_dir != expected:
            self._refuse(f"its records end at byte {expected}, and their directory begins at byte {archive.start_dir}")
        return records, folder

    def _start(self, file: BinaryIO, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin: behind its own header, whose length only that header tells."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            self._refuse(f"record {info.filename} is compressed, which torch.save never does; it is not unpacked")
        if info.flag_bits & 0x1:
            self._refuse(f"record {info.filename} is encrypted")
        file.seek(info.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != b"PK\x03\x04" or file.read(name_length) != info.orig_filename.encode():
            self._refuse(f"record {info.filename} is not where the directory says")
        return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length

    def _end(self, file: BinaryIO, info: zipfile.ZipInfo, end: int) -> int:
        """Where a record ends: where its bytes do, unless their checksum and sizes follow them."""
        if not info.flag_bits & 0x8:
            return end
        file.seek(end)
        if file.read(8) != struct.pack("<4sI", b"PK\x07\x08", info.CRC):
            self._refuse(f"the checksum behind record {info.filename} is not where the directory says")
        wide = file.read(16)[8:] == info.file_size.to_bytes(8, "little")
        return end + (24 if wide else 16)

    def _read_pickle(self, archive: zipfile.ZipFile, folder: str) -> Any:
        if (size := len(self._records["data.pkl"])) > MAX_PICKLE_BYTES:
            self._refuse(f"its data.pkl has {size} bytes; {MAX_PICKLE_BYTES} would describe 80,000 tensors")
        if "byteorder" in self._records and archive.read(folder + "byteorder") != b"little":
            raise UserError(
                f"{self.path} was written on a big-endian machine; write it anew on another with torch.save"
            )
        try:
            return read_pickle(archive.read(folder + "data.pkl"))
        except BadPickle as error:
            raise UserError(
                f"{self.path}: data.pkl {error}, so the file is refused and nothing in it was run; "
                "take the checkpoint from its publisher, as safetensors where there is the choice"
            ) from error

    def _tensors_in(self, contents: Any) -> dict[str, StoredTensor]:
        """The dict of tensors, which may lie one level down beside an optimizer's state."""
        if isinstance(contents, dict) and not any(isinstance(value, StoredTensor) for value in contents.values()):
            inner = [contents[key] for key in ("model", "state_dict") if isinstance(contents.get(key), dict)]
            contents = inner[0] if inner else contents
        if not isinstance(contents, dict):
            self._refuse(f"it holds a {type(contents).__name__} where a dict of tensors was expected")
        found = {}
        for name, value in contents.items():
            if isinstance(value, StoredTensor) and isinstance(name, str):
                found[name] = value
            elif not isinstance(value, int | float | str | None):
                self._refuse(f"{str(name)[:100]!r} is a {type(value).__name__} where a tensor was expected")
        return found

    def _check(self, name: str, tensor: StoredTensor) -> None:
        """The storage must be there, whole, and hold every element that offset and strides can reach."""
        storage, offset, shape, strides = tensor
        promised, record = storage.numel * storage.dtype.itemsize, self._records.get(f"data/{storage.key}")
        if record is None or len(record) != promised:
            found = "is missing" if record is None else f"has {len(record)} bytes"
            self._refuse(f"record data/{storage.key[:40]} of {name} {found}, and {promised} bytes were expected")
        if not 0 <= offset <= storage.numel - _extent(shape, strides):
            self._refuse(
                f"tensor {name} (offset {offset}, shape {shape}, strides {strides}) leaves its {storage.numel} elements"
            )

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.path} is not a whole PyTorch checkpoint: {why}; download or copy it again")


class TorchWriter(TensorWriter):
    """A .pth or .bin file in the making, for torch.load; raises UserError for a dtype that its storages do not have."""

    def __init__(self, path: str | os.PathLike, specs: dict[str, TensorSpec]):
        super().__init__(path, specs)
        for name, spec in specs.items():
            if spec.dtype not in STORAGE_NAMES:
                known = ", ".join(map(str, STORAGE_NAMES))
                raise UserError(f"a PyTorch file cannot hold {name} of dtype {spec.dtype}; it knows {known}")
        self._keys = {name: str(key) for key, name in enumerate(specs)}

    def _begin(self) -> None:
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        for record, data in (("data.pkl", write_pickle(self.specs)), ("byteorder", b"little")):
            self._write_record(record, np.frombuffer(data, np.uint8))

    def _put(self, name: str, array: np.ndarray) -> None:
        self._write_record(f"data/{self._keys[name]}", array)

    def _end(self) -> None:
        self._write_record("version", np.frombuffer(b"3\n", np.uint8))
        self._archive.close()

    def _write_record(self, record: str, array: np.ndarray) -> None:
        info = zipfile.ZipInfo(f"archive/{record}")
        info.file_size = array.nbytes
        large = array.nbytes >= 2**30  # below where zipfile itself would choose the form with 64-bit sizes
        header = _LOCAL_HEADER.size + len(info.filename) + (20 if large else 0)
        padding = -(self._file.tell() + header + 4) % ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        with self._archive.open(info, "w", force_zip64=large) as file:
            write_array(file, array)

    def _abandon(self) -> None:
        try:
            self._archive.close()
        except (OSError, ValueError, AttributeError):
            pass  # the disk is full, or the archive was never begun; the file goes either way
        super()._abandon()


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last, both included."""
    if not math.prod(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
