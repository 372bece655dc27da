"""The page that a pipeline leaves behind: Markdown with its curves, scores, samples and recipes."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import write_whole


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """Writes sections of Markdown under a title, and gives the path."""
    write_whole(path, ("\n\n".join([f"# {title}", *sections]) + "\n").encode())
    return path


def training_section(folder: Path, page: Path) -> str:
    """What a run's training came to: its curve, which is drawn into the folder, and its numbers, samples and recipe.

    Args:
      folder: a run's folder, with config.json, metrics.jsonl and, where there are any, samples/.
      page: where the section will stand, for the link to the plot.
    """
    records = read_metrics(folder)
    run = json.loads((folder / "config.json").read_text())
    plot_loss(records, folder / "loss.png")
    train = [record for record in records if "train/loss" in record]
    last = train[-1]
    numbers = {
        "steps": last["step"],
        "loss, first and last logged": f"{train[0]['train/loss']:.3f}, {last['train/loss']:.3f} nats per token",
        "steps skipped as not finite": last["train/skipped"],
        "tokens per second, median": f"{median_high([record['train/tokens_per_s'] for record in train]):,.0f}",
        "share of time waiting for data, median": f"{median_high([record['train/data_wait'] for record in train]):.1%}",
    }
    parts = [
        f"![Loss against training steps]({(folder / 'loss.png').relative_to(page.parent)})",
        table(("training", ""), numbers.items()),
        newest_sample(folder),
        f"<details><summary>Recipe</summary>\n\n```json\n{json.dumps(run['config'], indent=2)}\n```\n\n"
        f"{', '.join(f'{name} {version}' for name, version in run['versions'].items())}\n</details>",
    ]
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Any) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draws training loss and held-out loss against steps into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train/loss", "training batch", "-"), ("eval/loss", "held out", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_shares(shares: dict[str, dict[str, float]], path: Path) -> None:
    """Draws bars of shares, 0 to 1, into a PNG: for each name of the first model's a group with one bar a model."""
    from matplotlib.figure import Figure

    names = list(next(iter(shares.values())))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(shares)
    for i, (model, values) in enumerate(shares.items()):
        places = [place + (i - (len(shares) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, [values[name] for name in names], width, label=model)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=45, ha="right")
    axes.set(ylabel="share", ylim=(0, 1))
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    _save(figure, path)


def newest_sample(folder: Path) -> str:
    """The text of the newest file in samples/, as a block quote; empty where there is none."""
    files = sorted((folder / "samples").glob("*.txt"), key=lambda path: int(path.stem))
    if not files:
        return ""
    lines = files[-1].read_text().splitlines()
    return f"A sample after step {files[-1].stem}; the prompt ends at the bar.\n\n" + "\n".join(
        f"    {line}" for line in lines
    )


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
