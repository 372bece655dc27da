"""The report on versions of RLHF (paper 3.4.1, Figures 11 and 12): their scores, and what each of them was made of."""

import io
import json
from pathlib import Path
from typing import Any

from llama_jax.data.samples import best_sample, read_samples
from llama_jax.errors import UserError
from llama_jax.evaluation.best_of_n import write_rejection_report
from llama_jax.evaluation.ppo import write_ppo_report
from llama_jax.evaluation.report import table, write_page
from llama_jax.evaluation.rewards import write_reward_report
from llama_jax.stages.reward import FINDINGS
from llama_jax.stages.rlhf import SCORES
from llama_jax.training.run_folder import write_whole

JUDGED = ("helpfulness", "safety", "reward", "wins", "wins_over_first", "tokens", "cut")
MOST_CURVES = 6

HOW = """All of it is the judgement of version {newest}'s reward models on the answers of every version to the same held-out
prompts. Helpfulness and safety are mean probabilities, over prompts that are not adversarial and over those that are; the
reward is that of the piecewise rule, over all. Wins are the share of prompts whose answer has a higher reward than the version
before gave, ties apart; cut are answers that the limit ended."""


def read_versions(folder: str | Path) -> list[dict[str, Any]]:
    """The scores of every version that is done, 0 first.

    Raises:
      UserError: none is.
    """
    versions: list[dict[str, Any]] = []
    while (path := Path(folder) / f"v{len(versions)}" / SCORES).exists():
        versions.append(json.loads(path.read_text()))
    if not versions:
        raise UserError(f"{folder} holds no version with {SCORES}; expected the folder of a run of llama-jax rlhf")
    return versions


def write_versions_report(folder: str | Path) -> Path:
    """Writes report.md with its plot into the folder of a run of the rlhf stage, and gives its path; the reports of the
    reward models and of rejection sampling stand in their own folders.

    Raises:
      UserError: no version is done.
    """
    folder = Path(folder)
    versions = read_versions(folder)
    newest = len(versions) - 1
    plot_versions(versions, folder / "versions.png")
    sections = ["![Scores of the versions](versions.png)"]
    if newest:
        judged = versions[newest]["judged"]
        rows = [(made_by(folder, number), *(_shown(one[name]) for name in JUDGED)) for number, one in enumerate(judged)]
        header = ("version", *(name.replace("_", " ") for name in JUDGED))
        sections += ["## What the reward models think of them", HOW.format(newest=newest), table(header, rows)]
    if names := list(versions[newest]["measured"]):
        rows = [
            (number, *(_shown(version["measured"].get(name)) for name in names))
            for number, version in enumerate(versions)
        ]
        header = ("version", *(name.replace("_", " ") for name in names))
        sections += ["## What was measured", table(header, rows)]
    if newest:
        rows = [(number, *made_of(folder / f"v{number}")) for number in range(1, newest + 1)]
        header = ("version", "helpfulness model", "safety model", "prompts with their best answer", "its mean score")
        sections += ["## What they were made of", table(header, rows)]
    return write_page(folder / "report.md", f"Versions of {folder.name}", sections)


def made_by(folder: Path, number: int) -> str:
    """A version's number, and in a word how it was made."""
    if not number:
        return "0: before RLHF"
    ppo = folder / f"v{number}" / "ppo"
    if not ppo.exists():
        return f"{number}: rejection sampling"
    if not (ppo / "report.md").exists():
        write_ppo_report(ppo)
    return f"{number}: rejection sampling, then [PPO](v{number}/ppo/report.md)"


def made_of(folder: Path) -> tuple[str, str, int, str]:
    """Held-out accuracy of a version's reward models, how many answers were trained on and how many of them are from earlier
    versions, and their mean score; with links to the reports, which are written if they are not there.
    """
    judges = []
    for name in ("helpfulness", "safety"):
        if not (folder / name / FINDINGS).exists():
            judges.append("-")
            continue
        if not (folder / name / "report.md").exists():
            write_reward_report(folder / name)
        findings = json.loads((folder / name / FINDINGS).read_text())["findings"]
        said = f"{findings['accuracy']:.1%} of {findings['pairs']} held-out pairs" if findings else "not evaluated"
        judges.append(f"[{said}]({folder.name}/{name}/report.md)")
    if not (folder / "reject" / "report.md").exists():
        write_rejection_report(folder / "reject")
    best = list(filter(None, map(best_sample, read_samples(folder / "reject"))))
    earlier = sum("run" in one for one in best)
    kept = f"[{len(best)}]({folder.name}/reject/report.md)" + f", {earlier} from earlier versions" * bool(earlier)
    return *judges, kept, f"{sum(one['score'] for one in best) / len(best):.4g}"


def plot_versions(versions: list[dict[str, Any]], path: Path) -> None:
    """Draws into a PNG, against the version, what the newest reward models think, and beside it the first of what was
    measured.
    """
    from matplotlib.figure import Figure

    judged = versions[-1]["judged"]
    panels = {
        "probability, by the newest reward models": {
            name: [one[name] for one in judged] for name in ("helpfulness", "safety", "reward") if judged
        },
        "measured": {
            name: [version["measured"].get(name) for version in versions]
            for name in list(versions[-1]["measured"])[:MOST_CURVES]
        },
    }
    panels = {title: curves for title, curves in panels.items() if curves} or panels
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in curves.items():
            points = [(number, value) for number, value in enumerate(values) if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name.replace("_", " "))
        axes.set(xlabel="version", ylabel=title, xticks=range(len(versions)))
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(path, drawn.getvalue())


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
