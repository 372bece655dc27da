"""Gwet's coefficients against numbers that Gwet published, against irrCAC 0.4.4 (PyPI), and where they are known without either."""

from math import nan

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.agreement import gwet, identity_weights, linear_weights, ordinal_weights, quadratic_weights

# Gwet's Handbook (2014): 12 subjects, 4 raters, 5 categories; cac.raw4raters of his R package irrCAC.
FOUR_RATERS = np.array(
    [
        [1, 1, nan, 1],
        [2, 2, 3, 2],
        [3, 3, 3, 3],
        [3, 3, 3, 3],
        [2, 2, 2, 2],
        [1, 2, 3, 4],
        [4, 4, 4, 4],
        [1, 1, 2, 1],
        [2, 2, 2, 2],
        [nan, 5, 5, 5],
        [nan, nan, 1, 1],
        [nan, nan, 3, nan],
    ]
)
# 15 patients by 6 psychiatrists, how many chose each of 5 diagnoses (distrib.6raters of the same package).
SIX_PSYCHIATRISTS = "00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031"
# 15 units by 5 observers (cac.raw5obser), from 0 to 3.
FIVE_OBSERVERS = np.array(
    [
        [1, 1, 2, nan, 0, 0, 1, 1, 2, 2, nan, 0, 1, 3, 1],
        [1, 1, 3, 0, 0, 0, 0, nan, 2, 1, 1, 0, 2, 3, 1],
        [2, 0, 3, 0, 0, 0, 2, 2, 2, 1, 0, 0, 2, 2, 1],
        [nan, 1, 3, nan, nan, nan, nan, 0, nan, 1, 0, 0, 2, 2, nan],
        [2, nan, nan, 0, 0, 0, 1, nan, 2, nan, nan, nan, nan, 3, 1],
    ]
).T


def six_psychiatrists() -> np.ndarray:
    rows = [[k + 1 for k, count in enumerate(row) for _ in range(int(count))] for row in SIX_PSYCHIATRISTS.split()]
    return np.array(rows, float)


def abstractors() -> np.ndarray:
    """100 women by two abstractors (cont3x3abstractors)."""
    counts = [[13, 0, 0], [0, 20, 7], [0, 4, 56]]
    return np.array([(i, j) for i in range(3) for j in range(3) for _ in range(counts[i][j])], float) + 1


# README and vignettes/weighting.html of github.com/kgwet/irrCAC; each number to as many digits as it is printed with there.
PUBLISHED = [
    (FOUR_RATERS, 5, identity_weights, ("0.77544", "0.14295", "0.461", "1.000", "0.8181818", "0.1903212")),
    (FOUR_RATERS, 5, quadratic_weights, ("0.91400", "0.10396", "0.685", "1.000", "0.9753788", "0.7137044")),
    (six_psychiatrists(), 5, identity_weights, ("0.4448007", "0.08418757", "0.264", "0.625", "0.5511111", "0.1914815")),
    (six_psychiatrists(), 5, quadratic_weights, ("0.4837438", "0.1058227", "0.257", "0.711", "0.8544444", "0.7180556")),
]


@pytest.mark.parametrize(("ratings", "points", "weights", "printed"), PUBLISHED)
def test_numbers_that_gwet_printed(ratings, points, weights, printed):
    found = gwet(ratings, tuple(range(1, points + 1)), weights)
    values = found.coefficient, found.standard_error, found.low, found.high, found.observed, found.chance
    assert [f"{value:.{len(text) - 2}f}" for value, text in zip(values, printed, strict=True)] == list(printed)


@pytest.mark.parametrize(
    ("weights", "coefficient", "error"),
    [(identity_weights, "0.8493305", "0.04321747"), (quadratic_weights, "0.9402369", "0.01792019")],
)
def test_numbers_that_gwet_printed_for_a_table_of_two_raters(weights, coefficient, error):
    """Of the same sources. The variance of a table divides by n where that of raw ratings divides by n - 1."""
    found = gwet(abstractors(), (1, 2, 3), weights)
    assert f"{found.coefficient:.7f}" == coefficient
    assert f"{found.standard_error * (99 / 100) ** 0.5:.8f}" == error


