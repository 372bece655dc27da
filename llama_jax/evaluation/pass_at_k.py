"""pass@k: how often one of k generated programs passes its tests (paper 2.3, A.2.2: HumanEval and MBPP)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.errors import UserError
from llama_jax.evaluation.intervals import wilson

HUMANEVAL_K, MBPP_K = (1, 100), (1, 80)  # the paper's
TOP_P = 0.95


@dataclass(frozen=True)
class PassAtK:
    """pass@k of a benchmark."""

    k: int
    by_problem: tuple[float, ...]
    mean: float
    low: float
    """Lower end of the 95% interval of the mean."""
    high: float


def temperature(k: int) -> float:
    """The temperature at which the paper samples for pass@k, with top-p 0.95: 0.1 for one sample, 0.8 for more."""
    return 0.1 if k == 1 else 0.8


def estimate(n: int, correct: int, k: int) -> float:
    """The unbiased pass@k of a problem: the share of all k-subsets of n samples that hold a correct one (arXiv 2107.03374).

    Args:
      n: samples.
      correct: how many of them passed.
      k: how many may be tried.

    Raises:
      UserError: fewer than k samples.
    """
    if not (k >= 1 and 0 <= correct <= n):
        raise ValueError(f"{correct} correct of {n} samples, of which {k} are tried")
    if n < k:
        raise UserError(f"pass@{k} needs {k} samples of every problem and found {n}; sample more, or ask for pass@{n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def pass_at_k(passed: Sequence[Sequence[bool]], k: int) -> PassAtK:
    """pass@k of every problem, and their mean with its interval over problems.

    Our choice: Wilson's interval. It is made for problems that are solved or not; estimates between the two vary less, so
    that it is then wider than needed, and it keeps a width where no problem is solved.

    Args:
      passed: of each problem, whether each of its samples passed; k or more.
      k: how many samples may be tried.

    Raises:
      UserError: no problems, or one with fewer than k samples.
    """
    if not len(passed):
        raise UserError(f"pass@{k} of no problems; check that the file of problems holds some")
    by_problem = tuple(estimate(len(samples), int(sum(samples)), k) for samples in passed)
    mean, P = math.fsum(by_problem) / len(by_problem), len(by_problem)
    return PassAtK(k, by_problem, mean, *wilson(mean * P, P))
