"""The page on a run of PPO has the run's own first and last numbers, every evaluation, and its curves."""

import json
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.ppo import write_ppo_report
from llama_jax.evaluation.report import PPO_PANELS

LOGGED = {name for _, curves in PPO_PANELS for name in curves} | {"time/generate"}


def write_run(folder: Path, iterations: int = 3) -> Path:
    """Iteration n logs n and a hundredth for each number; the first and the last are evaluated."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name for name in LOGGED if not name.startswith("eval/")}
    records = [
        {"step": n} | {name: n + i / 100 for i, name in enumerate(sorted(own))} for n in range(1, iterations + 1)
    ]
    held_out = [{"step": n, "eval/reward": 0.25 * n, "eval/length": 7.0, "eval/cut": 0.5} for n in (0, iterations)]
    lines = [held_out[0], *records, held_out[1]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_report_has_first_and_last_numbers_and_every_evaluation(tmp_path):
    folder = write_run(tmp_path / "run")
    page = write_ppo_report(folder).read_text()
    own = sorted(name for name in LOGGED if not name.startswith("eval/"))
    for i, name in enumerate(own):
        assert f"| {name} | {1 + i / 100:.4g} | {3 + i / 100:.4g} |" in page
    assert "| 0 | 0 | 7 | 0.5 |" in page and "| 3 | 0.75 | 7 | 0.5 |" in page
    assert "![Curves of the run](ppo.png)" in page and (folder / "ppo.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_iterations_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no iteration to report; expected the folder of a run of llama-jax ppo"):
        write_ppo_report(tmp_path)
