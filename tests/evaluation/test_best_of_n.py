"""Best of N: the estimators are the means over all subsets, the report is of the samples, and with replacement they differ."""

import itertools
import json
import math

import numpy as np
import pytest

from llama_jax.data.samples import SAMPLES
from llama_jax.errors import UserError
from llama_jax.evaluation.best_of_n import (
    Curves,
    best_of_n,
    best_temperature,
    curves_table,
    rank_weights,
    write_rejection_report,
)

EXACT = 1e-12


def enumerated(scores_PK: np.ndarray, N: int, what, draw=itertools.combinations) -> float:
    """The mean over all prompts and all ways to draw N of their scores."""
    return float(np.mean([what(drawn) for scores in scores_PK for drawn in draw(scores, N)]))


def with_replacement(scores, N):
    return itertools.product(scores, repeat=N)


@pytest.fixture(scope="module")
def scores_PK() -> np.ndarray:
    """Ties, outliers and both signs among them."""
    scores = np.random.default_rng(0).normal(0, 3, (3, 9))
    scores[0, :4], scores[1, 2], scores[2, :] = 1.5, 1000.0, np.arange(9) // 2
    return scores


@pytest.mark.parametrize("K", [1, 2, 5, 8, 9])
def test_the_curves_are_the_means_over_all_subsets(scores_PK, K):
    pool = scores_PK[:, :K]
    curves = best_of_n(pool)
    for N in range(1, K + 1):
        assert curves.maximum[N - 1] == pytest.approx(enumerated(pool, N, max), rel=EXACT, abs=EXACT)
        assert curves.median[N - 1] == pytest.approx(enumerated(pool, N, np.median), rel=EXACT, abs=EXACT)


def test_drawn_with_replacement_they_are_lower(scores_PK):
    """The common estimator, which the test above refuses."""
    pool = scores_PK[:, :5]
    for N in (2, 3, 5):
        wrong = enumerated(pool, N, max, with_replacement)
        assert wrong < best_of_n(pool).maximum[N - 1] - 0.01


def test_the_ends_are_mean_maximum_and_median_in_any_order_of_samples(scores_PK):
    curves = best_of_n(scores_PK)
    assert curves.maximum[0] == curves.median[0] == pytest.approx(scores_PK.mean(), rel=EXACT)
    assert curves.maximum[-1] == pytest.approx(scores_PK.max(axis=1).mean(), rel=EXACT)
    assert curves.median[-1] == pytest.approx(np.median(scores_PK, axis=1).mean(), rel=EXACT)
    for again, curve in zip(best_of_n(scores_PK[:, ::-1]), curves, strict=True):
        assert np.array_equal(again, curve)


@pytest.mark.parametrize(("K", "N", "rank"), [(30, 7, 3), (100, 50, 49), (100, 100, 50), (4000, 2000, 999)])
def test_weights_are_hypergeometric_where_binomials_overflow(K, N, rank):
    """Against whole numbers, which are exact."""
    exact = [math.comb(i, rank) * math.comb(K - 1 - i, N - 1 - rank) / math.comb(K, N) for i in range(K)]
    weights = rank_weights(K, N, rank)
    assert weights.sum() == pytest.approx(1, rel=EXACT)
    assert np.abs(weights - exact).max() < EXACT * max(exact) * K


def test_the_maximum_of_uniform_scores_is_the_analytic_one():
    """N / (N + 1), within five of its own standard errors."""
    curves = best_of_n(np.random.default_rng(1).random((400, 40)))
    sizes = np.arange(1, 41)
    deviation = (curves.maximum - sizes / (sizes + 1)) / curves.maximum_error
    assert np.abs(deviation).max() < 5 and np.abs(curves.median - 0.5).max() < 0.02


def test_the_standard_error_is_over_prompts(scores_PK):
    error = best_of_n(scores_PK).maximum_error
    assert error[0] == pytest.approx(scores_PK.mean(axis=1).std(ddof=1) / 3**0.5, rel=EXACT)
    assert np.isnan(best_of_n(scores_PK[:1]).maximum_error).all()


@pytest.mark.parametrize("scores", [[], [[]], [1.0, 2.0], [[1.0, np.nan]], [[1.0, -np.inf]]])
def test_what_is_no_pool_is_refused(scores):
    with pytest.raises(ValueError, match="expected finite scores"):
        best_of_n(np.array(scores))


def test_the_table_has_powers_of_two_and_the_end():
    curves = {name: Curves(np.arange(6.0) + plus, np.zeros(6), np.zeros(6)) for name, plus in (("a", 0), ("b", 10))}
    lines = curves_table(curves).splitlines()
    assert lines[0] == "| N | max of N, a | median of N, a | max of N, b | median of N, b |"
    assert lines[2:] == [f"| {n} | {n - 1} | 0 | {n + 9} | 0 |" for n in (1, 2, 4, 6)]


def row(pools: dict[float, list], earlier=()) -> dict:
    samples = [
        {"temperature": t, "sample": k, "text": "a", "ended": "empty" if score is None else "whole", "score": score}
        for t, scores in pools.items()
        for k, score in enumerate(scores)
    ]
    old = [{"temperature": 1.0, "sample": 0, "text": "a", "ended": "whole", "score": score} for score in earlier]
    return {"prompt": [{"role": "user", "content": "why"}], "samples": samples, "earlier": old}


def test_the_report_is_of_this_runs_samples_by_temperature(tmp_path):
    rows = [
        row({0.8: [1.0, 3.0], 1.2: [None, 9.0]}, earlier=[99.0]),
        row({0.8: [2.0, 2.0], 1.2: [0.5, 1.5]}),
        row({}, earlier=[77.0]),
    ]
    (tmp_path / SAMPLES).write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = write_rejection_report(tmp_path).read_text()
    assert (
        "The best of 2 samples scores 5.25, one sample 2.875 (temperature 1.2, the best of 2)." in page
    )  # None: 0.5, the worst
    assert "| 1 | 2 | 2 | 2.875 | 2.875 |\n| 2 | 2.5 | 2 | 5.25 | 2.875 |" in page
    assert "| 0.8 | 4 | 2 | 0.0% | 0.0% |\n| 1.2 | 4 | 2.875 | 0.0% | 25.0% |" in page
    assert (tmp_path / "best_of_n.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_temperature_is_best_at_the_end_not_at_the_beginning():
    early, late = np.array([5.0, 6.0]), np.array([1.0, 7.0])
    curves = {t: Curves(line, line, line) for t, line in ((0.7, early), (1.0, late), (1.3, late))}
    assert best_temperature(curves) == 1.0


def test_a_folder_without_samples_or_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a finished llama-jax reject"):
        write_rejection_report(tmp_path)
    (tmp_path / SAMPLES).write_text(json.dumps(row({1.0: [None]})) + "\n")
    with pytest.raises(UserError, match="none of the samples .* has a score"):
        write_rejection_report(tmp_path)
