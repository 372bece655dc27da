"""Where documents come from (paper section 2.1): one word names a source, and gives documents in any order.

text:FILE_OR_GLOB            lines of <|endoftext|> between documents, or else pieces of 8 KiB
jsonl:GLOB[#FIELD]           plain, .gz or .zst; the field is `text` unless named
tfds:NAME[:VERSION][:SPLIT][#FIELD]   a prepared TensorFlow Datasets set in ArrayRecord, without TensorFlow
hf:NAME[@CONFIG][:SPLIT][#FIELD]      a Hugging Face set: a folder of save_to_disk, or a name on the hub
tokens:FOLDER                shards made by `llama-jax tokenize`
"""

import difflib
import os
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from llama_jax.data.files import JsonLines, TextFiles
from llama_jax.data.token_shards import TokenShards
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

SCHEMES = ("text", "jsonl", "tfds", "hf", "tokens")


class Documents(Protocol):
    """Documents by number; safe to pickle. A document is its text, or the ids of its tokens with BOS and EOS."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str | np.ndarray: ...


def open_source(spec: str, tokenizer: Tokenizer | None = None) -> Documents:
    """Opens one source, for example `text:books/*.txt`; `tokenizer` is what token shards are checked against.

    Raises UserError for an unknown scheme, missing or empty data, a missing field, or shards of another tokenizer.
    """
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in SCHEMES or not rest:
        raise _unknown(spec, scheme if colon else "")
    if scheme == "text":
        return TextFiles(rest)
    if scheme == "tokens":
        if tokenizer is None:
            raise UserError(
                f"{spec} holds no text to train a tokenizer on. Name the one it was made with: --tokenizer."
            )
        return TokenShards(rest, tokenizer)
    name, _, field = rest.partition("#")
    if scheme == "jsonl":
        return JsonLines(name, field or "text")
    source = _open_tfds(name, field or "text") if scheme == "tfds" else _open_hf(name, field or "text")
    if not len(source):
        raise UserError(f"{spec} holds no document. Check the split.")
    source[0]  # a wrong field name should be known at once, not after an hour
    return source


def open_records(spec: str) -> Sequence[dict]:
    """Opens a tfds: or hf: source as whole records by number, with all their fields.

    Raises UserError for another scheme, for missing data, or an empty split.
    """
    scheme, _, name = spec.partition(":")
    if scheme not in ("tfds", "hf") or not name:
        raise _unknown(spec, scheme)
    records = (_open_tfds if scheme == "tfds" else _open_hf)(name, "").records
    if not len(records):
        raise UserError(f"{spec} holds no record. Check the split.")
    return records


def _unknown(spec: str, scheme: str) -> UserError:
    if os.path.exists(spec):
        remedy = f"For files of text: text:{spec}"
    elif near := difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.4):
        remedy = f"Did you mean {near[0]}:{spec.partition(':')[2] or 'NAME'}?"
    else:
        remedy = "For example text:corpus.txt"
    return UserError(f"{spec!r} is no data source. Expected SCHEME:NAME with one of {', '.join(SCHEMES)}. {remedy}")


class _Records:
    """One text field of records that a library gives by number; `reopen(name, field)` makes the same again."""

    def __init__(self, records, name: str, field: str, spec: str, reopen: "Callable[[str, str], _Records]"):
        self.records, self._name, self._field, self._spec, self._reopen = records, name, field, spec, reopen

    def __reduce__(self):
        return self._reopen, (self._name, self._field)  # not every library's object can be pickled

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        record = self.records[index]
        text = record.get(self._field)
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        if not isinstance(text, str):
            raise UserError(
                f"{self._spec} has no text in field {self._field!r}; its fields are {', '.join(sorted(record))}. "
                f"Name the field: {self._spec}#FIELD."
            )
        return text


def _open_tfds(rest: str, field: str) -> _Records:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"tfds:{rest} needs a package: pip install tensorflow-datasets") from None
    parsed = re.fullmatch(r"(?P<name>[^:]+(:\d+\.\d+\.\d+)?)(:(?P<split>.+))?", rest)
    if not parsed:
        raise UserError(f"tfds:{rest} is not tfds:NAME[:VERSION][:SPLIT]. For example tfds:c4/en:3.1.0:train")
    name, split = parsed["name"], parsed["split"] or "train"
    # Read here and not by the library, which looks at the environment only when it is first imported.
    data_dir = os.environ.get("TFDS_DATA_DIR")
    prepare = (
        f'Prepare it in ArrayRecord first: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\", "
        "or set TFDS_DATA_DIR to the folder that holds it."
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(
            f"tfds:{rest}: no dataset {name} is known or lies in {data_dir or 'the data folder'}. {prepare}"
        ) from None
    if not builder.info.splits:
        raise UserError(f"tfds:{rest}: {name} is not prepared in {builder.data_dir}. {prepare}")
    stored_as = builder.info.file_format.file_suffix
    if stored_as not in ("array_record", "bagz"):
        raise UserError(f"tfds:{rest} is stored as {stored_as}, which gives no document by number. {prepare}")
    try:
        return _Records(builder.as_data_source(split), rest, field, f"tfds:{rest}", _open_tfds)
    except ValueError as error:
        raise UserError(f"tfds:{rest}: {error} Check the split.") from None


def _open_hf(rest: str, field: str) -> _Records:
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{rest} needs a package: pip install datasets") from None
    name, _, split = rest.partition(":")
    name, _, config = name.partition("@")
    try:
        if os.path.isdir(name) and not config:
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                found = found[split or "train"]
        else:
            found = datasets.load_dataset(name, config or None, split=split or "train")
    except KeyError:
        raise UserError(f"hf:{rest} has no split {split or 'train'!r}; it has {', '.join(found)}.") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"hf:{rest} cannot be opened ({error}). Check name, config and split, or the network."
        ) from None
    return _Records(found, rest, field, f"hf:{rest}", _open_hf)
