"""Drawing: the support is the reference's, the frequencies are the probabilities, and the log-probabilities are those drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.generation import sampler
from llama_jax.generation.sampler import Sampling, categorical, log_probs, sample

V = 12
jitted_log_probs = jax.jit(log_probs)
jitted_sample = jax.jit(sample)


def reference(logits_V: np.ndarray, sampling: Sampling, slack: float = 0.0) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, by sorting, in float64; `slack` moves the nucleus' edge."""
    scaled_V = logits_V.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits_V, kind="stable")
    if sampling.top_k:
        scaled_V[order[sampling.top_k :]] = -np.inf
    probs_V = np.exp(scaled_V - scaled_V.max())
    probs_V /= probs_V.sum()
    before = 0.0
    for place, i in enumerate(order):
        probability = probs_V[i]
        if place > 0 and sampling.top_p < 1 and before > sampling.top_p + slack:
            probs_V[i] = 0.0
        before += probability
    return probs_V / probs_V.sum()


# Halves, so that ties are frequent.
LOGITS = st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=V, max_size=V).map(
    lambda x: np.array(x, np.float32)
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.125, 5.0, width=32),
    top_p=st.one_of(st.floats(0, 1, width=32), st.just(1.0)),
    top_k=st.integers(0, V + 2),
)


@settings(deadline=None, max_examples=400)
@given(LOGITS, SAMPLINGS)
def test_support_and_log_probabilities_equal_the_slow_definition(logits_V: np.ndarray, sampling: Sampling):
    tight, wide = reference(logits_V, sampling, -1e-5), reference(logits_V, sampling, 1e-5)
    got_V = np.asarray(jitted_log_probs(logits_V[None], sampling))[0]
    support = np.isfinite(got_V)
    assert np.all(support >= (tight > 0)) and np.all(support <= (wide > 0))
    if np.array_equal(
        tight > 0, wide > 0
    ):  # else the nucleus ends within float32's rounding of p, and either side is right
        np.testing.assert_allclose(got_V[support], np.log(reference(logits_V, sampling)[support]), atol=2e-5)
    assert abs(np.exp(got_V).sum() - 1) < 1e-5


def test_top_p_keeps_the_token_that_crosses_p_and_drops_the_next():
    """Hand-computed: before the tokens lie 0, 0.5, 0.8, 0.95; p = 0.8 keeps three of them, as 0.8 does not exceed 0.8."""
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]], np.float32))
    for top_p, kept in {0.0: [1], 0.49: [1], 0.51: [1, 3], 0.79: [1, 3], 0.81: [0, 1, 3], 0.96: [0, 1, 2, 3]}.items():
        got = np.asarray(jitted_log_probs(logits, Sampling(1.0, top_p, 0)))[0]
        assert np.flatnonzero(np.isfinite(got)).tolist() == kept, top_p


def test_equal_logits_are_kept_from_the_lowest_id_on():
    same = np.zeros((1, V), np.float32)
    assert np.isfinite(jitted_log_probs(same, Sampling(1.0, 1.0, 5)))[0].tolist() == [True] * 5 + [False] * (V - 5)
    # A twelfth each: before the seventh lies exactly one half.
    assert np.isfinite(jitted_log_probs(same, Sampling(1.0, 0.51, 0)))[0].tolist() == [True] * 7 + [False] * (V - 7)


