"""The page on runs: the numbers of planted folders stand in it, it needs nothing else, and nothing of a folder's text runs."""

import json
import math
import re

import pytest

from llama_jax.evaluation.energy import Assumptions, footprint_of
from llama_jax.evaluation.report import plot_curves
from llama_jax.evaluation.runs import STAGES, from_base, read_run
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.stages.sft import SFTConfig
from tests.evaluation.planted_runs import (
    BEGAN,
    CONFIGS,
    PNG,
    as_json,
    page_of,
    plant,
    plant_evaluation,
    pretrain_config,
    report,
    step,
    write_events,
)


def test_the_numbers_of_a_run_stand_in_the_page(tmp_path, capsys):
    records = [
        step(1, 5.5),
        {"step": 20, "eval/loss": 4.0},
        step(20, 3.25),
        {"step": 30, "eval/loss": 2.5},
        step(30, 2),
    ]
    run = plant(tmp_path / "books", "pretrain", pretrain_config(), records, [(0, 1800), (3600, 5400)])
    (run / "samples" / "9.txt").write_text("an old one")
    (run / "samples" / "30.txt").write_text("Once|upon <b>a</b> time")
    page = page_of(capsys, tmp_path / "out", run)
    assert page.table("run", "stage", "steps", "began (UTC)", "starts", "devices", "folder") == [
        ["books", "pretrain", "30 of 40 (75%)", "2027-01-15 08:00", "2", "2 x cpu", str(run)]
    ]
    numbers = dict(page.table("", "books"))
    assert numbers["loss, first and last logged"] == "5.500, 2.000 nats"
    assert numbers["held out: loss, first and last"] == "4, 2.5"
    assert (numbers["steps"], numbers["tokens per second, median"]) == ("30", "2,000")
    assert page.table("run", "source", "share", "tokens read, by share") == [
        ["books", "text:books", "75.0%", "22,500"],
        ["books", "jsonl:code", "25.0%", "7,500"],
        ["books", "all", "", "30,000"],
    ]
    assert "Once|upon <b>a</b> time" in page.text and "an old one" not in page.text
    changed = {
        name: (base, here) for name, base, here in page.table("differs from the stage's default", "default", "here")
    }
    assert changed["batch_tokens"] == ("4194304", "1000") and changed["model.dim"] == ("-", "64")
    assert "seed" not in changed and "out" not in changed
    assert '"batch_tokens": 1000' in page.text and "jax 9.9" in page.text
    # Four device-hours: half an hour and an hour and a half, on two devices.
    header = ("run", "device", "time (device hours)", "power (W)", "energy (kWh)", "carbon (tCO2eq)")
    assert page.table(*header) == [["books", "cpu", "4.00", *["not known"] * 3]]
    page = page_of(capsys, tmp_path / "out", run, "--power-w", 250, "--kg-per-kwh", 0.5, "--pue", 1.2)
    assert page.table(*header) == [["books", "cpu", "4.00", "250", "1.20", "0.0006"]]
    assert "PUE 1.2" in page.text and "0.5 kg CO2eq a kWh" in page.text


