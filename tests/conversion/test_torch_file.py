"""PyTorch's files without PyTorch: every form that torch.save writes is read, torch.load reads what is written, and nothing in a file is run."""

import builtins
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.conversion import tensor_files
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.conversion.torch_file import TorchReader, TorchWriter
from llama_jax.conversion.torch_pickle import STORAGE_DTYPES, write_pickle
from llama_jax.errors import UserError
from tests.conversion.make_golden import DTYPES, GOLDEN, counting, views
from tests.conversion.test_safetensors_file import assert_same, peak_growth_mb, specs_of

TWO_BY_THREE = counting((2, 3), np.dtype("f4"))
TORCH = "torch.load is the oracle"


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    with TorchWriter(path, specs_of(tensors)) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return path


def some_tensors() -> dict[str, np.ndarray]:
    tensors = {f"of_{dtype}": counting((2, 3), dtype) for dtype in STORAGE_DTYPES.values()}
    return tensors | {"scalar": np.array(1.5, "f2"), "none": np.zeros((0, 4), "f4"), "ünï": TWO_BY_THREE.T}


def forge(
    path: Path, program: bytes, records: dict[str, bytes] | None = None, folder: str = "archive", **options
) -> Path:
    """A zip as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        for name, data in {"data.pkl": program, "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"{folder}/{name.rstrip('+')}", data)
    return path


def one_tensor(*, kind="HalfStorage", key="0", numel=6, offset=0, shape=(2, 3), strides=(3, 1)) -> bytes:
    """The pickle of {"w": a tensor}, with room for nonsense."""

    def value(plain) -> bytes:
        return pickle.dumps(plain, 2)[2:-1]  # without the protocol's head and the stop

    storage = b"(" + value("storage") + f"ctorch\n{kind}\n".encode() + value(key) + value("cpu") + value(numel) + b"tQ"
    layout = value(offset) + value(shape) + value(strides) + value(False)
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + value("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + hooks + b"tRs."


def refused(path: Path, why: str) -> str:
    with pytest.raises(UserError, match=why) as error:
        TorchReader(path)
    assert str(path) in str(error.value)
    return str(error.value)


# Reading what torch.save wrote


def test_golden_dtypes():
    reader = TorchReader(GOLDEN / "dtypes.pth")
    assert list(reader.specs) == [*DTYPES, "scalar"]  # the number beside them is not a tensor
    for name in DTYPES:
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        assert reader.specs[name] == TensorSpec((2, 3), dtype)
        assert_same(reader.read(name), counting((2, 3), dtype))
        assert not reader.read(name).flags.writeable
    assert reader.read("scalar").shape == ()


def test_golden_views():
    reader = TorchReader(GOLDEN / "views.pth")
    expected = views(counting((4, 6), np.dtype("f4")))
    assert list(reader.specs) == list(expected)
    for name, array in expected.items():
        assert_same(reader.read(name), array)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("state_dict", ["weight", "bias"]),
        ("parameters", ["weight", "bias"]),
        ("nested", ["weight"]),
        ("protocol4", ["weight"]),
    ],
)
def test_golden_containers(file, names):
    reader = TorchReader(GOLDEN / f"{file}.pth")
    assert list(reader.specs) == names
    assert_same(reader.read("weight"), TWO_BY_THREE)


def test_the_form_before_1_6_is_named():
    assert "torch.save(torch.load(" in refused(GOLDEN / "legacy.pth", "before PyTorch 1.6")


def test_torchs_files_of_today_are_read(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    base = torch.randn(5, 4, 6)
    tensors = {
        "plain": base,
        "permuted": base.permute(2, 0, 1),
        "cut": base[1:4, ::2, 3:],
        "expanded": base[0, 0].expand(3, 6),
        "scalar": base[1, 2, 3],
        "none": base[:, :0],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(7).to(torch.bfloat16),
    }
    for value in (tensors, OrderedDict(tensors), {"state_dict": tensors, "epoch": 3}):
        torch.save(value, tmp_path / "a.pth")
        reader = TorchReader(tmp_path / "a.pth")
        assert list(reader.specs) == list(tensors)
        for name, tensor in tensors.items():
            found = reader.read(name)
            bits = found.view(np.int16) if name == "half" else found
            expected = tensor.detach().view(torch.int16) if name == "half" else tensor.detach()
            assert_same(bits, expected.numpy())


# Writing for torch.load


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(tmp_path, mmap):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = write(tmp_path / "a.pth", some_tensors())
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert type(loaded) is dict and list(loaded) == list(some_tensors())
    for name, expected in some_tensors().items():
        found = loaded[name]
        assert found.dtype == getattr(torch, str(expected.dtype)) and not found.requires_grad and found.is_contiguous()
        assert tuple(found.shape) == expected.shape
        assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == expected.tobytes()


def test_what_is_written_is_read(tmp_path):
    reader = TorchReader(write(tmp_path / "a.pth", some_tensors()))
    for name, expected in some_tensors().items():
        assert_same(reader.read(name), np.ascontiguousarray(expected).reshape(expected.shape))


def test_the_zip_is_sound_and_aligned(tmp_path):
    path = write(tmp_path / "a.pth", some_tensors())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum is right
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"
    assert all(record.start % 64 == 0 for record in TorchReader(path)._records.values())
    assert path.read_bytes() == write(tmp_path / "b.pth", some_tensors()).read_bytes()


def test_large_numbers_in_the_pickle():
    torch = pytest.importorskip("torch", reason=TORCH)
    import io

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, identity):
            return identity

        def find_class(self, module, name):
            return (lambda *arguments: arguments) if name.startswith("_rebuild") else super().find_class(module, name)

    specs = {"w": TensorSpec((2**20, 2**16), np.dtype("f2")), "none": TensorSpec((3, 0, 2), np.dtype("f4"))}
    loaded = Unpickler(io.BytesIO(write_pickle(specs))).load()
    assert loaded["w"][:4] == (("storage", torch.HalfStorage, "0", "cpu", 2**36), 0, (2**20, 2**16), (2**16, 1))
    assert loaded["none"][2:4] == ((3, 0, 2), torch.empty(3, 0, 2).stride())


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")

    def fail(file, array):
        file.write(b"half")
        raise full

    with pytest.raises(OSError) as error, TorchWriter(tmp_path / "a.pth", specs_of({"a": TWO_BY_THREE})) as writer:
        monkeypatch.setattr("llama_jax.conversion.torch_file.write_array", fail)
        writer.write("a", TWO_BY_THREE)
    assert error.value is full and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files with setrlimit")
def test_a_disk_that_fills_up_half_way_is_noticed(tmp_path):
    """A limit on the size of files stands in for the disk."""
    code = """
