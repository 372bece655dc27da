"""One page on runs of any stage, and on evaluations: curves, numbers, samples, data, energy and recipes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.samples import SAMPLES, best_sample, read_samples
from llama_jax.errors import UserError
from llama_jax.evaluation.energy import Assumptions, energy_section
from llama_jax.evaluation.html_page import write_html
from llama_jax.evaluation.report import (
    PPO_PANELS,
    TRAINING_PANELS,
    Section,
    cell,
    newest_sample,
    plot_curves,
    recipe_of,
    table,
    training_numbers,
    write_page,
)
from llama_jax.evaluation.runs import CARD, RESULTS, STAGES, Run, by_stage, from_base, run_folder, without_place
from llama_jax.training.run_folder import differences

MARKDOWN, HTML = "report.md", "report.html"
PLOTS = "plots"  # the folder of the page's pictures
TASK_COLUMNS = ("task", "group", "shots", "n", "metric", "value", "interval", "paper", "paper_model", "difference")
MOST_DIFFERENCES, MOST_NAMES, MOST_SAMPLES = 60, 4, 5


def write_run_page(
    runs: Sequence[Run], evaluations: Sequence[Path], out: Path, assumed: Assumptions
) -> tuple[Path, Path]:
    """Writes report.md, with its pictures beside it, and report.html, with them inside, and gives both paths.

    Raises:
      UserError: the results of an evaluation cannot be read.
    """
    names = [*(run.name for run in runs), *(folder.name for folder in evaluations)]
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    title = f"Report on {', '.join(names[:MOST_NAMES])}{rest}"
    sections = page_sections(runs, evaluations, out, assumed)
    return write_page(out / MARKDOWN, title, sections), write_html(out / HTML, title, sections)


def check_out(out: Path) -> None:
    """Refuses a folder that is of a run, or holds something else than an earlier report.

    Raises:
      UserError: it is.
    """
    if run := next((one for one in (out, *out.parents) if run_folder(one) == one), None):
        raise UserError(
            f"--out {out} lies in the run {run}, which is read by what goes on with it; name a folder elsewhere"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / own).exists() for own in (HTML, PLOTS, CARD)):
        raise UserError(f"--out {out} holds something else than a report; name a new folder, or an earlier report's")


def page_sections(runs: Sequence[Run], evaluations: Sequence[Path], out: Path, assumed: Assumptions) -> list[Section]:
    """The page's sections; its pictures are drawn and copied into `plots/` of `out`.

    Raises:
      UserError: the results of an evaluation cannot be read.
    """
    beside_paper = [section for folder in evaluations for section in evaluation_sections(folder)]
    (out / PLOTS).mkdir(parents=True, exist_ok=True)
    sections: list[Section] = [overview(runs)] if runs else []
    for stage, own in by_stage(runs).items():
        sections += stage_sections(stage, own, out)
    sections += beside_paper
    if runs:
        sections += ["## Data", data_table(runs), "## Energy and carbon (paper 2.2.1, Table 2)"]
        sections += [energy_section(runs, assumed), "## Recipes and versions", *recipe_sections(runs)]
    return [section for section in sections if section]


def overview(runs: Sequence[Run]) -> str:
    """A line for each run: how far it came, when, and on what."""
    rows = []
    for run in runs:
        first, last = (run.spells[0], run.spells[-1]) if run.spells else (None, None)
        device = f"{last.devices} x {last.device}" if last and last.devices else "-"
        when = f"{first.began:%Y-%m-%d %H:%M}" if first else "-"
        rows.append(
            (cell(run.name), run.stage, progress(run), when, len(run.spells) or "-", device, cell(str(run.folder)))
        )
    return table(("run", "stage", "steps", "began (UTC)", "starts", "devices", "folder"), rows)


def progress(run: Run) -> str:
    """How many steps a run has logged, and of how many where it says so."""
    if run.steps is None:
        return "-" if run.planned is None else f"none logged, of {run.planned:,}"
    return f"{run.steps:,}" + ("" if run.planned is None else f" of {run.planned:,} ({run.steps / run.planned:.0%})")


def stage_sections(stage: str, runs: Sequence[Run], out: Path) -> list[str]:
    """What runs of one kind came to: their curves over each other, their numbers beside each other, then each run's own."""
    sections = [f"## {STAGES[stage][0] if stage in STAGES else stage}"]
    is_ppo = stage == "ppo"
    panels, unit = (PPO_PANELS, "iteration") if is_ppo else (TRAINING_PANELS, "step")
    picture = f"{PLOTS}/{stage.replace(' ', '-')}.png"
    if plot_curves({run.name: run.records for run in runs}, out / picture, panels, unit):
        lines = "Lines: what was trained on; lines with points: held out."
        sections += [f"![Curves of {stage}]({picture})", lines]
    numbers = [ppo_numbers(run.records) if is_ppo else training_numbers(run.records) for run in runs]
    if names := list(dict.fromkeys(name for own in numbers for name in own)):
        rows = [(name, *(own.get(name, "-") for own in numbers)) for name in names]
        sections.append(table(("", *(cell(run.name) for run in runs)), rows))
    for run in runs:
        own = "" if is_ppo else own_report(run, out)  # PPO's has these curves and numbers again
        if texts := [text for text in (own, newest_sample(run.folder), drawn_samples(run.folder)) if text]:
            sections += [f"### {cell(run.name)}", *texts]
    return sections


