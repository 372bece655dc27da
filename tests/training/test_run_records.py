"""What a run's folder says of it afterwards: every start is kept, and what a killed process left unfinished is no obstacle."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from llama_jax.errors import UserError
from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import write_recipe


@dataclass(frozen=True)
class Config:
    size: int = 3


def test_every_start_is_kept_with_its_time_and_devices(tmp_path):
    for _ in range(3):
        write_recipe(tmp_path, "rejection", Config(), {}, None)
    starts = json.loads((tmp_path / "config.json").read_text())["starts"]
    assert [(one["device"], one["devices"]) for one in starts] == [("cpu", 8)] * 3
    for one in starts:
        assert abs(datetime.now(UTC) - datetime.fromisoformat(one["at"])) < timedelta(minutes=1)


def test_a_config_of_before_starts_were_kept_is_no_obstacle(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "rejection"}')
    write_recipe(tmp_path, "rejection", Config(), {}, None)
    assert len(json.loads((tmp_path / "config.json").read_text())["starts"]) == 1


def test_an_unfinished_last_line_is_left_out(tmp_path):
    lines = ['{"step": 1, "train/loss": 2.5}', '{"step": 2, "train/loss": 2.25}', '{"step": 3, "train/lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": 2.25}]


@pytest.mark.parametrize("line", ["{", "[1]", "7", '{"loss": 1}', ""])
def test_another_broken_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is no record of a step"):
        read_metrics(tmp_path)
