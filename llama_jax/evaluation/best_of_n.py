"""What the best of N answers is worth (paper 3.2.3, Figures 7 and 8): its expected score against N, from one pool of samples.

Of K scored samples a prompt, N are drawn without replacement, in expectation over all subsets: the estimators are
unbiased for every N up to K, and use every sample at every N.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.samples import SAMPLES, is_scored, read_samples
from llama_jax.errors import UserError
from llama_jax.evaluation.report import table, write_page
from llama_jax.training.run_folder import write_whole


class Curves(NamedTuple):
    """Expected scores of N answers to a prompt, averaged over prompts; entry i is N = i + 1."""

    maximum: np.ndarray
    """Of the best of them (K,)."""
    median: np.ndarray
    """Of their median (K,); for even N the mean of the middle two."""
    maximum_error: np.ndarray
    """Standard error of `maximum` over prompts (K,); nan for a single prompt."""


def rank_weights(K: int, N: int, rank: int) -> np.ndarray:
    """The chance (K,) that each of K scores, ascending, is at `rank` (from 0) among N of them drawn without replacement.

    That of score i is C(i, rank) C(K-1-i, N-1-rank) / C(K, N). The ratios of neighbours are summed as logarithms and the
    sum of all is 1, so that no binomial, which would overflow, is computed.
    """
    if not 0 <= rank < N <= K:
        raise ValueError(f"rank {rank} of {N} drawn from {K}")
    first, behind = rank, N - 1 - rank  # the lowest score that can have this rank, and drawn scores above it
    i = np.arange(first, K - 1 - behind)
    steps = np.log(i + 1.0) - np.log(i + 1.0 - rank) + np.log(K - 1.0 - i - behind) - np.log(K - 1.0 - i)
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    likely = np.exp(logs - logs.max())
    weights = np.zeros(K)
    weights[first : K - behind] = likely / likely.sum()
    return weights


def best_of_n(scores_PK: np.ndarray) -> Curves:
    """The curves of a pool of K scores for each of P prompts.

    Raises:
      ValueError: no scores, or one that is not finite.
    """
    scores_PK = np.asarray(scores_PK, np.float64)
    if scores_PK.ndim != 2 or not scores_PK.size or not np.isfinite(scores_PK).all():
        raise ValueError(f"expected finite scores (prompts, samples), found shape {scores_PK.shape}")
    P, K = scores_PK.shape
    ascending_PK = np.sort(scores_PK, axis=1)
    sizes = range(1, K + 1)
    maximum_NK = np.stack([rank_weights(K, N, N - 1) for N in sizes])
    median_NK = np.stack([(rank_weights(K, N, (N - 1) // 2) + rank_weights(K, N, N // 2)) / 2 for N in sizes])
    maximum_NP = maximum_NK @ ascending_PK.T
    error_N = maximum_NP.std(axis=1, ddof=1) / P**0.5 if P > 1 else np.full(K, np.nan)
    return Curves(maximum_NP.mean(axis=1), median_NK @ ascending_PK.mean(axis=0), error_N)


def curves_table(curves: dict[str, Curves]) -> str:
    """Curves, by name, of the same K, at N = 1, 2, 4, ... and K, in Markdown."""
    K = len(next(iter(curves.values())).maximum)
    sizes = sorted({*(1 << power for power in range(K.bit_length()) if 1 << power <= K), K})
    header = ("N", *(f"{what} of N, {name}" for name in curves for what in ("max", "median")))
    return table(
        header,
        ((N, *(f"{line[N - 1]:.4g}" for one in curves.values() for line in (one.maximum, one.median))) for N in sizes),
    )


def plot_curves(curves: dict[str, Curves], path: Path) -> None:
    """Draws the maxima and, dashed, the medians against N into a PNG; a single maximum with two standard errors.

    Several have none, as their prompts are the same: the error of each says little about their differences.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, one) in enumerate(curves.items()):
        sizes, color = np.arange(1, len(one.maximum) + 1), f"C{number}"
        marker = "o" if len(sizes) == 1 else ""
        axes.plot(sizes, one.maximum, marker=marker, color=color, label=f"max, {name}")
        axes.plot(sizes, one.median, "--", marker=marker, color=color, label=f"median, {name}")
        if len(curves) == 1:
            low, high = (one.maximum + way * 2 * one.maximum_error for way in (-1, 1))
            axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="samples N", ylabel="expected score, mean over prompts")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(path, drawn.getvalue())


def pools_by_temperature(rows: list[dict[str, Any]]) -> dict[float, list[list[dict[str, Any]]]]:
    """The samples of a run of rejection sampling itself: by temperature, then by prompt.

    Args:
      rows: of its samples.jsonl; those of earlier runs, which stand beside, are left out.
    """
    pools: dict[float, list[list[dict[str, Any]]]] = {}
    for row in rows:
        own: dict[float, list[dict[str, Any]]] = {}
        for sample in row["samples"]:
            own.setdefault(sample["temperature"], []).append(sample)
        for temperature, samples in own.items():
            pools.setdefault(temperature, []).append(samples)
    return pools


def write_rejection_report(folder: str | Path) -> Path:
    """Writes report.md with its plot into the folder of a run of rejection sampling, from the samples there.

    Our choice: in the curves an answer without a score, empty or impossible to judge, counts as the worst that was seen.

    Raises:
      UserError: the folder has no samples.
    """
    folder = Path(folder)
    rows = read_samples(folder)
    pools = pools_by_temperature(rows)
    scored = [one["score"] for pool in pools.values() for samples in pool for one in samples if is_scored(one)]
    if not scored:
        raise UserError(f"none of the samples in {folder / SAMPLES} has a score, so that there is nothing to report")
    worst = min(scored)
    curves, lines = {}, []
    for temperature, pool in pools.items():
        scores_PK = [[one["score"] if is_scored(one) else worst for one in samples] for samples in pool]
        curves[temperature] = best_of_n(np.array(scores_PK))
        every = [one for samples in pool for one in samples]
        shares = [sum(one["ended"] == how for one in every) / len(every) for how in ("too long", "empty")]
        lines.append((temperature, len(every), f"{np.mean(scores_PK):.4g}", *(f"{share:.1%}" for share in shares)))
    named = {f"temperature {temperature:g}": one for temperature, one in curves.items()}
    plot_curves(named, folder / "best_of_n.png")
    best = best_temperature(curves)
    K, last = len(curves[best].maximum), curves[best]
    sections = [
        f"The best of {K} samples scores {last.maximum[-1]:.4g}, one sample {last.maximum[0]:.4g} (temperature {best:g}"
        + (f", the best of {len(curves)})." if len(curves) > 1 else ")."),
        "## Score against the number of samples (paper, Figures 7 and 8)",
        "![Expected maximum and median of N samples](best_of_n.png)",
        curves_table(named),
        "## Samples",
        table(("temperature", "samples", "mean score", "cut by --max-new-tokens", "empty"), lines),
    ]
    return write_page(folder / "report.md", f"Rejection sampling {folder.name}", sections)


def best_temperature(curves: dict[float, Curves]) -> float:
    """The temperature whose best of K samples scores highest; the first of equal ones."""
    return max(curves, key=lambda temperature: curves[temperature].maximum[-1])
