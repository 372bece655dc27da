"""A corpus that needs no download: the text that every Python carries (a stand-in for paper section 2.1's mix).

Three kinds of text, each once: the language reference (`pydoc_data.topics`), the standard library's sources with
their docstrings, and the docstrings of the modules written in C, whose sources Python does not carry.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import UserError

# Not for reading: tests, other people's packages, and generated tables.
_LEFT_OUT_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_LEFT_OUT_FILES = {"html/entities.py", "stringprep.py", "tkinter/constants.py"}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "__phello__", "lib2to3/pgen2", "config-", "this.py", "antigravity.py")
_PIECE, _LONGEST_PIECE = 6_000, 10_000  # characters


@dataclass(frozen=True)
class CorpusSummary:
    """What `write_python_corpus` wrote: the file, its documents, and the UTF-8 bytes of their texts."""

    path: Path
    documents: int
    bytes: int


def write_python_corpus(path: str | os.PathLike) -> CorpusSummary:
    """Writes the corpus as JSON lines {"text", "name"}, the same for the same Python; never leaves half a file.

    Our choice: long texts become pieces of 6,000 to 10,000 characters, cut at blank lines where there are any, so that
    a held-out part of the documents is a fair sample of the text. Raises UserError if the file cannot be written.
    """
    path = Path(path)
    seen: set[str] = set()
    total = 0
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as out:
            for name, text in python_documents():
                if text not in seen:
                    seen.add(text)
                    total += len(text.encode())
                    out.write(json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"Cannot write the corpus to {path} ({error.strerror}). Choose a writable --out.") from None
    return CorpusSummary(path, len(seen), total)


def python_documents() -> Iterator[tuple[str, str]]:
    """Gives (name, text) of every document, in an order that depends on the Python version alone."""
    for texts in (_reference(), _c_docstrings(), _sources()):
        for name, text in texts:
            for number, piece in enumerate(_pieces(text)):
                if piece.strip():
                    yield f"{name}#{number}", piece


def _reference() -> Iterator[tuple[str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"reference/{name}", topics[name]


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if _LEFT_OUT_FOLDERS & set(Path(name).parts) or name in _LEFT_OUT_FILES or name.startswith(_LEFT_OUT_PREFIXES):
            continue
        try:
            with tokenize.open(file) as opened:
                text = opened.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a file that Python itself could not read
        yield name, text


def _c_docstrings() -> Iterator[tuple[str, str]]:
    """Gives one text for each module without Python source: its docstring and those of what it defines."""
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_test", "_xx", "xx")):
            continue
        spec = importlib.util.find_spec(name) if name != "__main__" else None
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        if spec is None or not (spec.origin == "built-in" or str(spec.origin).endswith(suffixes)):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = importlib.import_module(name)
        except ImportError:
            continue  # needs a library that this machine lacks
        entries = [text for text in _described(module, name, seen) if text]
        if entries:
            yield f"docstrings/{name}", "\n\n".join(entries) + "\n"


def _described(module, module_name: str, seen: set[str]) -> Iterator[str]:
    yield inspect.getdoc(module) or ""
    for name, value in sorted(vars(module).items()):
        if name.startswith("__") or getattr(value, "__module__", module_name) not in (module_name, "builtins", None):
            continue
        if module_name == "sys" and name.endswith("hook"):
            continue  # meant to be replaced, so not the same in every program
        if inspect.isclass(value) or inspect.isroutine(value):
            yield _entry(f"{module_name}.{name}", value, seen)
        if inspect.isclass(value):
            for attribute, member in sorted(vars(value).items()):
                if not attribute.startswith("_") and (inspect.isroutine(member) or inspect.isdatadescriptor(member)):
                    yield _entry(f"{name}.{attribute}", member, seen)


def _entry(name: str, value, seen: set[str]) -> str:
    """Gives "name(signature)" and the indented docstring, or "" where there is none or it has been given."""
    doc = inspect.getdoc(value)
    if not doc or doc in seen:
        return ""
    seen.add(doc)
    # As written in C: inspect.signature evaluates the defaults, which some modules cannot do.
    signature = (getattr(value, "__text_signature__", None) or "").replace("$", "")
    return "\n".join([name + signature, *(f"    {line}".rstrip() for line in doc.splitlines())])


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text at the first blank line after 6,000 characters, or line end or character before 10,000."""
    start = 0
    while len(text) - start > _LONGEST_PIECE:
        blank = text.find("\n\n", start + _PIECE, start + _LONGEST_PIECE)
        line = text.rfind("\n", start + _PIECE, start + _LONGEST_PIECE)
        stop = blank + 2 if blank >= 0 else line + 1 if line >= 0 else start + _LONGEST_PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]
