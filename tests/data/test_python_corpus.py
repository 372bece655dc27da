"""The corpus from Python itself: large enough, without repeats, the same every time."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.data.python_corpus import write_python_corpus
from llama_jax.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    summary = write_python_corpus(tmp_path_factory.mktemp("corpus") / "python.jsonl")
    return summary, [json.loads(line) for line in summary.path.read_text().splitlines()]


def test_the_summary_counts_what_was_written(written):
    summary, documents = written
    assert summary.documents == len(documents) > 1000
    assert summary.bytes == sum(len(document["text"].encode()) for document in documents) > 5_000_000


def test_no_text_comes_twice_or_grows_too_long_and_names_are_unique(written):
    _, documents = written
    assert (
        len({document["text"] for document in documents})
        == len({document["name"] for document in documents})
        == len(documents)
    )
    assert max(len(document["text"]) for document in documents) <= 10_000


def test_it_holds_the_reference_docstrings_and_sources_but_no_tests_or_tables(written):
    _, documents = written
    names = {document["name"] for document in documents}
    text = "".join(document["text"] for document in documents)
    assert "Compound statements" in text
    assert "Return the number of items in a container." in text  # len: written in C
    assert "class JSONDecoder" in text
    assert {"docstrings/builtins#0", "json/decoder.py#0", "reference/assert#0"} <= names
    assert not [
        name
        for name in names
        if "/test" in name or "idle_test" in name or name.startswith(("encodings", "site-packages"))
    ]


def test_pieces_of_a_file_join_to_the_file(written):
    _, documents = written
    pieces = [document["text"] for document in documents if document["name"].startswith("inspect.py#")]
    assert "".join(pieces) == Path(inspect.__file__).read_text()
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)


def test_another_process_writes_the_same_bytes(written, tmp_path):
    summary, _ = written
    program = (
        "import sys; from llama_jax.data.python_corpus import write_python_corpus; write_python_corpus(sys.argv[1])"
    )
    other = tmp_path / "again.jsonl"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program, str(other)], check=True, env=environment)
    assert other.read_bytes() == summary.path.read_bytes()


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write the corpus"):
        write_python_corpus(tmp_path / "file" / "python.jsonl")