import resource, signal, sys
import numpy as np
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.conversion.torch_file import TorchWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
array = np.zeros(4 * 10**5, "u1")
specs = {name: TensorSpec(array.shape, array.dtype) for name in "abcd"}
with TorchWriter(sys.argv[1], specs) as writer:
    for name in specs:
        writer.write(name, array)
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "a.pth"], capture_output=True, text=True)
    assert "OSError: [Errno 27] File too large" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot hold a of dtype uint16"):
        TorchWriter(tmp_path / "a.pth", specs_of({"a": np.zeros(2, "u2")}))


# Malice


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "posix.system"), (builtins.eval, "eval"), (subprocess.Popen, ".Popen")]
)
@pytest.mark.parametrize("where", ["top", "value", "nested", "key"])
def test_a_call_is_refused_by_name_and_not_made(tmp_path, protocol, function, name, where):
    canary = tmp_path / "canary"
    command = f"open({str(canary)!r}, 'w')" if function is builtins.eval else f"touch {canary}"
    evil = Evil(function, command) if function is not subprocess.Popen else Evil(function, ["touch", str(canary)])
    value = {
        "top": evil,
        "value": {"w": evil},
        "nested": {"model": {"w": [1, {"a": (evil,)}]}},
        "key": {evil: 1},
    }[where]
    path = forge(tmp_path / "a.pth", pickle.dumps(value, protocol))
    message = refused(path, "wants to call")
    assert name in message and "nothing in it was run" in message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"ctorch\nload\n(X\x03\x00\x00\x00a/btR.", "wants to call torch.load"),
        (b"(X\x02\x00\x00\x00idios\nsystem\n.", "wants to call os.system"),
        (b"ctorch.jit._pickle\nbuild_intlist\n.", "wants to call torch.jit._pickle.build_intlist"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"ccollections\nOrderedDict\n)\x81.", "the instruction NEWOBJ"),
        (b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aNsb.", "damaged"),  # an attribute set on the class
        (b"X\x18\x00\x00\x00collections.OrderedDict()R.", "damaged"),  # a text that would be a function
        (b"ccollections\nOrderedDict\n(X\x02\x00\x00\x00abtR.", "damaged"),
        (b"R.", "damaged"),
        (b"}", "damaged"),
        (b"(((.", "damaged"),
        (b"", "damaged"),
        (b"\xff\xff.", "damaged"),
        (b"X\xff\xff\xff\xff.", "damaged"),
        (b"r\xff\xff\xff\xff.", "damaged"),
        (b"}(" + b")" + b"\x85" * 200_000 + b"Nu.", "damaged"),  # the hash of so deep a tuple overflows the stack
        (b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
        (b"]q\x00h\x00a.", "holds a list"),  # contains itself
        (b"}(X\x01\x00\x00\x00a]u.", "'a' is a list where a tensor was expected"),
        (b"}(X\x01\x00\x00\x00aX\x07\x00\x00\x00storageQu.", "damaged"),  # a reference to no storage
    ],
)
def test_a_strange_pickle_is_refused(tmp_path, program, why):
    refused(forge(tmp_path / "a.pth", program), why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"numel": 7}, "data/0 of w has 12 bytes, and 14 bytes were expected"),
        ({"numel": 5}, "data/0 of w has 12 bytes, and 10 bytes were expected"),
        ({"kind": "FloatStorage"}, "data/0 of w has 12 bytes, and 24 bytes were expected"),
        ({"key": "1"}, "data/1 of w is missing"),
        ({"key": "../../etc/passwd"}, "is missing"),
        ({"offset": 1}, "leaves its 6 elements"),
        ({"strides": (4, 1)}, "leaves its 6 elements"),
        ({"shape": (3, 3)}, "leaves its 6 elements"),
        ({"offset": -1}, "leaves its 6 elements"),
        ({"offset": 7, "shape": (0,), "strides": (1,)}, "leaves its 6 elements"),
        ({"strides": (3, -1)}, "damaged"),
        ({"strides": (3,)}, "damaged"),
        ({"shape": (2, -3)}, "damaged"),
        ({"shape": (2, 3.0)}, "damaged"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "damaged"),
        ({"numel": -1}, "damaged"),
        ({"kind": "QInt8Storage"}, "wants to call torch.QInt8Storage"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, changes, why):
    refused(forge(tmp_path / "a.pth", one_tensor(**changes), {"data/0": b"0" * 12}), why)


