"""The report of a reward model (paper 3.2.2, Tables 7 to 9, Figures 27 and 29): accuracies, calibration, what scores follow.

A policy that was trained on preferences directly is a reward model of its own kind, and has the same report.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.pairs import UNKNOWN
from llama_jax.data.preferences import Strength
from llama_jax.evaluation.report import save_figure, table, write_page
from llama_jax.stages.reward import FINDINGS
from llama_jax.training.held_out_pairs import SCORES, accuracy_of, length_correlation

UNSAFE_SCORE = 0.0  # sigmoid 0.5, at which the paper calls an answer unsafe


def read_scores(folder: str | Path) -> list[dict[str, Any]]:
    """The scored pairs of a run of the reward or the dpo stage."""
    return [json.loads(line) for line in (Path(folder) / SCORES).read_text().splitlines()]


def accuracy_table(rows: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each source: its accuracy by strength, from the greatest down, on all pairs, and how many these are."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_source.setdefault(f"{row['source']} ({row['set']})", []).append(row)
    return [
        (
            source,
            *(_accuracy([row for row in own if row["strength"] == level]) for level in reversed(Strength)),
            _accuracy(own),
            str(len(own)),
        )
        for source, own in by_source.items()
    ]


def safety_table(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Accuracy on pairs of each safety label, and the share of unsafe answers whose score is below 0."""
    unsafe = [score for row in rows for score, safe in zip(row["scores"], row["safe"], strict=True) if safe == 0]
    return [
        ("safe against unsafe", _accuracy([row for row in rows if row["safe"] == [1, 0]])),
        ("both safe", _accuracy([row for row in rows if row["safe"] == [1, 1]])),
        ("both unsafe", _accuracy([row for row in rows if row["safe"] == [0, 0]])),
        (
            "unsafe answers that score below 0",
            f"{np.mean(np.array(unsafe) < UNSAFE_SCORE):.1%}" if unsafe else "-",
        ),
    ]


def is_labelled(rows: list[dict[str, Any]]) -> bool:
    """Whether any answer has a safety label."""
    return any(safe != UNKNOWN for row in rows for safe in row["safe"])


def calibration(rows: list[dict[str, Any]], bins: int = 10) -> list[tuple[float, float, int]]:
    """Predicted win probability sigmoid(difference of scores), in bins: its mean, the share of wins, and how many.

    Each pair stands in it from the side of the answer that the model prefers, so that probabilities begin at a half.
    """
    differences = np.array([row["scores"][0] - row["scores"][1] for row in rows])
    predicted = 1 / (1 + np.exp(-np.abs(differences)))
    won = np.heaviside(differences, 0.5)
    which = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        (float(predicted[which == b].mean()), float(won[which == b].mean()), int((which == b).sum()))
        for b in range(bins)
        if (which == b).any()
    ]


def write_reward_report(folder: str | Path) -> Path:
    """Writes report.md and its plots into the folder of a run of the reward stage, from what that left there."""
    folder = Path(folder)
    rows, known = read_scores(folder), json.loads((folder / FINDINGS).read_text())
    reasons = known["warnings"]
    sections = [
        "Nothing speaks against using it."
        if not reasons
        else "**Not to be used for PPO:**\n\n" + "\n".join(f"- {reason}" for reason in reasons),
        "## Data (paper, Table 6)",
        *(
            table((source, ""), [(name, f"{value:,.4g}") for name, value in data.items()])
            for source, data in known["data"].items()
        ),
    ]
    return write_page(folder / "report.md", f"Reward model {folder.name}", sections + _of_scores(rows, folder))


def write_dpo_report(folder: str | Path) -> Path:
    """Writes report.md and its plots into the folder of a run of the dpo stage, from the rewards that it left there."""
    folder = Path(folder)
    sections = [
        "The score of an answer is its implicit reward: beta times what its log-probability has grown by, in nats, "
        "against the model that training began with. Before training every score is 0.",
        *_of_scores(read_scores(folder), folder),
    ]
    return write_page(folder / "report.md", f"Direct preference optimisation {folder.name}", sections)


def _of_scores(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """The sections on what scores of pairs are like, whose plots are drawn into the folder; none without a pair."""
    if not rows:
        return []
    plot_calibration(calibration(rows), folder / "calibration.png")
    plot_scores(rows, folder / "scores.png")
    scores, tokens = (np.array([row[name] for row in rows]) for name in ("scores", "tokens"))
    header = ("accuracy", *(level.name.lower() for level in reversed(Strength)), "all", "pairs")
    return [
        "## Accuracy (paper, Tables 7 and 8)",
        table(header, accuracy_table(rows)),
        *([table(("accuracy by safety label", ""), safety_table(rows))] if is_labelled(rows) else []),
        "## Calibration",
        "![Share of wins against predicted probability](calibration.png)",
        "## Scores",
        f"Correlation with the length of answers, within pairs: {length_correlation(scores, tokens):.2f}.",
        "![Scores of chosen and rejected answers; score against length](scores.png)",
    ]


def plot_calibration(points: list[tuple[float, float, int]], path: Path) -> None:
    """Draws the share of wins against the predicted probability, beside the diagonal, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    predicted, won, count = zip(*points, strict=True)
    error = [2 * (max(w * (1 - w), 0.25 / n) / n) ** 0.5 for w, n in zip(won, count, strict=True)]
    axes.errorbar(predicted, won, error, fmt="o-", markersize=4, label="held out, 2 standard errors")
    axes.plot((0.5, 1), (0.5, 1), "k--", linewidth=1, label="calibrated")
    axes.set(xlabel="predicted probability of a win", ylabel="share of wins", xlim=(0.48, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_scores(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the distributions of the chosen and the rejected answers' scores, and scores against lengths, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scores, tokens = (np.array([row[name] for row in rows]) for name in ("scores", "tokens"))
    edges = np.linspace(scores.min(), scores.max() + 1e-6, 41)
    for side, name in enumerate(("chosen", "rejected")):
        left.hist(scores[:, side], edges, alpha=0.5, label=name)
        right.plot(tokens[:, side], scores[:, side], ".", markersize=3, alpha=0.5, label=name)
    left.set(xlabel="score", ylabel="answers")
    right.set(xlabel="tokens of the answer", ylabel="score")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def _accuracy(rows: list[dict[str, Any]]) -> str:
    return f"{accuracy_of(np.array([row['scores'] for row in rows])):.1%}" if rows else "-"
