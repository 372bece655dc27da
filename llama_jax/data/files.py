"""Text and JSON-lines files of any size as documents, found by their places in the files and read one at a time."""

import glob
import gzip
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard

from llama_jax.errors import UserError

SEPARATOR = b"<|endoftext|>"
PIECE_BYTES = 8 * 1024  # about the length at which 2048 to 4096 tokens fill a row
_LONGEST_PIECE_BYTES = 8 * PIECE_BYTES  # where a file has no lines


class TextFiles:
    """Documents of text files: what stands between lines that say <|endoftext|>, or else pieces of the file.

    Our choice: a file without such lines is cut at the first line end after every 8 KiB (lines over 64 KiB are cut
    too); all its bytes are kept. What is not UTF-8 is replaced by U+FFFD. Pickles without open files.
    """

    def __init__(self, pattern: str):
        """Indexes the files that match; raises UserError if there are none or they hold nothing."""
        self._spans = _Spans(pattern, matching_files(pattern), _text_spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        return self._spans.read(index).decode(errors="replace")


class Lines:
    """The lines of files as bytes, blank ones left out; the files are plain or compressed (.gz, .zst).

    Compressed files allow no access out of order: they are unpacked once into the cache folder (LLAMA_JAX_CACHE, by
    default ~/.cache/llama_jax) and used from there.
    """

    def __init__(self, pattern: str):
        """Indexes the files that match; raises UserError if there are none or they hold nothing."""
        self._names = matching_files(pattern)
        self._spans = _Spans(pattern, [_plain_file(path) for path in self._names], _line_spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        return self._spans.read(index)

    def place(self, index: int) -> str:
        """Where a line stands, for people: the file's name and the line's number in it."""
        file, start, _ = self._spans.locate(index)
        with open(self._spans.paths[file], "rb") as opened:
            line = sum(chunk.count(b"\n") for chunk in _chunks(opened, start)) + 1
        return f"{self._names[file]}, line {line}"


class JsonLines:
    """Documents of JSON-lines files, plain or compressed: one field of every line.

    Big corpora are better tokenised once: `llama-jax tokenize`.
    """

    def __init__(self, pattern: str, field: str = "text"):
        """Indexes the files that match; raises UserError if there are none, or for a first line without the field."""
        self._field = field
        self._lines = Lines(pattern)
        self[0]  # a wrong field name should be known at once, not after an hour

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        """Gives the text of a line; raises UserError naming file and line if it holds none."""
        try:
            record = json.loads(self._lines[index])
        except ValueError as error:
            place = self._lines.place(index)
            raise UserError(f"{place} is not JSON ({error}). Repair or remove the line.") from None
        if not isinstance(record, dict) or not isinstance(record.get(self._field), str):
            found = f"the fields {', '.join(sorted(record))}" if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"{self._lines.place(index)} has no text in field {self._field!r} but {found}. "
                "Name the field: jsonl:FILE#FIELD."
            )
        return whole_characters(record[self._field])


def whole_characters(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON can spell but which are no characters, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _Spans:
    """Byte ranges in files, numbered through all files."""

    def __init__(self, pattern: str, paths: list[Path], spans_of: Callable[[mmap.mmap], np.ndarray]):
        self.paths = paths
        spans = [_mapped(path, spans_of) for path in paths]
        self._bounds = np.concatenate(spans)
        self._ends = np.cumsum([len(s) for s in spans])  # the number of the first span of the next file
        if not len(self._bounds):
            raise UserError(f"Nothing to read in {pattern}: {len(paths)} file(s), no document. Check --data.sources.")

    def __len__(self) -> int:
        return len(self._bounds)

    def locate(self, index: int) -> tuple[int, int, int]:
        """Gives the number of the file, and the first and last (exclusive) byte in it."""
        start, stop = self._bounds[index].tolist()
        return int(np.searchsorted(self._ends, index, side="right")), start, stop

    def read(self, index: int) -> bytes:
        # Opened for each document: any number of files, nothing to carry to worker processes, and cheap beside
        # tokenising (20 us against about 1 ms).
        file, start, stop = self.locate(index)
        with open(self.paths[file], "rb") as opened:
            opened.seek(start)
            return opened.read(stop - start)


def matching_files(pattern: str) -> list[Path]:
    """Gives the files that a name or glob (** included) matches, sorted; raises UserError if there are none."""
    paths = [Path(pattern)] if os.path.isfile(pattern) else sorted(map(Path, glob.glob(pattern, recursive=True)))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        hint = f" It is a folder: use {pattern.rstrip('/')}/*." if os.path.isdir(pattern) else ""
        raise UserError(f"No file matches {pattern} (in {os.getcwd()}).{hint} Check --data.sources.")
    return paths


def _mapped(path: Path, spans_of: Callable[[mmap.mmap], np.ndarray]) -> np.ndarray:
    try:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros((0, 2), np.int64)
        with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return spans_of(data)
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Check --data.sources.") from None


def _text_spans(data: mmap.mmap) -> np.ndarray:
    """Gives an int64 array [documents, 2] of first and last (exclusive) bytes."""
    spans, start, search = [], 0, 0
    separated = False
    while (at := data.find(SEPARATOR, search)) >= 0:
        search = at + len(SEPARATOR)
        line_end = data[search : search + 2]
        if (at == 0 or data[at - 1] == 10) and line_end[:1] in (b"", b"\n", b"\r"):
            separated = True
            spans.append((start, at))
            start = search + (2 if line_end == b"\r\n" else 1)
    if separated:
        spans.append((start, len(data)))
    else:
        while start < len(data):
            stop = _piece_end(data, start)
            spans.append((start, stop))
            start = stop
    return np.array([(a, b) for a, b in spans if a < b], np.int64).reshape(-1, 2)


def _piece_end(data: mmap.mmap, start: int) -> int:
    if start + PIECE_BYTES >= len(data):
        return len(data)
    newline = data.find(b"\n", start + PIECE_BYTES - 1, start + _LONGEST_PIECE_BYTES)
    if newline >= 0:
        return newline + 1
    stop = min(start + _LONGEST_PIECE_BYTES, len(data))
    while stop < len(data) and data[stop] & 0xC0 == 0x80 and stop > start + PIECE_BYTES:  # inside a character
        stop -= 1
    return stop


def _line_spans(data: mmap.mmap) -> np.ndarray:
    """Gives an int64 array [lines that are not blank, 2]."""
    newlines, step = [], 1 << 26
    for offset in range(0, len(data), step):
        newlines.append(np.flatnonzero(np.frombuffer(data[offset : offset + step], np.uint8) == 10) + offset)
    stops = np.append(np.concatenate(newlines), len(data)).astype(np.int64)
    spans = np.stack([np.append(0, stops[:-1] + 1), stops], axis=1)
    lengths = spans[:, 1] - spans[:, 0]
    keep = lengths > 0
    for line in np.flatnonzero(keep & (lengths < len(b'{"":""}'))).tolist():  # perhaps only spaces
        keep[line] = bool(data[spans[line, 0] : spans[line, 1]].strip())
    return spans[keep]


def _chunks(opened, size: int):
    """Gives the first `size` bytes of an open file in pieces."""
    while size > 0 and (chunk := opened.read(min(size, 1 << 22))):
        yield chunk
        size -= len(chunk)


def _plain_file(path: Path) -> Path:
    """Gives the file itself, or for .gz and .zst its unpacked copy in the cache folder, made where missing."""
    if path.suffix not in (".gz", ".zst"):
        return path
    base = os.environ.get("LLAMA_JAX_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llama_jax"
    )
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = Path(base) / "unpacked" / f"{key}-{path.stem}"
    if plain.exists():
        return plain
    partial = plain.with_name(f".{plain.name}.{os.getpid()}.partial")
    try:
        plain.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as packed, open(partial, "wb") as out:
            if path.suffix == ".gz":
                with gzip.open(packed) as unpacked:
                    shutil.copyfileobj(unpacked, out, 1 << 20)
            else:
                _unpack_zst(packed, out)
        os.replace(partial, plain)
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or no {path.suffix} file ({error}). Fetch it again.") from None
    except OSError as error:
        raise UserError(
            f"Cannot unpack {path} into {plain.parent} ({error.strerror}). Set LLAMA_JAX_CACHE to a folder with room."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return plain


def _unpack_zst(packed, out) -> None:
    """Unpacks all frames of a file; raises EOFError where the last one is cut short, which zstandard.open does not."""
    unpacker = None
    while chunk := packed.read(1 << 20):
        while chunk:
            unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
            out.write(unpacker.decompress(chunk))
            chunk = unpacker.unused_data if unpacker.eof else b""
            unpacker = None if unpacker.eof else unpacker
    if unpacker is not None:
        raise EOFError("it ends in the middle of a frame")
