"""Ratings of several models from comparisons of two (Bradley and Terry), on the scale of Elo.

A model whose rating is 400 higher wins ten times as often as it loses. Elo's own update depends on the order of the games; this is
the maximum likelihood, which does not, and at which every model has as many wins as its rating expects. Our choices: a tie is half
a win for both, and the mean of all ratings is 1000.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.evaluation.win_rates import Result

ELO_PER_LOG_ODDS = 400 / math.log(10)
MEAN = 1000.0
RESAMPLES = 1000


@dataclass(frozen=True)
class Rating:
    """A model's rating and its 95 % interval from resampled prompts; None where there is none that is finite."""

    value: float | None
    low: float | None
    high: float | None


def rate(results: Sequence[Result], models: Sequence[str], seed: int = 0) -> dict[str, Rating]:
    """The ratings of models, with percentile intervals over bootstrapped prompts.

    All comparisons of one prompt are drawn together, since they are not independent. There is no rating where some of the models
    never lost or tied against the rest, or were never compared with them; an interval needs one in all but 2.5 % of the resamples.
    """
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(result.prompt for result in results))}
    wins_PMM = np.zeros((len(prompts), len(models), len(models)))
    for result in results:
        first, second = models.index(result.first), models.index(result.second)
        wins_PMM[prompts[result.prompt], first, second] += (1 + result.score) / 2
        wins_PMM[prompts[result.prompt], second, first] += (1 - result.score) / 2
    value_M = elo(wins_PMM.sum(0)[None])[0]
    drawn_XP = np.random.default_rng(seed).multinomial(
        len(prompts), np.full(len(prompts), 1 / len(prompts)), size=RESAMPLES
    )
    resampled_XM = elo(np.tensordot(drawn_XP, wins_PMM, 1))
    resampled_XM = resampled_XM[np.isfinite(resampled_XM).all(1)]
    if not np.isfinite(value_M).all():
        return {model: Rating(None, None, None) for model in models}
    if len(resampled_XM) < 0.975 * RESAMPLES:
        return {model: Rating(float(value), None, None) for model, value in zip(models, value_M, strict=True)}
    bounds = np.quantile(resampled_XM, (0.025, 0.975), axis=0)
    return {model: Rating(*map(float, row)) for model, row in zip(models, np.stack([value_M, *bounds], 1), strict=True)}


def elo(wins_XMM: np.ndarray) -> np.ndarray:
    """The maximum-likelihood ratings (X, M) of X tables of wins; nan where a table has no finite ones.

    Args:
      wins_XMM: how often the model of the row won against that of the column; a tie is half a win in both places.
    """
    models = wins_XMM.shape[1]
    strength_XM = np.zeros(wins_XMM.shape[:2])
    finite_X = _connected(wins_XMM)
    wins_XMM = np.where(finite_X[:, None, None], wins_XMM, 1 - np.eye(models))  # stands in, so that all can be solved
    games_XMM = wins_XMM + wins_XMM.swapaxes(1, 2)
    for _ in range(100):  # Newton, with steps that are bounded where the likelihood is far from a parabola
        odds_XMM = strength_XM[:, :, None] - strength_XM[:, None, :]
        expected_XMM = games_XMM / (1 + np.exp(-odds_XMM))
        gradient_XM = (wins_XMM - expected_XMM).sum(2)
        curve_XMM = expected_XMM / (1 + np.exp(odds_XMM))
        hessian_XMM = -curve_XMM + np.eye(models) * curve_XMM.sum(2, keepdims=True)
        # The likelihood does not change where all strengths do by the same; the ones keep that direction still.
        step_XM = np.linalg.solve(hessian_XMM + 1, gradient_XM[:, :, None])[:, :, 0]
        strength_XM += step_XM / np.maximum(1, abs(step_XM).max(1, keepdims=True))
        if abs(step_XM).max() < 1e-12:
            break
    rating_XM = MEAN + ELO_PER_LOG_ODDS * (strength_XM - strength_XM.mean(1, keepdims=True))
    return np.where(finite_X[:, None], rating_XM, np.nan)


def _connected(wins_XMM: np.ndarray) -> np.ndarray:
    """Whether a chain of wins leads from every model to every other, without which some rating is infinite."""
    models = wins_XMM.shape[1]
    reached_XMM = (wins_XMM > 0) | np.eye(models, dtype=bool)
    for _ in range(models):
        reached_XMM = reached_XMM @ reached_XMM
    return reached_XMM.all((1, 2))
