"""The report on versions: what the newest judges think of all of them, in lines and in a plot."""

import json
import re
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.versions import plot_versions, read_versions, write_versions_report
from tests.evaluation.test_ppo import write_run


def judged(reward: float, wins: float | None, safety: float | None = 0.5) -> dict:
    own = {"helpfulness": reward + 0.1, "safety": safety, "reward": reward}
    return own | {"wins": wins, "wins_over_first": wins, "tokens": 7.25, "cut": 0.125}


def write_version(folder: Path, number: int, measured: dict, safety: float | None = 0.5) -> None:
    """The version's judges, like all before, think that each version is better than the last, and less of all of them."""
    path = folder / f"v{number}"
    rewards = [0.1 * one + 0.4 - 0.05 * number for one in range(number + 1)]
    scores = [judged(reward, 0.6 if one else None, safety) for one, reward in enumerate(rewards)] if number else []
    path.mkdir(parents=True)
    (path / "scores.json").write_text(json.dumps({"model": "m", "judged": scores, "measured": measured}))
    if not number:
        return
    for name in ("helpfulness", "safety")[: 1 + (safety is not None)]:
        (path / name).mkdir()
        findings = {"accuracy": 0.6 + 0.05 * number, "pairs": 100 * number}
        (path / name / "findings.json").write_text(json.dumps({"findings": findings}))
        (path / name / "report.md").write_text("")
    (path / "reject").mkdir()
    (path / "reject" / "report.md").write_text("")
    own = [{"score": score, "text": "a", "ended": "whole"} for score in (1.0, 3.0)]
    old = [{"score": 5.0, "text": "b", "ended": "whole", "run": "v1"}] if number > 1 else []
    rows = [{"prompt": [], "samples": own, "earlier": earlier} for earlier in ([], old)]
    (path / "reject" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(page: str, title: str) -> list[list[str]]:
    part = page.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return [rows[0], *rows[2:]]


def test_every_version_has_a_line_by_the_newest_judges(tmp_path):
    for number in range(3):
        write_version(tmp_path, number, {"right": 0.3 + 0.1 * number, "none": None})
    write_run(tmp_path / "v2" / "ppo")
    page = write_versions_report(tmp_path).read_text()
    header, *rows = lines_of(page, "What the reward models think of them")
    assert header == ["version", "helpfulness", "safety", "reward", "wins", "wins over first", "tokens", "cut"]
    assert [row[0] for row in rows] == [
        "0: before RLHF",
        "1: rejection sampling",
        "2: rejection sampling, then [PPO](v2/ppo/report.md)",
    ]
    # Version 2 thinks 0.3, 0.4 and 0.5 of them, whatever version 1 thought.
    assert [row[1:5] for row in rows] == [
        ["0.4", "0.5", "0.3", "-"],
        ["0.5", "0.5", "0.4", "0.6"],
        ["0.6", "0.5", "0.5", "0.6"],
    ]
    assert "judgement of version 2's reward models" in page and "(versions.png)" in page
    assert lines_of(page, "What was measured") == [["version", "right", "none"], *(
        [str(number), f"{0.3 + 0.1 * number:.3g}", "-"] for number in range(3)
    )]  # fmt: skip
    assert lines_of(page, "What they were made of")[1:] == [
        [
            "1",
            "[65.0% of 100 held-out pairs](v1/helpfulness/report.md)",
            "[65.0% of 100 held-out pairs](v1/safety/report.md)",
            "[2](v1/reject/report.md)",
            "3",
        ],
        [
            "2",
            "[70.0% of 200 held-out pairs](v2/helpfulness/report.md)",
            "[70.0% of 200 held-out pairs](v2/safety/report.md)",
            "[2](v2/reject/report.md), 1 from earlier versions",
            "4",
        ],
    ]


def test_one_reward_model_and_nothing_measured(tmp_path):
    for number in range(2):
        write_version(tmp_path, number, {}, safety=None)
    page = write_versions_report(tmp_path).read_text()
    assert [row[2] for row in lines_of(page, "What the reward models think of them")[1:]] == ["-", "-"]
    assert lines_of(page, "What they were made of")[1][2] == "-" and "What was measured" not in page


def test_before_the_first_version_is_done_there_is_what_was_measured(tmp_path):
    with pytest.raises(
        UserError, match="holds no version with scores.json; expected the folder of a run of llama-jax rlhf"
    ):
        read_versions(tmp_path)
    write_version(tmp_path, 0, {"right": 0.3})
    page = write_versions_report(tmp_path).read_text()
    assert lines_of(page, "What was measured")[1:] == [["0", "0.3"]] and "reward models think" not in page


def test_the_plot_shows_every_version(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def keep(self, x, y, **how):
        drawn[how["label"]] = (list(x), [round(value, 3) for value in y])
        return plot(self, x, y, **how)

    monkeypatch.setattr(Axes, "plot", keep)
    for number in range(3):
        write_version(tmp_path, number, {"right": 0.5 if number else None, "score": 0.1 * number})
    plot_versions(read_versions(tmp_path), tmp_path / "versions.png")
    assert drawn["reward"] == ([0, 1, 2], [0.3, 0.4, 0.5]) and drawn["helpfulness"][1] == [0.4, 0.5, 0.6]
    assert drawn["right"] == ([1, 2], [0.5, 0.5]) and drawn["score"] == ([0, 1, 2], [0.0, 0.1, 0.2])
    assert re.match(rb"\x89PNG", (tmp_path / "versions.png").read_bytes())
