"""Self-BLEU: its ends, what it must not depend on, its value by hand, and that it falls with the temperature."""

import math
import random
import sys

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.diversity import self_bleu

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "it",
    "rained",
    "and",
    "no",
    "dog",
    "came",
    "by",
    "to",
    "see",
    "why",
)


def scripted(temperature: float, seed: int, samples: int = 12, length: int = 10) -> list[str]:
    """Texts of a model that prefers one word at each place, and the others as the temperature lets it."""
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(scale=2.0, size=(length, len(WORDS))) / temperature)
    shares = weights / weights.sum(-1, keepdims=True)
    return [" ".join(WORDS[rng.choice(len(WORDS), p=share)] for share in shares) for _ in range(samples)]


def test_equal_texts_score_100_of_any_length():
    for text in ("the cat sat on the mat and slept", "yes", "", " \n"):
        assert self_bleu([text] * 5) == 100


def test_texts_that_share_no_word_score_0():
    assert self_bleu(["one two three four", "five six seven eight", "nine ten"]) == 0
    assert self_bleu(["", "one two", "three"]) == 0


def test_white_space_is_no_difference():
    assert self_bleu(["the cat  sat\n", "the cat sat"]) == 100


def test_the_value_worked_out_by_hand():
    """The first text has 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 fours of the second, at equal length."""
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(expected)
    # The long text has 2 of 4 words, 1 of 3 pairs, and then none, which the smoothing counts as 1/2 of 2 and 1/4 of 1;
    # the short one has all its words and pairs, and is punished for its length by exp(1 - 4/2).
    long = 100 * (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
    assert self_bleu(["a b c d", "a b"]) == pytest.approx((long + 100 * math.exp(-1)) / 2)


def test_the_order_of_the_samples_does_not_count():
    texts = scripted(0.7, seed=0)
    values = set()
    for seed in range(5):
        random.Random(seed).shuffle(texts)
        values.add(self_bleu(texts))
    assert len(values) == 1 and 0 < values.pop() < 100


@pytest.mark.parametrize("seed", range(3))
def test_it_falls_with_the_temperature(seed):
    scores = [self_bleu(scripted(temperature, seed)) for temperature in (0.05, 0.2, 0.4, 0.8)]
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[-1] > 30


def test_one_text_is_not_enough():
    with pytest.raises(UserError, match="got 1; give it at least 2 samples"):
        self_bleu(["alone"])


def test_without_sacrebleu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match="pip install sacrebleu"):
        self_bleu(["a", "b"])