def ppo_numbers(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a run of PPO came to, from its metrics: first and last of what its curves show."""
    numbers = {}
    for _, names in PPO_PANELS:
        for name in names:
            if values := [record[name] for record in records if name in record]:
                numbers[f"{name}, first and last"] = f"{values[0]:.4g}, {values[-1]:.4g}"
    return numbers


def own_report(run: Run, out: Path) -> str:
    """What the stage wrote about the run at its end, below our headings, its pictures copied; empty if there is nothing."""
    path = run.folder / "report.md"
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A# .*\n+", "", text)
    text = re.sub(r"^(#+ )", r"##\1", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*report\.md\)", r"\1", text)  # links to pages that do not come along

    def copied(picture: re.Match) -> str:
        source = run.folder / picture[2]
        if not source.is_file():
            return f"*{picture[1]}: {picture[2]} is not there*"
        target = f"{PLOTS}/{run.name.replace('/', '-')}-{picture[2]}"
        (out / target).write_bytes(source.read_bytes())
        return f"![{picture[1]}]({target})"

    return re.sub(r"!\[([^\]]*)\]\(([\w-]+\.png)\)", copied, text).strip()


def drawn_samples(folder: Path) -> str:
    """The first prompts of a stage that samples, each with its best answer; empty of another."""
    if not (folder / SAMPLES).exists():
        return ""
    rows = []
    for row in read_samples(folder)[:MOST_SAMPLES]:
        best = best_sample(row)
        answer = (cell(best["text"]), f"{best['score']:.4g}") if best else ("-", "-")
        rows.append((cell(row["prompt"][-1]["content"]), *answer))
    return table(("prompt", "best answer", "score"), rows)


def evaluation_sections(folder: Path) -> list[str]:
    """An evaluation's tables, beside the paper.

    Raises:
      UserError: its results cannot be read.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_bytes())
        tasks, groups = results["tasks"], results.get("groups", [])
        tables = [_table_of(rows) for rows in (tasks, groups) if rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); run the evaluation again") from error
    return [f"## Benchmarks, beside the paper: {folder.name}", *tables]


def _table_of(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name in TASK_COLUMNS if any(row.get(name) is not None for row in rows)]
    names += [name for name in rows[0] if name not in TASK_COLUMNS and not isinstance(rows[0][name], dict | list)]
    return table(
        [name.replace("_", " ") for name in names], [[_shown(row.get(name)) for name in names] for row in rows]
    )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return cell(value) if isinstance(value, str) else str(value)


def data_table(runs: Sequence[Run]) -> str:
    """A line for each source of each run: its share of the mixture, and the tokens that were read where the run counts them."""
    rows = []
    for run in runs:
        data = run.config.get("data", {})
        sources, weights = data.get("sources", []), data.get("weights") or []
        tokens = run.steps * run.config["batch_tokens"] if run.stage == "pretrain" and run.steps else None
        for number, source in enumerate(sources):
            share = weights[number] / sum(weights) if weights else 1.0 if len(sources) == 1 else None
            mixed = "as they are" if share is None else f"{share:.1%}"
            read = "-" if tokens is None or share is None else f"{tokens * share:,.0f}"
            rows.append((cell(run.name), cell(source), mixed, read))
        if tokens is not None and len(sources) > 1:
            rows.append((cell(run.name), "all", "", f"{tokens:,}"))
    return (
        table(("run", "source", "share", "tokens read, by share"), rows) if rows else "No run has a source of its own."
    )


def recipe_sections(runs: Sequence[Run]) -> list[Section]:
    """Of each run what differs from its stage's defaults, then everything; before that in what runs of a kind differ."""
    sections: list[Section] = []
    for stage, own in by_stage(runs).items():
        if len(own) > 1:
            sections += [f"### In what the runs of {stage} differ", differing(own)]
    for run in runs:
        sections.append(f"### Recipe of {cell(run.name)}")
        if (changes := from_base(run)) is not None:
            rows = [(name, _json(base), _json(value)) for name, base, value in changes]
            sections.append(table(("differs from the stage's default", "default", "here"), rows[:MOST_DIFFERENCES]))
            if len(rows) > MOST_DIFFERENCES:
                sections.append(f"{len(rows) - MOST_DIFFERENCES} further differences stand in the whole recipe.")
        sections.append(recipe_of(run.config, run.versions))
    return sections


def differing(runs: Sequence[Run]) -> str:
    """The fields in which runs of a kind differ, a column for each."""
    recipes = [without_place(run.config) for run in runs]
    names = dict.fromkeys(name for own in recipes[1:] for name, *_ in differences(recipes[0], own))
    rows = [(name, *(_json(_field(own, name)) for own in recipes)) for name in names]
    return table(("", *(cell(run.name) for run in runs)), rows)


def _field(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _json(value: Any) -> str:
    return "-" if value is None else cell(json.dumps(value, ensure_ascii=False))
