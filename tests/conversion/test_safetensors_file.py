"""safetensors files: what the safetensors package writes is read, what is written it reads, and a damaged file is named."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.conversion import tensor_files
from llama_jax.conversion.safetensors_file import DTYPES, NAMES, SafetensorsReader, SafetensorsWriter
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)


def some_tensors() -> dict[str, np.ndarray]:
    tensors = {f"of_{dtype}": np.arange(6).reshape(2, 3).astype(dtype) for dtype in NAMES}
    return tensors | {
        "scalar": np.array(1.5, "f2"),
        "none": np.zeros((0, 4), BF16),
        "ünï": np.arange(5, dtype="i1"),
    }


def specs_of(tensors: dict[str, np.ndarray]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}


def write(path, tensors, **options) -> None:
    with SafetensorsWriter(path, specs_of(tensors), **options) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def forge(path, header: dict | bytes, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_the_packages_files_are_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="the format's own package is the oracle")
    library.save_file(some_tensors(), tmp_path / "a.safetensors", metadata={"format": "np"})
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    assert reader.metadata == {"format": "np"}
    assert set(reader.specs) == set(some_tensors())
    for name, expected in some_tensors().items():
        assert reader.specs[name] == TensorSpec(expected.shape, expected.dtype)
        assert_same(reader.read(name), expected)
        assert not reader.read(name).flags.writeable


def test_the_package_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors", reason="the format's own package is the oracle")
    write(tmp_path / "a.safetensors", some_tensors())
    with library.safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, expected in some_tensors().items():
            assert_same(opened.get_tensor(name), expected)


def test_order_alignment_and_metadata(tmp_path):
    tensors = {"z": np.ones(3, "f4"), "a": np.ones(2, "i1"), "m": np.ones((), "f8")}
    write(tmp_path / "a.safetensors", tensors, metadata={})
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    assert list(reader.specs) == ["z", "a", "m"] and reader.metadata == {}
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_a_file_without_tensors(tmp_path):
    write(tmp_path / "a.safetensors", {})
    assert SafetensorsReader(tmp_path / "a.safetensors").specs == {}


@pytest.mark.parametrize("block_bytes", [1, 24, 100, 10**6])
def test_views_of_any_strides_are_written_in_order(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
    base = np.arange(120, dtype="i4").reshape(4, 5, 6)
    tensors = {
        "transposed": base.T,
        "middle": base[:, 1:4],
        "strided": base[::2, :, ::3],
        "backwards": base[::-1, ::-1],
        "repeated": np.broadcast_to(base[0, 0], (7, 6)),
        "plain": base,
    }
    write(tmp_path / "a.safetensors", tensors)
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    for name, expected in tensors.items():
        assert_same(reader.read(name), np.ascontiguousarray(expected))


def test_the_writer_refuses_what_was_not_declared(tmp_path):
    path = tmp_path / "a.safetensors"
    specs = specs_of({"a": np.zeros(2, "f4"), "b": np.zeros(3, "f4")})
    for name, array in {"b": np.zeros(3, "f4"), "a": np.zeros(3, "f4")}.items():
        with pytest.raises(ValueError, match="declared"), SafetensorsWriter(path, specs) as writer:
            writer.write(name, array)
        assert not path.exists()
    with pytest.raises(ValueError, match="dtype|declared"), SafetensorsWriter(path, specs) as writer:
        writer.write("a", np.zeros(2, BF16))
    with pytest.raises(ValueError, match="b was declared and not written"), SafetensorsWriter(path, specs) as writer:
        writer.write("a", np.zeros(2, "f4"))
    assert not path.exists()
    with pytest.raises(UserError, match="cannot hold a of dtype complex64"):
        SafetensorsWriter(path, specs_of({"a": np.zeros(2, "c8")}))


BROKEN = {
    "header length": (b"\x00", b"", "first eight bytes"),
    "duplicate": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"0000", "stands twice"),
    "no json": (b"{oh", b"", "not JSON"),
    "not utf-8": (b'{"\xff":1}', b"", "not JSON"),
    "deep": (b"[" * 200_000, b"", "not JSON"),
    "list": (b"[]", b"", "not a JSON object"),
    "entry": ({"a": 3}, b"", "no entry"),
    "extra field": ({"a": entry(0, 8) | {"more": 1}}, b"0" * 8, "no entry"),
    "negative": ({"a": entry(0, 8, (-2,))}, b"0" * 8, "no usable shape"),
    "fraction": ({"a": entry(0, 8, (2.0,))}, b"0" * 8, "no usable shape"),
    "bool": ({"a": entry(0, 4, (True,))}, b"0" * 4, "no usable shape"),
    "overflow": ({"a": entry(0, 8, (2**40, 2**40))}, b"0" * 8, "no usable shape"),
    "bytes": ({"a": entry(0, 4)}, b"0" * 4, "of 8 bytes has the byte range 0 to 4"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, b"0" * 20, "gap or overlap at byte 8"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12, "gap or overlap at byte 4"),
    "late": ({"a": entry(4, 12)}, b"0" * 12, "gap or overlap at byte 0"),
    "truncated": ({"a": entry(0, 8)}, b"0" * 7, "promises"),
    "too long": ({"a": entry(0, 8)}, b"0" * 9, "promises"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damage_is_named_with_its_remedy(tmp_path, case):
    header, data, why = BROKEN[case]
    path = forge(tmp_path / "a.safetensors", header, data)
    if case == "header length":
        path.write_bytes(header)
    with pytest.raises(UserError, match=why) as error:
        SafetensorsReader(path)
    assert str(path) in str(error.value) and "download or copy it again" in str(error.value)


def test_sizes_found_and_expected_are_named(tmp_path):
    path = forge(tmp_path / "a.safetensors", {"a": entry(0, 8)}, b"0" * 8)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"it has {whole - 3} bytes, and its header promises {whole};"):
        SafetensorsReader(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="it has 20 bytes, and its header alone ends at byte"):
        SafetensorsReader(path)


def test_other_dtypes_are_named(tmp_path):
    path = forge(tmp_path / "a.safetensors", {"w": entry(0, 2, dtype="F8_E4M3")}, b"00")
    with pytest.raises(UserError, match="tensor w has dtype F8_E4M3; known are F64, F32"):
        SafetensorsReader(path)
    assert len(DTYPES) == 10


def test_an_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 13476925163\n")
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        SafetensorsReader(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    write(path, {"a": np.arange(4, dtype="f2"), "b": np.arange(3, dtype="i4")})
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_reads_or_is_refused(tmp_path, whole, data):
    path, damaged = tmp_path / "a.safetensors", bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(whole), len(whole) - 1, 30]))])
    try:
        reader = SafetensorsReader(path)
    except UserError:
        return
    for name, spec in reader.specs.items():
        assert reader.read(name).shape == spec.shape


READ_ALL = """
import sys
from pathlib import Path
from llama_jax.conversion.{module} import {reader}