@pytest.mark.parametrize(
    ("ratings", "scale", "weights", "coefficient", "error", "low"),
    [
        (FOUR_RATERS, (1, 2, 3, 4, 5), ordinal_weights, 0.8989397699, 0.1069035238, 0.6636467004),
        (FOUR_RATERS, (1, 2, 3, 4, 5), linear_weights, 0.8587391364, 0.1173290219, 0.6004997004),
        (FIVE_OBSERVERS, (0, 1, 2, 3), identity_weights, 0.4966220549, 0.121973368, 0.2350151989),
        (FIVE_OBSERVERS, (0, 1, 2, 3), ordinal_weights, 0.7853417936, 0.0681875708, 0.6390939994),
        (FIVE_OBSERVERS, (0, 1, 2, 3), linear_weights, 0.6896394229, 0.0876907591, 0.5015614501),
        (FIVE_OBSERVERS, (0, 1, 2, 3), quadratic_weights, 0.8304335727, 0.0582464052, 0.7055074582),
    ],
)
def test_numbers_of_irrcac(ratings, scale, weights, coefficient, error, low):
    found = gwet(ratings, scale, weights)
    assert (found.coefficient, found.standard_error, found.low) == pytest.approx((coefficient, error, low), abs=1e-10)


def test_points_that_nobody_used_and_missing_ratings_on_seven_points():
    """60 items by 3 raters, a seventh of the ratings missing, against irrCAC with all seven categories named."""
    draw = np.random.default_rng(0)
    ratings = np.clip(draw.integers(1, 8, 60)[:, None] + draw.integers(-2, 3, (60, 3)), 1, 7).astype(float)
    ratings[draw.random((60, 3)) < 0.15] = nan
    found = gwet(ratings, (1, 2, 3, 4, 5, 6, 7))
    assert (found.coefficient, found.standard_error) == pytest.approx((0.6214540689, 0.0557179972), abs=1e-10)
    assert (found.low, found.high) == pytest.approx((0.5099626141, 0.7329455238), abs=1e-10)


def test_weights_as_printed():
    """Of three points, as in the same vignette."""
    scale = np.array([1.0, 2, 3])
    first = [tuple(weights(scale)[0].round(7)) for weights in (identity_weights, linear_weights, quadratic_weights)]
    assert first == [(1, 0, 0), (1, 0.5, 0), (1, 0.75, 0)]
    assert (ordinal_weights(scale).round(7) == [[1, 0.6666667, 0], [0.6666667, 1, 0.6666667], [0, 0.6666667, 1]]).all()


def test_what_is_known_beforehand():
    same = np.repeat([[4.0], [4], [4]], 3, axis=1)
    assert (gwet(same, (1, 2, 3, 4)).coefficient, gwet(same, (1, 2, 3, 4)).standard_error) == (1, 0)
    chance = gwet(np.random.default_rng(1).integers(1, 8, (20_000, 3)).astype(float), tuple(range(1, 8)))
    assert chance.low < 0 < chance.high and chance.high - chance.low < 0.02
    with_nobody = np.vstack([FOUR_RATERS, np.full((3, 4), nan)])
    assert gwet(with_nobody, (1, 2, 3, 4, 5)) == gwet(FOUR_RATERS, (1, 2, 3, 4, 5))
    alone = gwet(np.array([[1.0, nan], [nan, 2]]), (1, 2))
    assert alone.subjects == 0 and np.isnan(alone.coefficient)
    one = gwet(np.array([[1.0, 1.0]]), (1, 2))
    assert one.coefficient == 1 and np.isnan(one.standard_error)
    with pytest.raises(UserError, match="the rating 6 is not on the scale 1, 2, 3, 4, 5"):
        gwet(FOUR_RATERS + (FOUR_RATERS == 5), (1, 2, 3, 4, 5))
