"""What the pages that runs leave behind are made of: Markdown, tables, curves and samples."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import write_whole

Records = list[dict[str, Any]]
Panels = tuple[tuple[str, tuple[str, ...]], ...]

# What is drawn: a panel's title, and the names of its curves; what is measured on held-out data comes last.
LOSS_PANEL: Panels = (("loss (nats)", ("train/loss", "eval/loss")),)
TRAINING_PANELS: Panels = (
    *LOSS_PANEL,
    ("accuracy", ("train/accuracy", "eval/accuracy")),
    ("held-out bits per byte", ("eval/bits_per_byte",)),
    ("learning rate", ("train/lr",)),
    ("gradient norm", ("train/grad_norm",)),
    ("tokens per second", ("train/tokens_per_s",)),
)
PPO_PANELS: Panels = (
    ("reward", ("reward/mean", "eval/reward")),
    ("KL to the reference (nats an answer)", ("kl/sequence",)),
    ("entropy (nats a token)", ("policy/entropy",)),
    ("share of tokens clipped", ("policy/clip_fraction",)),
    ("explained variance of returns", ("critic/explained_variance",)),
    ("length of answers (tokens)", ("answers/length", "eval/length")),
)
MOST_LINES = 100  # of a sample


@dataclass(frozen=True)
class Folded:
    """A section that a reader opens when it is wanted."""

    title: str
    text: str


Section = str | Folded


def as_markdown(section: Section) -> str:
    """A section as Markdown; what is folded is HTML's, which Markdown may hold."""
    if isinstance(section, Folded):
        return f"<details><summary>{section.title}</summary>\n\n{section.text}\n</details>"
    return section


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes sections of Markdown under a title, and gives the path."""
    write_whole(path, ("\n\n".join([f"# {title}", *map(as_markdown, sections)]) + "\n").encode())
    return path


def training_section(folder: Path, page: Path) -> str:
    """What a run's training came to: its curve, which is drawn into the folder, and its numbers, samples and recipe.

    Args:
      folder: a run's folder, with config.json, metrics.jsonl and, where there are any, samples/.
      page: where the section will stand, for the link to the plot.
    """
    records = read_metrics(folder)
    run = json.loads((folder / "config.json").read_text())
    plot_curves({folder.name: records}, folder / "loss.png", LOSS_PANEL)
    parts = [
        f"![Loss against training steps]({(folder / 'loss.png').relative_to(page.parent)})",
        table(("training", ""), training_numbers(records).items()),
        newest_sample(folder),
        as_markdown(recipe_of(run["config"], run["versions"])),
    ]
    return "\n\n".join(part for part in parts if part)


def training_numbers(records: Records) -> dict[str, str]:
    """What a run of training came to, from its metrics; nothing if it logged no step."""
    train = [record for record in records if "train/loss" in record]
    if not train:
        return {}
    first, last = train[0], train[-1]
    numbers = {
        "steps": f"{last['step']:,}",
        "loss, first and last logged": f"{first['train/loss']:.3f}, {last['train/loss']:.3f} nats",
    }
    for name in dict.fromkeys(name for record in records for name in record if name.startswith("eval/")):
        values = [record[name] for record in records if name in record]
        title = name.removeprefix("eval/").replace("_", " ")
        numbers[f"held out: {title}, first and last"] = f"{values[0]:.4g}, {values[-1]:.4g}"
    numbers |= {
        "steps skipped as not finite": str(last["train/skipped"]),
        "tokens per second, median": f"{median_high([record['train/tokens_per_s'] for record in train]):,.0f}",
        "share of time waiting for data, median": f"{median_high([record['train/data_wait'] for record in train]):.1%}",
    }
    if "train/mfu" in last:
        numbers["MFU, median"] = f"{median_high([record.get('train/mfu', 0.0) for record in train]):.1%}"
    return numbers


def recipe_of(config: dict[str, Any], versions: dict[str, str]) -> Folded:
    """A run's whole recipe, and the versions it ran with."""
    own = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Folded("Recipe", f"```json\n{json.dumps(config, indent=2)}\n```\n\n{own}")


def table(header: Sequence[Any], rows: Any) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(text: str) -> str:
    """Text that is not ours, as code in a table's cell: what it holds is neither markup nor the cell's end."""
    line = " ".join(text.replace("`", "'").split())
    return f"`{line.replace('|', chr(92) + '|')}`" if line else ""


def plot_curves(runs: dict[str, Records], path: Path, panels: Panels, unit: str = "step") -> bool:
    """Draws what runs logged against their steps into a PNG, one over the other; says whether there was anything to draw.

    Args:
      runs: the records of each, by its name.
      path: of the PNG.
      panels: what to draw; those of which no run has anything are left out.
      unit: what a step is called.
    """
    from matplotlib.figure import Figure

    logged = {name for records in runs.values() for record in records for name in record}
    panels = tuple(panel for panel in panels if logged & set(panel[1]))
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (7, 4) if len(panels) == 1 else (3.4 * columns, 2.75 * rows)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        for number, records in enumerate(runs.values()):
            for place, name in enumerate(names):
                points = [(record["step"], record[name]) for record in records if name in record]
                style = "o--" if name.startswith("eval/") else "-"
                color = f"C{number if len(runs) > 1 else place}"
                axes.plot(*zip(*points, strict=True) if points else ([], []), style, color=color, markersize=3)
        axes.set(title=title, xlabel=unit)
        axes.grid(alpha=0.3)
        if len(runs) == 1 and logged.issuperset(names) and len(names) > 1:
            axes.legend(axes.lines, ("trained on", "held out"))
    for spare in list(figure.axes)[len(panels) :]:
        spare.remove()
    if len(runs) > 1:
        figure.legend(figure.axes[0].lines[:: len(panels[0][1])], runs, loc="outside lower center", ncols=4)
    save_figure(figure, path)
    return True


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
    save_figure(figure, path)


def newest_sample(folder: Path) -> str:
    """The text of the newest file in samples/, as it is; empty where there is none."""
    files = [path for path in (folder / "samples").glob("*") if path.suffix in (".txt", ".md") and path.stem.isdigit()]
    if not files:
        return ""
    newest = max(files, key=lambda path: int(path.stem))
    lines = newest.read_text(encoding="utf-8", errors="replace").splitlines()
    shown = [f"    {line}" for line in lines[:MOST_LINES]]
    more = f"\n\n{len(lines) - MOST_LINES} further lines: {newest}" if len(lines) > MOST_LINES else ""
    bar = "; the prompt ends at the bar" if newest.suffix == ".txt" else ""
    return f"A sample after step {int(newest.stem)}{bar}.\n\n" + "\n".join(shown) + more


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a whole PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(path, drawn.getvalue())