def peak_mb():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before = peak_mb()
reader = {reader}(sys.argv[1])
assert sum(int(reader.read(name).sum()) for name in reader.specs) == {total}
print(peak_mb() - before)
"""


def peak_growth_mb(path, module: str, reader: str, total: int = 0) -> float:
    """Peak memory of a process that reads all tensors one at a time, above what it had after its imports."""
    code = READ_ALL.format(module=module, reader=reader, total=total)
    return float(subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout)


def test_a_file_larger_than_memory_opens(tmp_path):
    """Sparse: two tensors of 64 GiB, whose offsets multiply to more than 64 bits hold."""
    size = 2**36
    header = {"a": entry(0, size, (2**35,), "BF16"), "b": entry(size, 2 * size, (2**20, 2**16), "U8")}
    path = forge(tmp_path / "a.safetensors", header)
    end = path.stat().st_size + 2 * size
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end - 1)
        file.write(b"\x07")
    assert SafetensorsReader(path).read("b")[-1, -2:].tolist() == [0, 7]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_reading_holds_one_tensor_at_a_time(tmp_path):
    """A sparse file of 400 MB in 8 tensors; a mapping of the whole file would grow by 400."""
    size = 50 * 2**20
    path = forge(
        tmp_path / "a.safetensors", {f"t{i}": entry(i * size, (i + 1) * size, (size,), "U8") for i in range(8)}
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 8 * size)
    assert peak_growth_mb(path, "safetensors_file", "SafetensorsReader") < 50 + 50
