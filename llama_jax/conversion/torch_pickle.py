"""The pickle inside PyTorch's files, read without running anything in it, and written.

A pickle is a program for a stack machine that may import and call whatever it names. Our choice: a stack machine of our own, in which names
stay names. It knows the few that describe tensors and has no instruction that imports or calls, so a malicious file has nothing to ask for.
"""

import pickletools
import struct
import warnings
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.conversion.tensor_files import TensorSpec, are_sizes, is_shape

STORAGE_DTYPES = {
    "torch.DoubleStorage": np.dtype("float64"),
    "torch.FloatStorage": np.dtype("float32"),
    "torch.HalfStorage": np.dtype("float16"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("int64"),
    "torch.IntStorage": np.dtype("int32"),
    "torch.ShortStorage": np.dtype("int16"),
    "torch.CharStorage": np.dtype("int8"),
    "torch.ByteStorage": np.dtype("uint8"),
    "torch.BoolStorage": np.dtype("bool"),
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
ORDERED_DICT = "collections.OrderedDict"
KNOWN = {REBUILD_TENSOR, REBUILD_PARAMETER, ORDERED_DICT, *STORAGE_DTYPES}

# Instructions that push their argument.
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}


class BadPickle(Exception):
    """The pickle asks for something else than tensors, or is damaged; the message says what stands in it."""


class Storage(NamedTuple):
    """A flat array of a file: the record `data/KEY`."""

    dtype: np.dtype
    key: str
    numel: int


class StoredTensor(NamedTuple):
    """A view into a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(str):
    """A known global that the pickle named; a type of its own, so that no text can pass for one."""


def read_pickle(data: bytes) -> Any:
    """What the pickle describes, as dicts, lists, tuples, numbers, texts and StoredTensors; raises BadPickle."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes in texts, which nobody will use
            return _Machine().run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadPickle(f"is damaged ({type(error).__name__}: {str(error)[:200]})") from error


class _Machine:
    """The stack machine; a mark is kept as the height at which it stands."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    self.marks.append(len(self.stack))
                case "NONE":
                    self.stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    self.stack.append(opcode.name == "NEWTRUE")
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self.stack[-1]
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self.stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    self.stack.append(self.memo[argument])
                case "STOP":
                    return self.pop(1)[0]
                case name if name in _NUMBERS | _TEXTS:
                    self.stack.append(argument)
                case name:
                    self.compose(name, argument)
        raise AssertionError("genops ends with STOP or raises")

    def compose(self, opcode: str, argument: Any) -> None:
        """The instructions that take something from the stack and put a larger thing there."""
        match opcode:
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(int(opcode[-1]))))
            case "LIST":
                self.stack.append(self.pop_to_mark())
            case "DICT":
                self.stack.append(_pairs(self.pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = self.pop_to_mark() if opcode == "APPENDS" else self.pop(1)
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_to_mark() if opcode == "SETITEMS" else self.pop(2)
                self.top(dict).update(_pairs(items))
            case "GLOBAL" | "INST":
                self.stack.append(_name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_name(".".join(self.pop(2))))
            case "BINPERSID":
                self.stack.append(_storage(*self.pop(1)))
            case "REDUCE":
                self.stack.append(_rebuild(*self.pop(2)))
            case "BUILD":
                # A state dict carries its modules' versions as an attribute; no tensor depends on them.
                self.pop(1)
                self.top(dict)
            case _:
                raise BadPickle(f"holds the instruction {opcode}, which no file of tensors needs")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {kind.__name__} was expected, not a {type(self.stack[-1]).__name__}")
        return self.stack[-1]


def _name(name: str) -> _Name:
    if name not in KNOWN:
        raise BadPickle(f"wants to call {name[:200]}; a checkpoint needs only tensors")
    return _Name(name)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    # Only plain keys are hashed: the hash of a deeply nested tuple would exhaust the C stack.
    if len(items) % 2 or not all(isinstance(key, str | int) for key in items[::2]):
        raise ValueError("a dict with other keys than texts and numbers")
    return dict(zip(items[::2], items[1::2], strict=True))


def _storage(identity: Any) -> Storage:
    kind, name, key, _, numel = identity
    if kind != "storage" or type(name) is not _Name or name not in STORAGE_DTYPES:
        raise ValueError("a reference to something else than a storage")
    if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**59:
        raise ValueError("a storage without a usable key and size")
    return Storage(STORAGE_DTYPES[name], key, numel)


def _rebuild(function: Any, arguments: Any) -> Any:
    """What the known functions would return, described instead of done."""
    if type(function) is not _Name or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is no function")
    if function == ORDERED_DICT:
        (items,) = arguments or ([],)
        return _pairs([part for pair in items for part in _two(pair)])
    if function == REBUILD_PARAMETER:
        tensor, _, hooks = arguments
        if not isinstance(tensor, StoredTensor) or hooks:
            raise ValueError("a parameter that is not a plain tensor")
        return tensor
    if function == REBUILD_TENSOR:
        # A seventh argument marks lazily conjugated or negated values.
        storage, offset, shape, strides, _, hooks, *lazy = arguments
        plain = isinstance(storage, Storage) and type(offset) is int and is_shape(shape) and are_sizes(strides)
        if not plain or hooks or any(lazy) or len(lazy) > 1 or len(shape) != len(strides):
            raise ValueError("a tensor without usable offset, shape and strides")
        return StoredTensor(storage, offset, shape, strides)
    raise ValueError(f"a call of {function}")


def _two(pair: Any) -> tuple[Any, Any]:
    key, value = pair
    return key, value


def write_pickle(specs: dict[str, TensorSpec]) -> bytes:
    """The pickle of a dict of contiguous tensors, in protocol 2 as torch.save writes it; the n-th lies in storage `data/n`."""
    parts = [b"\x80\x02}("]
    for key, (name, spec) in enumerate(specs.items()):
        numel = spec.nbytes // spec.dtype.itemsize
        strides = [1]
        for size in reversed(spec.shape[1:]):
            strides.append(strides[-1] * max(size, 1))
        identity = [
            _text("storage"),
            _global(STORAGE_NAMES[spec.dtype]),
            _text(str(key)),
            _text("cpu"),
            _integer(numel),
        ]
        parts += [_text(name), _global(REBUILD_TENSOR), b"((", *identity, b"tQ", _integer(0)]
        parts += [_integers(spec.shape), _integers(strides[: len(spec.shape)][::-1])]
        parts += [b"\x89", _global(ORDERED_DICT), b")RtR"]  # requires no gradient, has no hooks
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Any) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
