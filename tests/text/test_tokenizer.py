"""The tokenizer against the reference's settings, SentencePiece itself, and every Unicode string."""

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("LLAMA_JAX_SHARED", Path(__file__).parents[2] / ".." / "shared"))
STORIES = SHARED / "data" / "stories260K_hf_fp16"
CORPUS = [
    "In 2023 the quick brown fox jumped over 12345 lazy dogs.\n    def fox(dogs):\n        return dogs * 2\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – na ja.\n\n\tTabs and  two   three spaces",
    "吾輩は猫である。名前はまだ無い。\nThe rain in Spain stays mainly in the plain; the plain in Spain is plain.\n",
] * 20
# Every character but halves of surrogate pairs, and "▁", which the reference itself decodes to a space.
any_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.train(iter(CORPUS), path, vocab_size=500)


@pytest.fixture(scope="module")
def stories():
    if not STORIES.exists():
        pytest.skip(f"the shared tokenizer is not at {STORIES}; set LLAMA_JAX_SHARED")
    return Tokenizer.load(STORIES)


def proto(tokenizer):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.model_bytes)
    return model


def streamed(tokenizer, ids, **options):
    stream = tokenizer.stream(**options)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.finish()]


def test_the_trained_model_carries_the_papers_settings(tokenizer):
    model = proto(tokenizer)
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces
    assert trainer.model_type == trainer.BPE
    assert trainer.split_digits and trainer.byte_fallback and trainer.allow_whitespace_only_pieces
    assert trainer.split_by_unicode_script and trainer.split_by_whitespace and trainer.split_by_number
    assert trainer.character_coverage == pytest.approx(0.99995)
    assert (trainer.max_sentencepiece_length, trainer.max_sentence_length) == (16, 4192)
    assert trainer.input_sentence_size == 200_000_000
    assert trainer.unk_surface == " \u2047 "
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, 2, -1)


def test_the_vocabulary_is_laid_out_as_the_papers(tokenizer):
    pieces = proto(tokenizer).pieces
    assert tokenizer.vocab_size == len(pieces) == 500
    assert [p.piece for p in pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert [p.piece for p in pieces[3:259]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {p.type for p in pieces[3:259]} == {pieces[3].BYTE}
    assert {p.type for p in pieces[259:]} == {pieces[3].NORMAL}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_the_default_vocabulary_size_is_the_papers():
    assert Tokenizer.train.__defaults__ == (32_000,)


def test_the_shared_tokenizer_has_the_settings_that_ours_is_trained_with(tokenizer, stories):
    ours, theirs = proto(tokenizer), proto(stories)
    differing = {"vocab_size", "num_threads"}
    for spec, reference in ((ours.trainer_spec, theirs.trainer_spec), (ours.normalizer_spec, theirs.normalizer_spec)):
        names = [field.name for field in reference.DESCRIPTOR.fields if field.name not in differing | {"input_format"}]
        assert {name: getattr(spec, name) for name in names} == {name: getattr(reference, name) for name in names}


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_any_text_round_trips_and_streams(tokenizer, text):
    ids = tokenizer.encode(text, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == text
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 499) | st.sampled_from([0, 1, 2, 229, 133, 175]), max_size=30))
def test_decoding_any_ids_equals_sentencepiece_at_once_and_streamed(tokenizer, ids):
    reference = SentencePieceProcessor(model_proto=tokenizer.model_bytes).decode(ids)
    assert tokenizer.decode(ids) == reference
    assert "".join(streamed(tokenizer, ids)) == reference


@settings(max_examples=100, deadline=None)
@given(any_text)
def test_encoding_equals_sentencepiece(stories, text):
    reference = SentencePieceProcessor(model_proto=stories.model_bytes).encode(text)
    assert stories.encode(text, bos=False) == reference
    assert stories.encode(text, eos=True) == [1, *reference, 2]


def test_control_marks_in_the_text_are_text(tokenizer):
    ids = tokenizer.encode("<s>a</s>", bos=False)
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s>a</s>"


def test_nothing_encodes_to_nothing_and_digits_and_newlines_stand_alone(tokenizer):
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("\n", bos=False)[1:] == [13]
    space, *digits = tokenizer.encode("12345", bos=False)
    assert [tokenizer.decode([5, i])[1:] for i in (space, *digits)] == [" ", "1", "2", "3", "4", "5"]
    assert tokenizer.encode("🦙", bos=False)[1:] == [byte + 3 for byte in "🦙".encode()]


def test_whitespace_only_pieces_are_learned(tokenizer):
    assert any(p.piece == "\u2581" * 4 for p in proto(tokenizer).pieces)


def test_decode_drops_one_leading_space_only(tokenizer):
    assert tokenizer.decode(tokenizer.encode("  fox")) == "  fox"


def test_half_a_character_waits_and_is_replaced_only_at_the_end(tokenizer):
    llama = [byte + 3 for byte in "🦙".encode()]
    assert streamed(tokenizer, llama) == ["", "", "", "🦙", ""]
    assert streamed(tokenizer, llama[:3]) == ["", "", "", "\ufffd" * 3]


def test_a_stream_after_other_text_keeps_its_leading_space(tokenizer):
    whole = tokenizer.encode("fox the plain", bos=False)
    head, tail = whole[:3], whole[3:]
    joined = tokenizer.decode(head) + "".join(streamed(tokenizer, tail, continues=True))
    assert joined == "fox the plain"


@pytest.mark.parametrize("bad", [-1, 500, 10**12])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(UserError, match=f"{bad} is outside"):
        tokenizer.decode([5, bad])
    with pytest.raises(UserError, match=f"{bad} is outside"):
        tokenizer.stream().push(bad)


def test_the_file_reloads_to_the_same_tokenizer(tokenizer, path):
    for other in (Tokenizer.load(path), Tokenizer.load(path.parent), pickle.loads(pickle.dumps(tokenizer))):
        assert other.sha256 == tokenizer.sha256
        assert other.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.model"]


def test_training_twice_gives_the_same_bytes(tokenizer, tmp_path):
    assert Tokenizer.train(CORPUS, tmp_path / "again.model", vocab_size=500).sha256 == tokenizer.sha256


def test_a_line_longer_than_the_trainer_accepts_is_still_learned_from(tmp_path):
    trained = Tokenizer.train(["wxyz " * 4000], tmp_path / "t.model", vocab_size=268)
    assert len(trained.encode("wxyz", bos=False)) == 1


def test_too_large_a_vocabulary_names_the_largest_possible(tmp_path):
    with pytest.raises(UserError, match=r"at most (\d+) pieces") as caught:
        Tokenizer.train(["hello there"] * 5, tmp_path / "t.model")
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert Tokenizer.train(["hello there"] * 5, tmp_path / "t.model", vocab_size=largest).vocab_size == largest
    with pytest.raises(UserError, match="at most"):
        Tokenizer.train(["hello there"] * 5, tmp_path / "t.model", vocab_size=largest + 1)


def failing_texts():
    yield "a first line"
    raise UserError("corpus.jsonl, line 7: not JSON")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "No text"),
        (["", "\n"], "No text"),
        (["héllo"], "too small: .*--vocab-size 26"),
        (failing_texts(), "line 7"),
    ],
)
def test_texts_that_cannot_be_trained_on(texts, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Tokenizer.train(texts, tmp_path / "t.model", vocab_size=260)
    assert not list(tmp_path.iterdir())


def test_missing_and_broken_model_files(tmp_path):
    with pytest.raises(UserError, match=r"No tokenizer at .*tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="U\\+D800, at character 1"):
        tokenizer.encode("a\ud800")