def test_the_html_needs_nothing_else(tmp_path, capsys):
    run = plant(tmp_path / "r", "reward", records=[step(1, 0.7), step(2, 0.6)])
    away = "![a](https://example.com/a.png) ![b](../secret.png) [c](https://example.com) <https://example.com>"
    (run / "report.md").write_text(
        f"# Title\n\n{away} [the model](v1/report.md)\n\n## Scores\n\n![Shares](scores.png)\n"
    )
    (run / "scores.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    page = page_of(capsys, tmp_path / "out", run)
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "data", "srcset") if name in attrs]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "a b c https://example.com the model" in page.text and "Scores" in page.text
    assert "url(" not in (tmp_path / "out" / "report.html").read_text().split("</style>")[0]
    # The Markdown has its pictures beside it.
    markdown = (tmp_path / "out" / "report.md").read_text()
    local = [path for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown) if path.startswith("plots/")]
    assert len(local) == 2 and all((tmp_path / "out" / path).read_bytes()[:4] == b"\x89PNG" for path in local)
    assert "#### Scores" in markdown and "# Title" not in markdown


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "`<b>`</td></table><script>",
        "[x](javascript:alert(1))",
        "![x](javascript:alert(1))",
        "</code></pre><style>*{}</style>",
        "| a | b | \\| c `|` <i>",
        "</details><h1>mine</h1>",
        "```\n</details>\n<script>",
    ],
)
def test_text_of_models_and_data_is_shown_and_not_obeyed(tmp_path, capsys, text):
    config = as_json(RejectionConfig(checkpoint=text))
    config["data"] |= {"sources": [text, "other"]}
    run = plant(tmp_path / "reject", "rejection", config)
    sample = {"temperature": 1.0, "sample": 0, "text": text, "ended": "whole", "score": 1.5}
    row = {"prompt": [{"role": "user", "content": text}], "samples": [sample], "earlier": []}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (run / "report.md").write_text(f"# Title\n\n{text}\n\n| a |\n| --- |\n| {text.splitlines()[0]} |\n")
    (run / "samples" / "3.md").write_text(text)
    page = page_of(capsys, tmp_path / "out", run)
    quiet = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "p", "table", "thead", "tbody"}
    quiet |= {"tr", "th", "td", "code", "pre", "details", "summary", "strong", "em"}
    assert {tag for tag, _ in page.tags} <= quiet
    assert [tag for tag, _ in page.tags].count("style") == 1 and [tag for tag, _ in page.tags].count("h1") == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    shown = " ".join(text.replace("`", "'").split())
    assert page.table("prompt", "best answer", "score") == [[shown, shown, "1.5"]]
    assert page.table("run", "source", "share", "tokens read, by share")[0] == ["reject", shown, "as they are", "-"]


def test_runs_of_a_kind_lie_over_each_other(tmp_path, capsys, monkeypatch):
    drawn = {}

    def spy(runs, path, panels, unit="step"):
        drawn[path.name] = {name: [record.get("train/loss") for record in records] for name, records in runs.items()}
        return plot_curves(runs, path, panels, unit)

    monkeypatch.setattr("llama_jax.evaluation.run_page.plot_curves", spy)
    folders = [
        plant(
            tmp_path / place / "sft",
            "sft",
            as_json(SFTConfig(checkpoint="hub", rows=rows)),
            [step(1, loss), step(2, 1)],
        )
        for place, rows, loss in (("a", 4, 3.0), ("b", 8, 2.0))
    ]
    page = page_of(capsys, tmp_path / "out", *folders, folders[0])
    assert drawn == {"sft.png": {"a/sft": [3.0, 1], "b/sft": [2.0, 1]}}
    numbers, differing = (one[1:] for one in page.tables if one[0] == ["", "a/sft", "b/sft"])
    assert ["loss, first and last logged", "3.000, 1.000 nats", "2.000, 1.000 nats"] in numbers
    assert differing == [["rows", "4", "8"]]


