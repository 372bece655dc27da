"""pass@k: the share of all k-subsets with a correct sample, counted one by one; intervals against SciPy's."""

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from llama_jax.errors import UserError
from llama_jax.evaluation.pass_at_k import HUMANEVAL_K, MBPP_K, TOP_P, estimate, pass_at_k, temperature


def test_it_is_the_share_of_all_subsets_that_hold_a_correct_one():
    for n in range(1, 9):
        for correct in range(n + 1):
            samples = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                counted = fmean(any(subset) for subset in combinations(samples, k))
                assert estimate(n, correct, k) == pytest.approx(counted, abs=1e-15)


def test_it_is_unbiased():
    """Averaged over what n samples of a program of chance p may be, it is the chance that one of k is correct."""
    n, k, p = 12, 5, 0.3
    mean = sum(binom.pmf(c, n, p) * estimate(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_many_samples_are_no_trouble():
    """200 samples and pass@100, as HumanEval's: the product form, which its authors compute, gives the same."""
    for correct in (0, 1, 7, 100, 101, 200):
        product = 1.0 if 200 - correct < 100 else 1 - np.prod(1 - 100 / np.arange(200 - correct + 1, 201))
        assert estimate(200, correct, 100) == pytest.approx(product, abs=1e-12)
    assert estimate(100_000, 1, 80) == pytest.approx(80 / 100_000)


@pytest.mark.parametrize("solved", [0, 1, 33, 163, 164])
def test_the_interval_of_single_samples_is_wilsons(solved):
    result = pass_at_k([[True]] * solved + [[False]] * (164 - solved), 1)
    expected = binomtest(solved, 164).proportion_ci(method="wilson")
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert result.mean == solved / 164


def test_problems_count_alike_whatever_their_samples():
    result = pass_at_k([[True, False, False], [True] * 9, [False] * 2], 2)
    assert result.by_problem == pytest.approx((2 / 3, 1, 0))
    assert result.mean == pytest.approx(5 / 9) and result.low < result.mean < result.high


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """300 benchmarks of 60 problems, of each of which 5 samples pass at the problem's own chance."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        chances = rng.beta(0.5, 1.0, size=60)
        result = pass_at_k(rng.random((60, 5)) < chances[:, None], 1)
        held += result.low <= 1 / 3 <= result.high  # the mean of the beta distribution
    assert held >= 0.95 * 300


def test_too_few_samples_or_problems_are_refused():
    with pytest.raises(UserError, match="pass@100 needs 100 samples of every problem and found 20; .* ask for pass@20"):
        pass_at_k([[True] * 100, [True] * 20], 100)
    with pytest.raises(UserError, match="no problems"):
        pass_at_k([], 1)
    for wrong in ((3, 4, 1), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="correct of 3 samples"):
            estimate(*wrong)


def test_the_papers_sampling():
    assert (HUMANEVAL_K, MBPP_K, TOP_P) == ((1, 100), (1, 80), 0.95)
    assert [temperature(k) for k in (1, 80, 100)] == [0.1, 0.8, 0.8]