def test_any_folder_name_will_do(tmp_path):
    data = counting((2, 3), np.dtype("f2"))
    path = forge(tmp_path / "a.pth", one_tensor(), {"data/0": data.tobytes()}, folder="consolidated.00")
    assert_same(TorchReader(path).read("w"), data)


def test_strides_of_large_tensors_are_no_shape(tmp_path):
    """Their product overflows where that of the sizes does not."""
    shape, strides = (1, 1, 1, 2, 3), (2**40, 2**30, 2**20, 3, 1)
    data = counting(shape, np.dtype("f2"))
    path = forge(tmp_path / "a.pth", one_tensor(shape=shape, strides=strides), {"data/0": data.tobytes()})
    assert_same(TorchReader(path).read("w"), data)


@pytest.mark.parametrize("bomb", ["data.pkl", "data/0"])
def test_a_zip_bomb_is_not_unpacked(tmp_path, bomb):
    records = {"data/0": b"0" * 12, bomb: b"\x00" * 10**8}
    path = forge(tmp_path / "a.pth", one_tensor(), records, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    refused(path, "compressed, which torch.save never does")


def test_a_huge_pickle_is_not_read(tmp_path):
    refused(forge(tmp_path / "a.pth", b"N" * (16 * 2**20 + 1)), "its data.pkl has 16777217 bytes")


def test_duplicates_big_endian_and_several_pickles(tmp_path):
    refused(
        forge(tmp_path / "a.pth", one_tensor(), {"data/0": b"0" * 12, "data/0+": b"1" * 12}),
        "data/0 stands in it twice",
    )
    big = {"data/0": b"0" * 12, "byteorder": b"big"}
    refused(forge(tmp_path / "b.pth", one_tensor(), big), "big-endian")
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        archive.writestr("b/data.pkl", b"}.")
    refused(tmp_path / "c.pth", "holds 2 records")
    with zipfile.ZipFile(tmp_path / "d.pth", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused(tmp_path / "d.pth", "holds 0 records")


def directory_entry(path: Path, name: str) -> int:
    """Where the zip's directory tells of a record."""
    return path.read_bytes().rindex(b"PK\x01\x02", 0, path.read_bytes().rindex(name.encode()))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        (8, b"\x01\x00", "encrypted"),
        (42, b"\x00\x00\x00\x00", "overlap or leave a gap"),
        (42, b"\xf0\xff\xff\x7f", "not a whole PyTorch checkpoint"),
        (20, b"\xff\xff\x00\x00\xff\xff\x00\x00", "overlap or leave a gap"),
    ],
)
def test_a_forged_directory_is_refused(tmp_path, field, value, why):
    path = write(tmp_path / "a.pth", {"a": TWO_BY_THREE, "b": TWO_BY_THREE})
    data = bytearray(path.read_bytes())
    start = directory_entry(path, "archive/data/1") + field
    data[start : start + len(value)] = value
    path.write_bytes(data)
    refused(path, why)


