"""How well raters agree (paper 3.4.2, 4.4): Gwet's AC1 and AC2, which correct for chance and do not collapse where one rating is common.

The formulas are those of Gwet's Handbook of Inter-Rater Reliability (4th edition, 2014) for any number of raters with missing
ratings. AC1 counts equal ratings alone, which is what identity weights do; AC2 gives ratings that are near each other part of the
credit. The interval holds for other subjects of the same raters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import numpy as np

from llama_jax.errors import UserError

Weights = Callable[[np.ndarray], np.ndarray]
"""Of the scale's values (Q,), ascending, the credit (Q, Q) of each pair of ratings, from 0 to 1 on the diagonal."""


@dataclass(frozen=True)
class Agreement:
    """An agreement coefficient with what it is made of."""

    coefficient: float
    """1 where raters always agree, 0 where they do as often as by chance; nan where no subject has two ratings."""
    standard_error: float
    low: float
    """Of the 95 % interval by Student's t."""
    high: float
    observed: float
    """The mean credit of two ratings of a subject."""
    chance: float
    """What of it is expected by chance."""
    subjects: int
    """How many have two ratings or more."""


def identity_weights(scale_Q: np.ndarray) -> np.ndarray:
    """Credit for equal ratings alone, which makes AC1 of AC2."""
    return np.eye(len(scale_Q))


def ordinal_weights(scale_Q: np.ndarray) -> np.ndarray:
    """Credit by how many pairs of values lie between two ratings; the values' order matters, their size does not."""
    rank_Q = np.arange(len(scale_Q))
    apart_QQ = abs(rank_Q[:, None] - rank_Q)
    return _credit(apart_QQ * (apart_QQ + 1) / 2)


def linear_weights(scale_Q: np.ndarray) -> np.ndarray:
    """Credit that falls with the distance of two ratings."""
    return _credit(abs(scale_Q[:, None] - scale_Q))


def quadratic_weights(scale_Q: np.ndarray) -> np.ndarray:
    """Credit that falls with the squared distance of two ratings."""
    return _credit((scale_Q[:, None] - scale_Q) ** 2)


def gwet(ratings_SR: np.ndarray, scale: tuple[float, ...], weights: Weights = ordinal_weights) -> Agreement:
    """Gwet's AC2, or with `identity_weights` AC1, of subjects that raters put on a scale.

    Args:
      ratings_SR: float, a row for each subject, a column for each rater; nan where one did not rate it. Subjects without a rating
        are left out.
      scale: all values that a rating may have, ascending, two or more, whether they were used or not.
      weights: the credit of two ratings.

    Raises:
      UserError: a rating is not on the scale.
    """
    scale_Q = np.asarray(scale, float)
    count_SQ = (ratings_SR[:, :, None] == scale_Q).sum(1)
    if count_SQ.sum() != np.isfinite(ratings_SR).sum():
        wrong = ratings_SR[np.isfinite(ratings_SR) & ~np.isin(ratings_SR, scale_Q)][0]
        raise UserError(f"the rating {wrong:g} is not on the scale {', '.join(f'{value:g}' for value in scale_Q)}")
    count_SQ = count_SQ[count_SQ.any(1)]
    raters_S = count_SQ.sum(1)
    n, paired_S = len(count_SQ), raters_S >= 2
    if not paired_S.any():
        return Agreement(nan, nan, nan, nan, nan, nan, 0)
    weight_QQ = weights(scale_Q)
    credit_S = (count_SQ * (count_SQ @ weight_QQ - 1)).sum(1) / np.maximum(raters_S * (raters_S - 1), 1)
    observed = credit_S[paired_S].mean()
    share_SQ = count_SQ / raters_S[:, None]
    share_Q, spread = share_SQ.mean(0), weight_QQ.sum() / (len(scale_Q) * (len(scale_Q) - 1))
    chance = spread * (share_Q * (1 - share_Q)).sum()
    coefficient = (observed - chance) / (1 - chance)
    # What each subject adds to the coefficient: by its own agreement, and by what its ratings do to chance agreement.
    own_S = n / paired_S.sum() * (credit_S - chance) * paired_S / (1 - chance)
    chance_S = spread * share_SQ @ (1 - share_Q)
    part_S = own_S - 2 * (1 - coefficient) * (chance_S - chance) / (1 - chance)
    error = np.sqrt(((part_S - coefficient) ** 2).sum() / (n * (n - 1))) if n > 1 else nan
    reach = error * _t_quantile(n - 1)
    return Agreement(
        float(coefficient),
        float(error),
        float(coefficient - reach),
        float(np.minimum(1, coefficient + reach)),
        float(observed),
        float(chance),
        int(paired_S.sum()),
    )


def _credit(distance_QQ: np.ndarray) -> np.ndarray:
    return 1 - distance_QQ / distance_QQ.max()


def _t_quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) if freedom else nan