def test_top_k_comes_before_top_p():
    """Of 0.4, 0.3, 0.2, 0.1 the two likeliest hold 4/7 and 3/7, so p = 0.5 leaves one; without top-k it would leave two."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    assert np.isfinite(jitted_log_probs(logits, Sampling(1.0, 0.5, 2)))[0].tolist() == [True, False, False, False]
    assert np.isfinite(jitted_log_probs(logits, Sampling(1.0, 0.5, 0)))[0].tolist() == [True, True, False, False]


def test_a_whole_vocabulary_at_its_real_size():
    logits_V = np.random.default_rng(0).normal(0, 3, 32_000).astype(np.float32)
    for sampling in (Sampling(0.6, 0.9, 0), Sampling(1.0, 0.999, 0), Sampling(2.0, 0.5, 1000), Sampling(1.0, 1.0, 0)):
        got = np.asarray(jitted_log_probs(logits_V[None], sampling))[0]
        tight, wide = (reference(logits_V, sampling, slack) > 0 for slack in (-1e-5, 1e-5))
        assert tight.sum() <= np.isfinite(got).sum() <= wide.sum()
        assert wide.sum() - tight.sum() <= 0.01 * wide.sum() + 1


def keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def chi_square(counts_V: np.ndarray, probs_V: np.ndarray) -> float:
    expected_V = counts_V.sum() * probs_V
    return float(((counts_V - expected_V)[probs_V > 0] ** 2 / expected_V[probs_V > 0]).sum())


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0, 0), Sampling(0.6, 0.9, 0), Sampling(2.0, 1.0, 5)])
def test_frequencies_are_the_probabilities(sampling: Sampling):
    n, logits_V = 40_000, np.random.default_rng(3).normal(0, 1.0, V).astype(np.float32)
    token_B, log_prob_B = jitted_sample(np.tile(logits_V, (n, 1)), keys(n), sampling)
    counts_V, probs_V = np.bincount(token_B, minlength=V), reference(logits_V, sampling)
    assert counts_V[probs_V == 0].sum() == 0
    assert chi_square(counts_V, probs_V) < 31.3  # exceeded once in a thousand at 11 degrees of freedom
    np.testing.assert_allclose(log_prob_B, np.log(probs_V[token_B]), atol=1e-5)
    # The same draws do not fit a temperature 10% higher: the test can fail.
    hotter_V = reference(logits_V, sampling._replace(temperature=1.1 * sampling.temperature))
    assert chi_square(counts_V, hotter_V) > 31.3


def test_temperature_zero_is_argmax_with_certainty():
    logits_BV = np.random.default_rng(0).normal(size=(50, V)).astype(np.float32)
    for sampling in (Sampling(0.0, 0.9, 0), Sampling(0.0, 1.0, 3)):
        token_B, log_prob_B = jitted_sample(logits_BV, keys(50), sampling)
        np.testing.assert_array_equal(token_B, logits_BV.argmax(-1))
        assert (np.asarray(log_prob_B) == 0).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-44, 1e30])
def test_extreme_temperatures_give_numbers(temperature: float):
    logits_BV = np.random.default_rng(0).normal(0, 50, (50, V)).astype(np.float32)
    token_B, log_prob_B = jitted_sample(logits_BV, keys(50), Sampling(temperature, 0.9, 0))
    assert np.isfinite(log_prob_B).all()
    if temperature < 1:
        np.testing.assert_array_equal(token_B, logits_BV.argmax(-1))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-23])
def test_the_ends_of_the_uniform_distribution_stay_inside_the_support(monkeypatch, u: float):
    """Also where the sum over a vocabulary rounds: a token of probability 0 is never drawn."""
    monkeypatch.setattr(sampler.jax.random, "uniform", lambda key, shape: jnp.full(shape, u))
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits_V = np.where(rng.random(32_000) < 0.5, rng.normal(0, 4, 32_000), -np.inf).astype(np.float32)
        token = int(categorical(keys(1), jax.nn.log_softmax(logits_V)[None])[0])
        inside = np.flatnonzero(np.isfinite(logits_V))
        assert token in inside
        assert token == inside[0] if u == 0 else token > inside[len(inside) // 2]


def test_rows_draw_by_their_own_key_alone():
    logits_BV = np.random.default_rng(0).normal(size=(64, V)).astype(np.float32)
    token_B, _ = jitted_sample(logits_BV, keys(64), Sampling(1.0, 1.0, 0))
    for row in range(0, 64, 7):
        alone, _ = jitted_sample(logits_BV[row : row + 1], keys(64)[row : row + 1], Sampling(1.0, 1.0, 0))
        assert alone[0] == token_B[row]
    same_B, _ = jitted_sample(np.tile(logits_BV[:1], (64, 1)), keys(64), Sampling(1.0, 1.0, 0))
    assert len(set(np.asarray(same_B).tolist())) > V // 2


def test_another_setting_is_no_other_program():
    draw, logits_BV = jax.jit(lambda *a: sample(*a)), np.zeros((2, V), np.float32)
    for sampling in (Sampling(0.0, 0.9, 0), Sampling(0.7, 0.5, 3), Sampling(1.3, 1.0, 40)):
        draw(logits_BV, keys(2), sampling)
    assert draw._cache_size() == 1
