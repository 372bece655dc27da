"""Whether contamination shows in a benchmark's scores (paper A.6 and its Table 51).

A sample's contamination is the share of its tokens that lie in matches of at least L tokens. By it samples fall into four
subsets, which overlap: clean (< 20%) or not clean (>= 20%), not dirty (< 80%) or dirty (>= 80%). Were contamination nothing to
the score, the mean of a subset of n samples would be drawn from the mean mu of all with the deviation sigma / sqrt(n), and
Z = (mean - mu) / (sigma / sqrt(n)) would be small. The paper takes |Z| > 2 in all four as evidence. Its printed Z have no
finite-population correction, so these have none.

Our choice: evidence is called a benefit where the more contaminated subset scores higher, in both pairs; sigma is the
deviation of all samples' scores about their mean, divided by their number; a set without variance, or with an empty subset,
shows nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.evaluation.contamination_matches import is_covered

LENGTHS = range(10, 51)  # the minimum match lengths L of the paper
CLEAN_BELOW, DIRTY_FROM = 0.2, 0.8
THRESHOLD = 2.0


@dataclass(frozen=True)
class Subset:
    """The samples of a benchmark that are contaminated so much or so little."""

    name: str
    """clean, not clean, not dirty or dirty."""
    n: int
    """Samples."""
    contamination: float | None
    """Mean share of contaminated tokens; None where there are no samples."""
    score: float | None
    """Mean score; None where there are no samples or no scores."""
    z: float | None
    """How far the mean score is from that of all samples, in deviations of a mean of n; None where that is not defined."""


@dataclass(frozen=True)
class AtLength:
    """A benchmark at a minimum match length."""

    length: int
    """L, in tokens."""
    contamination: float
    """Mean share of contaminated tokens of all samples."""
    subsets: tuple[Subset, ...]
    """Clean, not clean, not dirty, dirty."""

    @property
    def is_evidence(self) -> bool:
        """Whether all four |Z| are above 2."""
        return all(subset.z is not None and abs(subset.z) > THRESHOLD for subset in self.subsets)

    @property
    def is_benefit(self) -> bool:
        """Whether they are, and contaminated samples score higher."""
        clean, not_clean, not_dirty, dirty = (subset.z for subset in self.subsets)
        return self.is_evidence and clean < not_clean and not_dirty < dirty


def sample_shares(longest: np.ndarray, sizes: np.ndarray, least: int) -> np.ndarray:
    """Of each sample's tokens, the share that lies in matches of at least so many.

    Args:
      longest: of all samples' tokens, as `longest_matches` gives it.
      sizes: tokens of each sample, 1 or more.
      least: the minimum match length L.

    Returns:
      float64, [samples], 0 to 1.
    """
    return np.add.reduceat(is_covered(longest, least), np.cumsum(sizes) - sizes, dtype=np.int64) / sizes


def at_length(length: int, shares: np.ndarray, scores: np.ndarray | None) -> AtLength:
    """A benchmark's subsets at a minimum match length.

    Args:
      length: L, as the shares have it.
      shares: of contaminated tokens, by sample.
      scores: of the same samples; None if there are none.
    """
    is_clean, is_dirty = shares < CLEAN_BELOW, shares >= DIRTY_FROM
    kept = {"clean": is_clean, "not clean": ~is_clean, "not dirty": ~is_dirty, "dirty": is_dirty}
    subsets = tuple(_subset(name, shares[mask], scores, mask) for name, mask in kept.items())
    return AtLength(length, float(shares.mean()), subsets)


def largest_benefit(lengths: Sequence[AtLength]) -> AtLength | None:
    """The largest minimum match length at which contamination shows as a benefit, which is the one the paper reports."""
    return max((one for one in lengths if one.is_benefit), key=lambda one: one.length, default=None)


def _subset(name: str, shares: np.ndarray, scores: np.ndarray | None, mask: np.ndarray) -> Subset:
    n = len(shares)
    if not n:
        return Subset(name, 0, None, None, None)
    contamination = float(shares.mean())
    if scores is None:
        return Subset(name, n, contamination, None, None)
    score, deviation = float(scores[mask].mean()), float(scores.std())
    z = (score - float(scores.mean())) / (deviation / math.sqrt(n)) if deviation > 0 else None
    return Subset(name, n, contamination, score, z)