def test_curves_of_several_runs_are_in_one_plot(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("llama_jax.evaluation.report.save_figure", lambda figure, path: figures.append(figure))
    runs = {"a": [step(1, 3.0), step(2, 2.0), {"step": 2, "eval/loss": 2.5}], "b": [step(1, 2.75)]}
    panels = (("loss", ("train/loss", "eval/loss")), ("nothing", ("train/none",)))
    assert plot_curves(runs, tmp_path / "x.png", panels)
    (figure,) = figures
    (axes,) = figure.axes
    lines = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
    assert lines == [[(1, 3.0), (2, 2.0)], [(2, 2.5)], [(1, 2.75)], []]
    assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["a", "b"]
    assert not plot_curves(runs, tmp_path / "x.png", panels[1:]) and len(figures) == 1


def test_the_papers_table_2():
    """Its rows are cut after two decimals, not rounded; its total is of the whole numbers."""
    paper = {
        7: (184_320, 400, 31.22),
        13: (368_640, 400, 62.44),
        34: (1_038_336, 350, 153.90),
        70: (1_720_320, 400, 291.42),
    }
    tonnes = {}
    for size, (hours, watts, printed) in paper.items():
        footprint, chip_hours = footprint_of("NVIDIA A100-SXM4-80GB", hours, Assumptions(power_w=watts))
        tonnes[size] = footprint.tonnes
        assert chip_hours == hours and math.floor(footprint.tonnes * 100) / 100 == printed
    assert math.floor(sum(tonnes.values()) * 100) / 100 == 539.00


def test_power_is_published_given_or_not_known():
    assert footprint_of("TPU v4", 10, Assumptions())[0].watts == 192
    assert footprint_of("NVIDIA A100-SXM4-80GB", 10, Assumptions())[0].watts == 400  # the paper's
    assert footprint_of("TPU v5 lite", 10, Assumptions()) == (None, 10)
    assert footprint_of("cpu", 10, Assumptions()) == (None, 10)
    assert footprint_of("cpu", 10, Assumptions(power_w=65))[0].watts == 65
    assert footprint_of("TPU7x", 10, Assumptions())[1] == 5  # two of jax's devices are one chip
    assert footprint_of("", 10, Assumptions(power_w=65))[0] is None


def test_time_is_of_every_start_on_what_it_was(tmp_path):
    run = plant(tmp_path / "run", "sft", records=[step(1, 1.0)], spells=[(0, 3600), (7200, 1800)])
    known = json.loads((run / "config.json").read_text())
    known["starts"].append({"at": "2027-01-15T09:59:00+00:00", "device": "TPU v4", "devices": 16})
    (run / "config.json").write_text(json.dumps(known))
    killed = write_events(run, BEGAN + 9000, BEGAN + 9360, BEGAN + 10_000)
    killed.write_bytes(killed.read_bytes()[:-3])  # its last event was not finished
    spells = read_run(run, "run").spells
    assert [(one.device, one.device_hours) for one in spells] == [("cpu", 2.0), ("TPU v4", 8.0), ("TPU v4", 1.6)]


def test_several_devices_have_a_line_each_and_a_total(tmp_path, capsys):
    folders = [
        plant(tmp_path / name, "sft", records=[step(1, 1.0)], spells=[(0, 3600)], start=start)
        for name, start in (("a", ("TPU v4", 500)), ("b", ("NVIDIA H100 80GB HBM3", 100)))
    ]
    header = ("run", "device", "time (device hours)", "power (W)", "energy (kWh)", "carbon (tCO2eq)")
    rows = page_of(capsys, tmp_path / "out", *folders).table(*header)
    assert rows[0] == ["a", "TPU v4", "500.00", "192", "105.60", f"{500 * 0.192 * 1.1 * 0.385 / 1000:.3g}"]
    assert rows[1] == ["b", "NVIDIA H100 80GB HBM3", "100.00", "700", "77.00", f"{100 * 0.7 * 1.1 * 0.385 / 1000:.3g}"]
    assert rows[2] == ["total", "", "600.00", "", "182.60", f"{182.6 * 0.385 / 1000:.3g}"]
    folders.append(plant(tmp_path / "c", "sft", records=[step(1, 1.0)], spells=[(0, 3600)]))
    rows = page_of(capsys, tmp_path / "out", *folders).table(*header)
    assert rows[3] == ["total", "", "not known", "", "not known", "not known"]


def test_every_stage_has_a_page(tmp_path, capsys):
    """From its defaults, before it logged anything: a run that was stopped at once."""
    stages = [*CONFIGS, "pretrain"]
    assert set(stages) == set(STAGES)
    folders = [plant(tmp_path / stage, stage, None if stage in CONFIGS else pretrain_config()) for stage in stages]
    page = page_of(capsys, tmp_path / "out", *folders)
    came = page.table("run", "stage", "steps", "began (UTC)", "starts", "devices", "folder")
    planned = dict.fromkeys(("ppo", "pretrain"), "none logged, of 40")
    assert {row[0]: row[2] for row in came} == dict.fromkeys(stages, "-") | planned
    for stage in CONFIGS:
        changed = from_base(read_run(tmp_path / stage, stage))
        own = [("iterations", PPOConfig().iterations, 40)] if stage == "ppo" else []
        assert changed == [("checkpoint", "", "hub"), *own]


def test_ppo_has_its_own_curves_and_numbers(tmp_path, capsys):
    records = [{"step": 0, "eval/reward": 0.25}, {"step": 1, "reward/mean": 0.5, "kl/sequence": 0.0}]
    records += [{"step": 8, "reward/mean": 0.75, "kl/sequence": 1.5}, {"step": 8, "eval/reward": 0.875}]
    page = page_of(capsys, tmp_path / "out", plant(tmp_path / "ppo", "ppo", records=records))
    assert page.table("", "ppo") == [
        ["reward/mean, first and last", "0.5, 0.75"],
        ["eval/reward, first and last", "0.25, 0.875"],
        ["kl/sequence, first and last", "0, 1.5"],
    ]
    assert page.table("run", "stage", "steps", "began (UTC)", "starts", "devices", "folder")[0][2] == "8 of 40 (20%)"


def test_an_rlhf_brings_its_runs(tmp_path, capsys):
    whole = plant(tmp_path / "rlhf", "rlhf")
    plant(whole / "v1", "rlhf version", {"number": 1})
    for stage in ("sft", "ppo"):
        plant(whole / "v1" / stage, stage)
    header = ("run", "stage", "steps", "began (UTC)", "starts", "devices", "folder")
    named = [row[0] for row in page_of(capsys, tmp_path / "out", whole).table(*header)]
    assert named == ["rlhf", "ppo", "sft"]
    named = [row[0] for row in page_of(capsys, tmp_path / "out", whole / "v1").table(*header)]
    assert named == ["ppo", "sft"]


def test_an_evaluation_stands_beside_the_paper(tmp_path, capsys):
    page = page_of(capsys, tmp_path / "out", plant_evaluation(tmp_path / "eval"))
    header = ["task", "group", "shots", "n", "metric", "value", "interval", "paper", "paper model", "difference"]
    assert page.table(*header) == [
        ["boolq", "reading", "0", "3270", "acc", "71.25", "69.7 to 72.8", "77.4", "7B", "-6.15"],
        ["mine", "", "1", "10", "em", "50", "-", "-", "-", "-"],
    ]
    assert page.table("group", "value", "paper", "difference") == [["reading", "60.5", "61.3", "-0.8"]]


def test_bad_input(tmp_path, capsys):
    run = plant(tmp_path / "runs" / "run", "sft", records=[step(1, 1.0)])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.md").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text('{"tasks": 3}')
    out = tmp_path / "out"
    for words, message in (
        ([], "name a run first"),
        ([tmp_path / "none"], "there is no run at"),
        ([tmp_path / "hf"], "hf is no run; expected a folder with the config.json of a stage"),
        ([tmp_path / "runs"], f"runs in it: llama-jax report {run}"),
        ([run, "--out", run], "lies in the run"),
        ([run, "--out", run / "samples" / "x"], "lies in the run"),
        ([run, "--out", tmp_path / "full"], "holds something else than a report"),
        ([run, "--out", tmp_path / "file"], "is a file"),
        ([run, "--power-w", "-1"], "--power-w must be above 0"),
        ([run, "--pue", "0.5"], "--pue 1 or more"),
        ([tmp_path / "eval"], "results.json cannot be read"),
        ([run, "--model-card"], "is not a checkpoint"),
    ):
        code, said, err = report(capsys, *(words if "--out" in words else [*words, "--out", out]))
        assert code == 2 and said == "" and "Traceback" not in err, words
        assert message in " ".join(err.replace("│", " ").split()), (words, err)
    assert (tmp_path / "full" / "report.md").read_text() == "mine" and not (out / "report.md").exists()
    (run / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    assert "metrics.jsonl:2" in report(capsys, run, "--out", out)[2]
    second = plant(tmp_path / "runs" / "second", "sft")
    assert "of one model, and 2 runs are named" in report(capsys, run, second, "--model-card", "--out", out)[2]
