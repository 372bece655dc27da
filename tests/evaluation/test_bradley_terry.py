"""Ratings against the closed form of two players, against scipy's optimiser, and where there are none."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from llama_jax.evaluation.bradley_terry import elo, rate
from llama_jax.evaluation.win_rates import Result, rates, win_rates


def by_scipy(wins: np.ndarray) -> np.ndarray:
    """The same likelihood, maximised by a general optimiser, in Elo around 1000."""

    def negative(rest):
        strength = np.append(rest, 0.0)
        return (wins * np.logaddexp(0, strength[None, :] - strength[:, None])).sum()

    found = minimize(negative, np.zeros(len(wins) - 1), method="BFGS", options={"gtol": 1e-9}).x
    strength = np.append(found, 0.0)
    return 1000 + 400 * (strength - strength.mean()) / math.log(10)


@pytest.mark.parametrize(("won", "lost"), [(1, 1), (30, 10), (10, 1), (999, 1), (0.5, 7.5)])
def test_two_players_have_a_closed_form(won, lost):
    first, second = elo(np.array([[[0.0, won], [lost, 0.0]]]))[0]
    assert first - second == pytest.approx(400 * math.log10(won / lost), abs=1e-9)
    assert first + second == pytest.approx(2000, abs=1e-9)


def test_many_players_as_scipy_finds_them():
    draw = np.random.default_rng(0)
    strength = draw.normal(size=(6, 5)) * np.array([0.1, 0.5, 1, 2, 3, 5])[:, None]
    chance = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))
    wins = np.triu(draw.binomial(200, chance), 1) + np.tril(draw.integers(0, 3, (6, 5, 5)), -1) + 0.5 * (1 - np.eye(5))
    tables = elo(wins)
    for table, ratings in zip(wins, tables, strict=True):
        assert ratings == pytest.approx(by_scipy(table), abs=1e-3)
        # At the maximum every model has as many wins as its rating expects.
        expected = 1 / (1 + 10 ** ((ratings[None, :] - ratings[:, None]) / 400))
        assert ((table + table.T) * expected).sum(1) == pytest.approx(table.sum(1), abs=1e-8)


def test_lopsided_tables_that_plain_newton_steps_diverge_on():
    wins = np.zeros((7, 7))
    for n, (won, lost) in enumerate([(0.5, 0.5), (1, 10), (1e5, 1e3), (0.5, 1e5), (0.5, 1e3), (10, 0), (1, 1e5)]):
        wins[n, (n + 1) % 7], wins[(n + 1) % 7, n] = won, lost
    (ratings,) = elo(wins[None])
    expected = 1 / (1 + 10 ** ((ratings[None, :] - ratings[:, None]) / 400))
    assert ((wins + wins.T) * expected).sum(1) == pytest.approx(wins.sum(1), rel=1e-6)


def test_no_rating_without_a_way_from_each_to_each():
    unbeaten = [[0, 3, 1], [0, 0, 2], [0, 1, 0]]
    apart = [[0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 2, 0]]
    circle = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert np.isnan(elo(np.array([unbeaten], float))).all() and np.isnan(elo(np.array([apart], float))).all()
    assert elo(np.array([unbeaten, circle], float))[1] == pytest.approx([1000] * 3)


def results(scores: list[int], first: str = "a", second: str = "b") -> list[Result]:
    return [Result(str(number), first, second, score, 1) for number, score in enumerate(scores)]


def test_a_tie_is_half_a_win_and_intervals_are_those_of_resampled_prompts():
    scores = [1] * 50 + [0] * 20 + [-1] * 30
    found = rate(results(scores), ["a", "b"])
    assert found["a"].value - found["b"].value == pytest.approx(400 * math.log10(60 / 40), abs=1e-9)
    # The mean score's standard error, carried through the log odds, in Elo from the mean of both.
    error = np.std((np.array(scores) + 1) / 2) / 10 / (0.6 * 0.4) * 200 / math.log(10)
    assert (found["a"].high - found["a"].low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert found == rate(results(scores), ["a", "b"]) != rate(results(scores), ["a", "b"], seed=1)


def test_comparisons_of_one_prompt_are_drawn_together():
    """Each prompt ten times over says no more than once, and the interval stays as wide."""
    once = results([1] * 12 + [-1] * 8)
    one, ten = rate(once, ["a", "b"])["a"], rate(once * 10, ["a", "b"])["a"]
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high), abs=1e-9)


def test_too_few_comparisons_have_no_interval():
    assert rate(results([1, 1, 1]), ["a", "b"])["a"].value is None
    few = rate(results([1, 1, -1]), ["a", "b"])["a"]  # eight of 27 resamples never lose, one never wins
    assert few.value is not None and few.low is few.high is None


def test_rates_and_groups():
    rows = [Result(str(n), "a", "b", score, turns, kind) for n, (score, turns, kind) in enumerate(
        [(1, 1, "x"), (1, 2, "y"), (0, 1, "x"), (-1, 1, "y")]
    )]  # fmt: skip
    (pair,) = win_rates(rows)
    assert [pair["all"][name]["count"] for name in ("win", "tie", "loss")] == [2, 1, 1] and pair["all"]["n"] == 4
    assert {name: own["win"]["share"] for name, own in pair["by_category"].items()} == {"x": 0.5, "y": 0.5}
    assert {name: own["n"] for name, own in pair["by_turns"].items()} == {"1": 3, "2": 1}
    assert win_rates(rows[:1])[0]["by_turns"] == {}
    assert rates([])["win"] == {"count": 0, "of": 0, "share": None, "low": 0.0, "high": 1.0}