def test_truncated_and_foreign_files(tmp_path):
    path = write(tmp_path / "a.pth", {"a": TWO_BY_THREE})
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 10, 0):
        path.write_bytes(whole[:kept])
        message = refused(path, "not a whole PyTorch checkpoint")
        assert f"its {kept} bytes" in message and "download or copy it again" in message
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\n")
    refused(path, "Git LFS pointer")


FLIPPED = {"a": counting((3,), np.dtype("i2")), "b": TWO_BY_THREE}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, list[int]]:
    """A file, and the places in it beside the elements, whose checksum nobody compares."""
    path = write(tmp_path_factory.mktemp("whole") / "a.pth", FLIPPED)
    records = TorchReader(path)._records
    elements = {place for name, record in records.items() if name.startswith("data/") for place in record}
    return path.read_bytes(), sorted(set(range(path.stat().st_size)) - elements)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_reads_equal_or_is_refused(tmp_path, whole, data):
    damaged, places = bytearray(whole[0]), whole[1]
    damaged[data.draw(st.sampled_from(places))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "a.pth"
    path.write_bytes(damaged)
    try:
        reader = TorchReader(path)
    except UserError:
        return
    assert list(reader.specs) == list(FLIPPED)
    for name, expected in FLIPPED.items():
        assert_same(reader.read(name), expected)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_pickle_reads_or_is_refused(tmp_path, data):
    """With its checksum made right again, so that the stack machine meets it."""
    with zipfile.ZipFile(
        GOLDEN / data.draw(st.sampled_from(["views.pth", "state_dict.pth", "protocol4.pth"]))
    ) as archive:
        records = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    program = bytearray(records.pop("data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    path = forge(tmp_path / "a.pth", bytes(program), records)
    try:
        reader = TorchReader(path)
    except UserError:
        return
    for name, spec in reader.specs.items():
        found = reader.read(name)
        assert (found.shape, found.dtype) == spec
        if found.size < 10_000:
            found.tobytes()


# Memory


WRITE_ALL = """
import sys
from pathlib import Path
import numpy as np
from llama_jax.conversion.tensor_files import TensorSpec
from llama_jax.conversion.torch_file import TorchWriter

def peak_mb():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

wide = np.broadcast_to(np.ones((2**13, 1), "u1").T, (50 * 2**7, 2**13))
specs = {f"t{i}": TensorSpec(wide.shape, wide.dtype) for i in range(4)}
before = peak_mb()
with TorchWriter(sys.argv[1], specs) as writer:
    for name in specs:
        writer.write(name, wide)
print(peak_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_stays_bounded(tmp_path):
    """Four tensors of 50 MB, written from a view that has no bytes of its own: blocks of 16 MB; read one at a time: one tensor."""
    path = tmp_path / "a.pth"
    written = subprocess.run([sys.executable, "-c", WRITE_ALL, path], capture_output=True, text=True, check=True)
    assert float(written.stdout) < 2 * tensor_files.BLOCK_BYTES / 2**20 + 10
    assert path.stat().st_size > 4 * 50 * 2**20
    assert peak_growth_mb(path, "torch_file", "TorchReader", total=4 * 50 * 2**20) < 50 + 50
