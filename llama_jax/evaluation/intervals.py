"""How far a share or a mean may be off: 95% intervals over the questions, as if these had been drawn at random."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z = 1.959963984540054  # of a normal distribution, 2.5% lie above


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of which `hits` in `n` were seen: it has a width at 0 and 1 too; 0 to 1 where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, spread = hits / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return (max(0.0, middle - half) if hits else 0.0), (
        min(1.0, middle + half) if hits < n else 1.0
    )  # exact at the ends


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of a mean: Wilson's where every value is 0 or 1, else 1.96 standard errors; None of fewer than two values."""
    if len(values) < 2:
        return None
    if set(values) <= {0, 1}:
        return wilson(round(sum(values)), len(values))
    mean, half = fmean(values), Z * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
