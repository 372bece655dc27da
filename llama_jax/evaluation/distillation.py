"""What safety context distillation came to (paper 4.2.4, Figure 16): how preprompts shift the judge's scores, and what is kept."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.samples import is_scored, read_samples
from llama_jax.evaluation.report import table, write_page
from llama_jax.stages.distillation import is_safer
from llama_jax.training.run_folder import write_whole

Row = dict[str, Any]


def write_distillation_report(folder: str | Path) -> Path:
    """Writes report.md with its plot into the folder of a run of distillation, from the samples there.

    Raises:
      UserError: the folder has no samples.
    """
    folder = Path(folder)
    rows = read_samples(folder)
    plot_scores(scores_by_kind(rows), folder / "scores.png")
    sections = [
        f"Of {len(rows)} adversarial prompts {sum(map(is_safer, rows))} have an answer behind a preprompt that the judge "
        "scores above the original one; only these are kept.",
        "## By risk category",
        table(("category", "prompts", "kept", "share"), kept_by_category(rows)),
        "## By kind of preprompt",
        table(("answers", "number", "mean score", "above the original", "mean shift"), shift_by_kind(rows)),
        "![Scores of answers with and without preprompts](scores.png)",
    ]
    return write_page(folder / "report.md", f"Safety context distillation {folder.name}", sections)


def kept_by_category(rows: Sequence[Row]) -> list[tuple[str, int, int, str]]:
    """Of each risk category, and of all: the prompts, how many are kept, and their share."""
    categories = sorted({row["risk"] for row in rows})
    groups = {category: [row for row in rows if row["risk"] == category] for category in categories} | {"all": rows}
    kept = {name: sum(map(is_safer, group)) for name, group in groups.items()}
    return [(name, len(group), kept[name], f"{kept[name] / len(group):.1%}") for name, group in groups.items()]


def scores_by_kind(rows: Sequence[Row]) -> dict[str, list[float]]:
    """The scores of the original answers, and of those behind each kind of preprompt, where there are any."""
    scores: dict[str, list[float]] = {"original": []}
    for row in rows:
        for one in filter(is_scored, (row["original"], *row["samples"])):
            scores.setdefault(one["kind"] or "original", []).append(one["score"])
    return scores


def shift_by_kind(rows: Sequence[Row]) -> list[tuple[str, int, str, str, str]]:
    """For the original answers and for those behind each kind of preprompt: how many have a score, its mean, the share that
    scores above the original one, and by how much all of these do in the mean.

    Pairs of which the judge scores only one count in neither of the last two.
    """
    lines = []
    for kind, scores in scores_by_kind(rows).items():
        shifts = [
            one["score"] - row["original"]["score"]
            for row in rows
            for one in row["samples"]
            if one["kind"] == kind and is_scored(one) and is_scored(row["original"])
        ]
        mean = f"{np.mean(scores):.4g}" if scores else ""
        above = (f"{np.mean([shift > 0 for shift in shifts]):.1%}", f"{np.mean(shifts):+.4g}") if shifts else ("", "")
        lines.append((kind, len(scores), mean, *above))
    return lines


def plot_scores(scores: dict[str, list[float]], path: Path) -> None:
    """Draws the distributions of scores, by name, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    every = [score for own in scores.values() for score in own]
    edges = np.histogram_bin_edges(every, bins=30) if every else 30
    for name, own in scores.items():
        axes.hist(own, bins=edges, histtype="step", density=len(own) > 0, label=name)
    axes.set(xlabel="score", ylabel="density")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(path, drawn.getvalue())
