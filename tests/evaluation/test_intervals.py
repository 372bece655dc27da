"""Intervals of shares and means, against scipy."""

import numpy as np
import pytest
from scipy import stats

from llama_jax.evaluation.intervals import interval_of_mean, wilson


@pytest.mark.parametrize(
    ("hits", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (1, 7), (13, 40), (3, 1319), (1000, 1001), (2, 10**9)]
)
def test_wilson_is_scipys(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-15)


def test_nothing_seen_tells_nothing():
    assert wilson(0, 0) == (0, 1)
    assert interval_of_mean([]) is None and interval_of_mean([0.5]) is None


def test_a_mean_of_shares_has_wilsons_interval_and_another_its_standard_errors():
    assert interval_of_mean([1, 0, 0, 1, 1]) == wilson(3, 5)
    values = [0.3, -0.2, 0.9, 0.1, 1.0]
    expected = stats.norm.interval(0.95, loc=np.mean(values), scale=stats.sem(values))
    assert interval_of_mean(values) == pytest.approx(expected, abs=1e-12)
