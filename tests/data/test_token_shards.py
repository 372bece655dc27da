"""Token shards: the same files after any interruption, and never read with another tokenizer."""

import json

import numpy as np
import pytest

from llama_jax.data.documents import tokenize
from llama_jax.data.sources import open_source
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer


def quiet(line: str) -> None:
    """Takes the place of print."""


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_shards_have_the_size_asked_for_and_the_smallest_type(specs, texts, tokenizer, tmp_path):
    index = tokenize((specs["jsonl"],), tokenizer, tmp_path / "shards", shard_tokens=500, say=quiet)
    longest = max(len(tokenizer.encode(text, eos=True)) for text in texts)
    sizes = [shard["tokens"] for shard in index["shards"]]
    assert all(500 <= size < 500 + longest for size in sizes[:-1]) and len(sizes) > 4
    assert sum(shard["documents"] for shard in index["shards"]) == len(texts)
    assert index["tokenizer_sha256"] == tokenizer.sha256 and index["vocab_size"] == tokenizer.vocab_size
    assert np.load(tmp_path / "shards" / "00000.tokens.npy", mmap_mode="r").dtype == np.uint16


@pytest.mark.parametrize("after_shards", [0, 1, 3])
def test_an_interrupted_run_goes_on_and_leaves_the_same_files(specs, tokenizer, tmp_path, after_shards):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tokenize((specs["text"], specs["gz"]), tokenizer, whole, shard_tokens=900, say=quiet)
    said = []

    class Killed(BaseException):
        pass

    class DyingTokenizer(Tokenizer):
        left = 40 * after_shards + 10

        def encode(self, text, **options):
            self.left -= 1
            if not self.left:
                raise Killed
            return super().encode(text, **options)

    with pytest.raises(Killed):
        tokenize(
            (specs["text"], specs["gz"]),
            DyingTokenizer(tokenizer.model_bytes),
            parts,
            shard_tokens=900,
            say=said.append,
        )
    assert len(said) >= after_shards and all("eta" in line for line in said)
    if said:
        with pytest.raises(UserError, match="not finished"):
            open_source(f"tokens:{parts}", tokenizer)
    tokenize((specs["text"], specs["gz"]), tokenizer, parts, shard_tokens=900, say=quiet)
    assert contents(parts) == contents(whole)
    before = contents(parts)
    tokenize((specs["text"], specs["gz"]), tokenizer, parts, shard_tokens=900, say=said.append)
    assert contents(parts) == before and "complete already" in said[-1]


def test_workers_write_the_same_files(specs, tokenizer, tmp_path):
    for name, workers in (("none", 0), ("two", 2)):
        tokenize((specs["text"],), tokenizer, tmp_path / name, shard_tokens=900, workers=workers, say=quiet)
    assert contents(tmp_path / "none") == contents(tmp_path / "two")


def test_large_vocabularies_take_four_bytes(specs, texts, tokenizer, tmp_path):
    class Wide(Tokenizer):
        def __init__(self, model_bytes):
            super().__init__(model_bytes)
            self.vocab_size = 70_000

        def encode(self, text, **options):
            return [i + 69_000 for i in super().encode(text, **options)]

    wide = Wide(tokenizer.model_bytes)
    tokenize((specs["text"],), wide, tmp_path / "shards", say=quiet)
    ids = open_source(f"tokens:{tmp_path}/shards", wide)[3]
    assert ids.dtype == np.uint32 and ids.tolist() == wide.encode(texts[3], eos=True)


def test_another_tokenizer_or_recipe_is_refused(specs, texts, tokenizer, tmp_path):
    other = Tokenizer.train(texts, tmp_path / "other.model", vocab_size=300)
    with pytest.raises(UserError, match=f"made with another tokenizer .*vocabulary 330.*{other.sha256[:12]}, 300"):
        open_source(specs["tokens"], other)
    tokenize((specs["text"],), tokenizer, tmp_path / "shards", shard_tokens=500, say=quiet)
    with pytest.raises(UserError, match=r"another recipe: shard_tokens 500, now 600\. Choose another --out"):
        tokenize((specs["text"],), tokenizer, tmp_path / "shards", shard_tokens=600, say=quiet)
    with pytest.raises(UserError, match="another recipe: tokenizer_sha256"):
        tokenize((specs["text"],), other, tmp_path / "shards", shard_tokens=500, say=quiet)


def test_damaged_folders_are_refused(specs, tokenizer, tmp_path):
    tokenize((specs["text"],), tokenizer, tmp_path, shard_tokens=500, say=quiet)
    (tmp_path / "00000.tokens.npy").unlink()
    with pytest.raises(UserError, match=r"Cannot read shard .*00000\.tokens\.npy"):
        open_source(f"tokens:{tmp_path}", tokenizer)[0]
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="Cannot read"):
        open_source(f"tokens:{tmp_path}", tokenizer)


def test_nothing_to_tokenise_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(UserError, match="all 1 documents of .* are empty"):
        tokenize((f"jsonl:{tmp_path}/empty.jsonl",), tokenizer, tmp_path / "shards", say=quiet)
