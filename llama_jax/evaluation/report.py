"""The report of a run: one Markdown page with its curve, scores, samples and recipe."""

import json
from pathlib import Path
from typing import Any

from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import write_whole


def write_report(folder: Path, bits_per_byte: dict[str, float]) -> Path:
    """Writes report.md and loss.png into a run's folder.

    Args:
      folder: a run's folder, with config.json, metrics.jsonl and samples/.
      bits_per_byte: of the held-out documents, by name of the model or compressor, in the order to be shown.

    Returns:
      the path of report.md.
    """
    records = read_metrics(folder)
    run = json.loads((folder / "config.json").read_text())
    plot_loss(records, folder / "loss.png")
    train = [record for record in records if "train/loss" in record]
    last = train[-1]
    scores = "\n".join(f"| {name} | {bits:.3f} |" for name, bits in bits_per_byte.items())
    page = f"""# {run["stage"]} run {folder.name}

![Loss against training tokens](loss.png)

| held-out documents | bits per byte |
|---|---|
{scores}

The model's bits include the end of every document, and do not count the model itself.

| training | |
|---|---|
| steps | {last["step"]} |
| loss, first and last logged | {train[0]["train/loss"]:.3f}, {last["train/loss"]:.3f} nats per token |
| steps skipped as not finite | {last["train/skipped"]} |
| tokens per second, median | {median([record["train/tokens_per_s"] for record in train]):,.0f} |
| share of time waiting for data, median | {median([record["train/data_wait"] for record in train]):.1%} |

## Samples

{newest_sample(folder)}

## Recipe

```json
{json.dumps(run["config"], indent=2)}
```

{", ".join(f"{name} {version}" for name, version in run["versions"].items())}
"""
    write_whole(folder / "report.md", page.encode())
    return folder / "report.md"


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draws training loss and held-out loss against steps into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train/loss", "training batch", "-"), ("eval/loss", "held-out documents", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def newest_sample(folder: Path) -> str:
    """The text of the newest file in samples/, as a block quote; a note where there is none."""
    files = sorted((folder / "samples").glob("*.txt"), key=lambda path: int(path.stem))
    if not files:
        return "None were asked for."
    lines = files[-1].read_text().splitlines()
    return f"After step {files[-1].stem}; the prompt ends at the bar.\n\n" + "\n".join(f"    {line}" for line in lines)


def median(values: list[float]) -> float:
    """The middle value; of two middle ones the greater."""
    return sorted(values)[len(values) // 2]
