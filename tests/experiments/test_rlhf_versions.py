"""The experiment on versions gives the driver what it says, and has the paper's recipes."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments import rlhf_versions
from llama_jax.stages.rlhf_version import plan


def test_the_experiment_hands_the_driver_what_it_says(tmp_path, monkeypatch, capsys):
    given = {}

    def run(config, **functions):
        given.update(functions, config=config)
        (tmp_path / "rlhf").mkdir()
        (tmp_path / "rlhf" / "report.md").write_text("# Versions")

    monkeypatch.setattr(rlhf_versions.rlhf, "run", run)
    rlhf_versions.main("sft", str(tmp_path), versions=3, prompts=30, known=50, pairs=7)
    config = given["config"]
    assert (config.checkpoint, config.versions, config.out) == ("sft", 3, f"{tmp_path}/rlhf")
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == 30 + config.eval_prompts
    files = (config.preferences[0], config.safety_preferences[0])
    helpful, safe = ([json.loads(line) for line in Path(path).read_text().splitlines()] for path in files)
    assert len(helpful) + len(safe) == 50 and all(one["chosen_safe"] and one["rejected_safe"] for one in helpful)
    assert any(one["chosen_safe"] != one["rejected_safe"] for one in safe)
    assert isinstance(given["annotate"], partial) and given["annotate"].keywords == {"count": 7}
    assert capsys.readouterr().out == "# Versions\n"


def test_the_recipes_are_the_papers():
    small, large = rlhf_versions.paper_7b, rlhf_versions.paper_70b
    assert (small.versions, small.ppo_from, small.pool_from) == (5, 5, 4)
    assert (small.reward.optimizer.peak_lr, large.reward.optimizer.peak_lr) == (1e-5, 5e-6)
    assert (small.ppo.beta, large.ppo.beta) == (0.01, 0.005) and small.ppo.optimizer.peak_lr == 1e-6
    assert small.mixes == (0.5, 0.9) and small.reward.pairs == 512 and small.ppo.batch == 512
    last = plan(replace(large, checkpoint="sft", preferences=("p",), safety_preferences=("s",)), 5)
    assert last.ppo.beta == 0.005 and last.helpfulness.optimizer.peak_lr == 5e-6


def test_annotators_comparisons_are_apart_by_risk(monkeypatch):
    asked = []

    def compare_answers(llama, *, seed, count):
        asked.append((seed, count))
        return [({"n": n}, n % 3 == 0) for n in range(count)]

    monkeypatch.setattr(rlhf_versions, "compare_answers", compare_answers)
    found = rlhf_versions.annotate(2, None, count=7)
    assert [row["n"] for row in found.safety] == [0, 3, 6] and len(found.helpfulness) == 4 and asked == [(1002, 7)]
