"""Log-probabilities of given tokens: those of the full forward pass, whatever shares a batch with them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.errors import UserError
from llama_jax.generation import scoring
from llama_jax.generation.llama import Llama
from llama_jax.generation.scoring import Score, score_batch
from llama_jax.model.transformer import init, shardings
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.loss import token_loss
from tests.stories260k import FOLDER, load_stories260k

FP32 = Compute(dtype="float32", remat="none")
TEXTS = ["the cat sat", "who", "the dog sat by the door and the cat on the mat", "that it could be so", "a mat"]


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Llama:
    return Llama(model, tokenizer)


@pytest.fixture(scope="module")
def full_log_probs(model):
    run = jax.jit(lambda model, tokens_BT: jax.nn.log_softmax(model(tokens_BT, compute=FP32)))

    def log_probs(ids: list[int]) -> np.ndarray:
        """(T, V) of one text."""
        return np.asarray(run(model, np.array([ids + [0] * (64 - len(ids))])))[0, : len(ids)]

    return log_probs


def random_ids(tokenizer, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[tokenizer.bos_id, *rng.integers(3, 300, length - 1).tolist()] for length in lengths]


def test_log_probabilities_are_those_of_the_full_forward(engine, tokenizer, full_log_probs):
    rows = [tokenizer.encode(text) for text in TEXTS] + random_ids(tokenizer, 64, 63, 33, 17, 16, 2)
    scored = engine.logprobs([*TEXTS, *rows[len(TEXTS) :]])
    for ids, got in zip(rows, scored, strict=True):
        want = full_log_probs(ids)[np.arange(len(ids) - 1), ids[1:]]
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_text_does_not_depend_on_the_others(engine, tokenizer, monkeypatch):
    rows = random_ids(tokenizer, *range(2, 65, 9)) * 2
    together = engine.logprobs(rows)
    shuffled = engine.logprobs(rows[::-1])[::-1]
    for name, size in (("BATCH_TOKENS", 1), ("BATCH_TOKENS", 150), ("LOGIT_TOKENS", 7)):
        monkeypatch.setattr(scoring, name, size)
        for got, want, again in zip(engine.logprobs(rows), together, shuffled, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
            np.testing.assert_allclose(again, want, atol=1e-5)


def test_every_text_begins_with_bos(engine, tokenizer):
    ids = tokenizer.encode("the cat", bos=False)
    text, bare, whole = engine.logprobs(["the cat", ids, [tokenizer.bos_id, *ids]])
    assert np.array_equal(text, bare) and np.array_equal(text, whole) and len(text) == len(ids)
    assert [a.shape for a in engine.logprobs(["", [], [tokenizer.bos_id]])] == [(0,)] * 3
    assert engine.logprobs([]) == [] and engine.score([]) == []


def test_scores_are_sums_over_the_continuation(engine, tokenizer):
    for prompt, continuation in (("the cat", " sat on the mat"), ("", "who"), ("who would", "")):
        whole, start = tokenizer.encode(prompt + continuation), len(tokenizer.encode(prompt))
        score = engine.score([(prompt, continuation)])[0]
        assert score.n_tokens == len(whole) - start
        want = engine.logprobs([prompt + continuation])[0][start - 1 :].astype(float)
        assert score.log_prob == pytest.approx(want.sum(), abs=1e-5)
        assert score == engine.score([(whole[:start], whole[start:])])[0]
    assert engine.score([("who would", "")])[0] == Score(0.0, 0, True)


def test_white_space_at_the_border_belongs_to_the_continuation(engine):
    want = engine.score([("the cat", " sat")])[0]
    assert engine.score([("the cat ", "sat")])[0] == want and want.n_tokens > 0
    assert engine.score([(" \n", "sat")])[0] == engine.score([("", " \nsat")])[0]
    # Joined without a space it is another text.
    assert engine.score([("the cat", "sat")])[0] != want


def test_greedy_is_what_temperature_0_gives(engine, tokenizer):
    prompts = [tokenizer.encode(text) for text in TEXTS]
    completions = engine.generate(prompts, temperature=0, max_new_tokens=12)
    pairs = [(ids, completion.ids) for ids, completion in zip(prompts, completions, strict=True)]
    assert all(len(ids) == 12 for _, ids in pairs)
    assert all(score.is_greedy for score in engine.score(pairs))
    for place in (0, 5, 11):
        others = [(ids, [*new[:place], new[place] ^ 1, *new[place + 1 :]]) for ids, new in pairs]
        assert not any(score.is_greedy for score in engine.score(others))


def test_of_equally_likely_tokens_the_lowest_is_greedy(model, tokenizer):
    flat = Llama(jax.tree.map(jnp.zeros_like, model), tokenizer)
    assert flat.generate([""], temperature=0, max_new_tokens=2)[0].ids == [0, 0]
    assert [score.is_greedy for score in flat.score([([], [0, 0]), ([], [0, 1]), ([], [5])])] == [True, False, False]
    assert flat.score([([], [5, 6])])[0].log_prob == pytest.approx(-2 * np.log(304), rel=1e-6)


def test_what_does_not_fit_is_refused(engine, tokenizer):
    """65 tokens fit a context of 64: the last is only predicted."""
    longest, longer = random_ids(tokenizer, 65, 66)
    assert len(engine.logprobs([longest])[0]) == 64
    with pytest.raises(UserError, match="the text has 66 tokens and the model's context 64"):
        engine.logprobs(["the", longer])
    with pytest.raises(UserError, match="the text has 66 tokens and the model's context 64"):
        engine.score([(longer[:40], longer[40:])])
    with pytest.raises(UserError, match="the prompt has 66 tokens"):
        engine.score([(longer, [])])
    with pytest.raises(UserError, match="text token 304 is outside the vocabulary, 0 to 303"):
        engine.logprobs([[304]])
    with pytest.raises(UserError, match="two kinds"):
        engine.score([("the", [5])])


@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "context=4,tensor=2"])
def test_a_mesh_changes_nothing(model, engine, tokenizer, layout: str):
    sharded = Llama(jax.device_put(model, shardings(model.config, make_mesh(layout))), tokenizer)
    rows = random_ids(tokenizer, 65, 40, 7)
    for got, want in zip(sharded.logprobs(rows), engine.logprobs(rows), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_few_programs_are_compiled(engine, tokenizer):
    """192 texts of 64 lengths are padded to three; the last batch of the longest has half the rows."""
    before = score_batch._cache_size()
    engine.logprobs(random_ids(tokenizer, *range(2, 66)) * 3)
    assert score_batch._cache_size() <= before + 4


def test_the_logits_of_all_tokens_never_exist(model, monkeypatch):
    """2048 tokens of a vocabulary of 8000 have 66 MB of float32 logits; the program's temporaries are a fraction."""
    config = replace(model.config, vocab_size=8000, context_length=256)
    tokens_BT = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    model = jax.eval_shape(lambda: init(config, jax.random.key(0)))

    def temporaries(at_once: int) -> int:
        monkeypatch.setattr(scoring, "LOGIT_TOKENS", at_once)
        program = jax.jit(lambda *arrays: score_batch.__wrapped__(*arrays)).lower(model, tokens_BT, tokens_BT)
        return program.compile().memory_analysis().temp_size_in_bytes

    whole = 8 * 256 * 8000 * 4
    assert temporaries(8 * 256) > whole
    assert temporaries(256) < whole / 3


def test_sums_over_stories_are_the_loss(shared):
    model, tokenizer = load_stories260k(shared), Tokenizer.load(shared / FOLDER)
    texts = (shared / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:8]
    rows = [tokenizer.encode(text.strip())[: 512 - 7 * i] for i, text in enumerate(texts)]
    tokens_BT = np.array([ids + [0] * (513 - len(ids)) for ids in rows])
    is_target_BT = np.arange(512) < np.array([[len(ids) - 1] for ids in rows])

    @jax.jit
    def loss(model, tokens_BT, is_target_BT):
        x_BTD = model.hidden(tokens_BT[:, :-1], compute=FP32)
        return token_loss(x_BTD, model.output_head(), tokens_BT[:, 1:], is_target_BT.astype(jnp.float32), 128).nats

    log_probs = Llama(model, tokenizer).logprobs(rows)
    assert sum(map(len, log_probs)) == is_target_BT.sum() > 1500
    total = sum(a.sum(dtype=np.float64) for a in log_probs)
    assert -total == pytest.approx(float(loss(model, tokens_BT, is_target_BT)), rel=1e-5)
