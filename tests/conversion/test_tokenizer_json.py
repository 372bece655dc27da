"""The tokenizer.json of an export gives the same ids and texts as the SentencePiece model it was made from."""

import json
import random
from pathlib import Path

import pytest

from llama_jax.conversion import tokenizer_json as module
from llama_jax.conversion.tokenizer_json import SPACE, tokenizer_config, tokenizer_json
from llama_jax.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="Hugging Face's tokenizers are the other side")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    """A tokenizer of Python's own sources, which are full of runs of spaces."""
    text = Path(random.__file__).read_text() + Path(json.__file__).read_text()
    return Tokenizer.train([text], tmp_path_factory.mktemp("trained") / "tokenizer.model", vocab_size=1200)


@pytest.fixture(scope="module")
def tied(trained) -> Tokenizer:
    """The same with every run of spaces at one lowest score, as Llama 2's own model has them."""
    pytest.importorskip("google.protobuf", reason="to change scores inside a SentencePiece model")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(trained.model_bytes)
    runs = [piece for piece in model.pieces if set(piece.piece) == {SPACE}]
    assert len(runs) > 5
    for piece in runs:
        piece.score = -1e9
    return Tokenizer(model.SerializeToString())


def texts() -> list[str]:
    """Sources, stray spaces, digits, characters without a piece, and noise."""
    rng = random.Random(0)
    source = Path(random.__file__).read_text()
    cuts = [source[i : i + rng.randrange(300)] for i in (rng.randrange(len(source)) for _ in range(300))]
    alphabet = " \n\tabcdefghijklmnopqrstuvwxyz0123456789.,!?\u00e9\u00fc\u4e2d\u6587\U0001f999\u2581<>"
    noise = ["".join(rng.choice(rng.choice((alphabet, "  ab"))) for _ in range(rng.randrange(60))) for _ in range(700)]
    spaces = [" " * n + "a" + " " * (40 - n) + "b" for n in range(40)]
    return ["", " ", "  two  spaces", "Hello  ", "a\nb", "12345 \u00e9 \U0001f999", *cuts, *noise, *spaces]


def loaded(tokenizer: Tokenizer, folder):
    """The export's files through AutoTokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, 512)))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("which", ["trained", "tied"])
def test_every_text_has_the_same_ids_and_comes_back_the_same(which, request, tmp_path):
    ours = request.getfixturevalue(which)
    theirs = loaded(ours, tmp_path / which)
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    assert theirs.model_max_length == 512 and theirs.eos_token_id == ours.eos_id


def test_ties_in_the_order_of_ids_would_not_do(tied, tmp_path, monkeypatch):
    """The mutant: pieces of one score merged in the order of their ids, which runs of spaces bring to light."""

    def by_id(pieces: list[tuple[str, float]]) -> list[list[str]]:
        names = [piece for piece, _ in pieces]
        ranked = sorted(range(len(pieces)), key=lambda i: (-pieces[i][1], i))
        cuts = ((names[i][:cut], names[i][cut:]) for i in ranked for cut in range(1, len(names[i])))
        return [list(pair) for pair in cuts if set(pair) <= set(names)]

    monkeypatch.setattr(module, "_merges", by_id)
    theirs = loaded(tied, tmp_path / "mutant")
    assert any(theirs(text)["input_ids"] != tied.encode(text) for text in texts())


def test_tokenizer_model_alone_is_not_enough(trained, tmp_path):
    """Why the json is there: from tokenizer.model, transformers leaves out the dummy space before a leading space."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(trained.model_bytes)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a")["input_ids"] == trained.encode("a")
    assert theirs(" a")["input_ids"] != trained.encode(" a")
