"""Each kind of source gives the documents that were put in, and says what is wrong with those that cannot."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.files import PIECE_BYTES, JsonLines, TextFiles
from llama_jax.data.sources import open_source
from llama_jax.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["text", "jsonl", "gz", "zst", "tfds"])
def test_every_source_gives_every_text_in_any_order_also_after_pickling(specs, texts, tokenizer, kind):
    for source in (opened := open_source(specs[kind], tokenizer), pickle.loads(pickle.dumps(opened))):
        found = [source[index] for index in reversed(range(len(source)))][::-1]
        assert (sorted(found) if kind == "tfds" else found) == (sorted(texts) if kind == "tfds" else texts)


def test_token_shards_give_the_ids_of_every_text_between_bos_and_eos(specs, texts, tokenizer):
    source = open_source(specs["tokens"], tokenizer)
    assert [ids.tolist() for ids in map(source.__getitem__, range(len(source)))] == [
        tokenizer.encode(text, eos=True) for text in texts
    ]


def test_tfds_splits_versions_and_parts(specs, texts, tokenizer):
    assert len(open_source("tfds:rainy_plains:test", tokenizer)) == 3
    assert len(open_source("tfds:rainy_plains:1.0.0:train[:10%]", tokenizer)) == 12
    assert len(open_source("tfds:rainy_plains:1.0.0", tokenizer)) == len(texts)


def test_reading_tfds_does_not_import_tensorflow(specs):
    program = (
        "import sys; from llama_jax.data.sources import open_source\n"
        f"print(len(open_source({specs['tfds']!r}, None)), 'tensorflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.check_output([sys.executable, "-W", "ignore", "-c", program], text=True, env=environment)
    assert found == "120 False\n"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<\r"), max_size=20), max_size=8))
def test_separated_texts_come_back_exactly(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("text") / "t.txt"
    wanted = [text + "\n" for text in texts]
    file.write_bytes("<|endoftext|>\n".join([*wanted, ""]).encode())
    found = TextFiles(str(file)) if wanted else []
    assert list(map(found.__getitem__, range(len(found)))) == wanted


def test_separators_count_only_as_lines_of_their_own(tmp_path):
    (tmp_path / "t.txt").write_bytes(
        b"<|endoftext|>\r\none <|endoftext|> one\n<|endoftext|> one\n<|endoftext|>\r\n\n<|endoftext|>"
    )
    found = TextFiles(str(tmp_path / "t.txt"))
    assert list(map(found.__getitem__, range(len(found)))) == ["one <|endoftext|> one\n<|endoftext|> one\n", "\n"]


@pytest.mark.parametrize(
    "line", ["a line of text, 31 characters.\n", "é" * 7_001 + "\n", "x" * 12_345 + "\n", "🦙" * 200_000]
)
def test_files_without_separators_become_pieces_that_keep_every_byte(tmp_path, line):
    text = line * max(1, 100_000 // len(line))
    (tmp_path / "t.txt").write_text(text)
    found = TextFiles(str(tmp_path / "t.txt"))
    pieces = list(map(found.__getitem__, range(len(found))))
    assert "".join(pieces) == text
    sizes = [len(piece.encode()) for piece in pieces]
    assert all(PIECE_BYTES <= size <= 8 * PIECE_BYTES for size in sizes[:-1]) and len(sizes) > 5
    if "\n" in line:
        assert all(piece.endswith("\n") for piece in pieces)


def test_real_text_comes_back_whole(shared):
    for name, between in (("tinystories_sample.txt", "<|endoftext|>\n"), ("tinyshakespeare.txt", "")):
        found = TextFiles(str(shared / name))
        assert len(found) > 100
        assert between.join(map(found.__getitem__, range(len(found)))) == (shared / name).read_text().removesuffix(
            between
        )


def test_a_glob_takes_files_in_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "empty.txt").touch()
    found = TextFiles(str(tmp_path / "*.txt"))
    assert list(map(found.__getitem__, range(len(found)))) == ["a", "b", "c"]


def test_bytes_that_are_no_text_are_replaced(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_bytes(b"caf\xe9\n")
    assert TextFiles(str(tmp_path / "t.txt"))[0] == "caf\ufffd\n"
    (tmp_path / "t.jsonl").write_text('{"text": "half \\ud83e, whole \\ud83e\\udd99"}')
    text = JsonLines(str(tmp_path / "t.jsonl"))[0]
    assert text == "half \ufffd, whole 🦙"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_json_lines_skip_blank_lines_and_take_the_named_field(tmp_path, tokenizer):
    (tmp_path / "t.jsonl").write_bytes(b'\n{"body": "one"}\r\n  \n\r\n{"body": "two\\n"}')
    source = open_source(f"jsonl:{tmp_path}/t.jsonl#body", tokenizer)
    assert [source[0], source[1]] == ["one", "two\n"] and len(source) == 2


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_are_unpacked_once_and_again_when_they_change(tmp_path, cache, suffix):
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    file = tmp_path / f"t.jsonl.{suffix}"
    file.write_bytes(compress(b'{"text": "first"}\n'))
    assert JsonLines(str(file))[0] == "first"
    (unpacked,) = (cache / "unpacked").iterdir()
    unpacked.write_text('{"text": "kept"}\n')
    assert JsonLines(str(file))[0] == "kept"
    file.write_bytes(compress(b'{"text": "and second"}\n'))
    assert JsonLines(str(file))[0] == "and second"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"no such format", lambda packed: b""])
def test_damaged_compressed_files_are_refused(tmp_path, cache, suffix, damage):
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    # Over a megabyte that does not compress, so that a part of it unpacks before the damage shows.
    lines = "".join(json.dumps({"text": os.urandom(600).hex()}) + "\n" for number in range(2000)).encode()
    (tmp_path / f"t.jsonl.{suffix}").write_bytes(damage(compress(lines)))
    with pytest.raises(UserError, match=r"damaged|Nothing to read"):
        JsonLines(str(tmp_path / f"t.jsonl.{suffix}"))
    assert not [file for file in (cache / "unpacked").iterdir() if file.stat().st_size]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:{}/missing.txt", r"No file matches .*missing\.txt"),
        ("text:{}", r"It is a folder: use .*/\*"),
        ("text:{}/empty.txt", r"Nothing to read in .*empty\.txt"),
        ("jsonl:{}/empty.txt", r"Nothing to read in .*empty\.txt"),
        ("jsonl:{}/list.jsonl", r"list\.jsonl, line 1 has no text in field 'text' but list"),
        ("jsonl:{}/other.jsonl", r"other\.jsonl, line 2 has no text in field 'text' but the fields body, id"),
        ("jsonl:{}/broken.jsonl", r"broken\.jsonl, line 1 is not JSON"),
        ("tfds:no_such_set", r"no dataset no_such_set is known.*download_and_prepare"),
        ("tfds:rainy_plains:valid", r"Unknown split .valid.. Should be one of \[.train., .test.\]"),
        ("tfds:rainy_plains#body", r"no text in field 'body'; its fields are text"),
        ("tokens:{}", r"No token shards in .*llama-jax tokenize"),
        (
            "txt:corpus.txt",
            r"Expected SCHEME:NAME with one of text, jsonl, tfds, hf, tokens. Did you mean text:corpus\.txt",
        ),
        ("corpus.txt", r"is no data source.*For example text:corpus\.txt"),
        ("{}/empty.txt", r"For files of text: text:.*empty\.txt"),
        ("text:", r"is no data source"),
    ],
)
def test_sources_that_cannot_be_opened_say_why(specs, tokenizer, tmp_path, spec, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "other.jsonl").write_text('\n{"id": 1, "body": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n')
    with pytest.raises(UserError, match=message):
        open_source(spec.format(tmp_path), tokenizer)


def test_a_tfds_set_in_another_format_is_refused_with_the_remedy(specs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = tmp_path / "rows" / "1.0.0"
    folder.mkdir(parents=True)
    info = {
        "name": "rows",
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": ["1"]}],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    feature = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"text": feature}},
    }
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=r"stored as tfrecord.*file_format='array_record'"):
        open_source("tfds:rows", tokenizer)


def test_hugging_face_sets_without_the_library_say_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_source("hf:roneneldan/TinyStories", tokenizer)


@pytest.mark.filterwarnings("ignore")  # the library's own, when it hashes and pickles
def test_hugging_face_sets_from_a_folder(texts, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    lines = tmp_path / "t.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = datasets.load_dataset("json", data_files={"train": str(lines)}, cache_dir=str(tmp_path / "cache"))
    made.save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path}/set", tokenizer)
    assert [source[index] for index in range(len(source))] == texts
    assert pickle.loads(pickle.dumps(source))[5] == texts[5]
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        open_source(f"hf:{tmp_path}/set:test", tokenizer)
    with pytest.raises(UserError, match="no text in field 'body'"):
        open_source(f"hf:{tmp_path}/set#body", tokenizer)
