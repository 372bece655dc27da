"""The curves are those of the samples: planted scores come out as tables, and the temperature that is best as the best."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import rejection_curves
from llama_jax.data.prompts import PromptsConfig, read_prompts
from llama_jax.text.chat import Llama2Chat

SPREAD = {"sft": {0.5: 0.1, 1.0: 1.0, 1.5: 1.0}, "rlhf": {0.5: 0.1, 1.0: 0.5, 1.5: 2.0}}
SHIFT = {"sft": {0.5: 0.0, 1.0: 0.0, 1.5: -3.0}, "rlhf": {0.5: 1.0, 1.0: 0.5, 1.5: 0.0}}


def planted(config) -> None:
    """Scores of a normal distribution for each checkpoint and temperature, and for every prompt one empty answer at 0.5."""
    name, generator = config.checkpoint, np.random.default_rng(0)
    prompts, _ = read_prompts(config.data, Llama2Chat())
    rows = []
    for prompt in prompts:
        drawn = []
        for temperature in config.temperatures:
            scores = generator.normal(SHIFT[name][temperature], SPREAD[name][temperature], config.samples).tolist()
            if temperature == 0.5:
                scores[0] = None
            drawn += [{"temperature": temperature, "text": "a", "ended": "whole", "score": score} for score in scores]
        rows.append({"prompt": [m._asdict() for m in prompt], "samples": drawn, "earlier": []})
    Path(config.out).mkdir(parents=True)
    (Path(config.out) / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(text: str, start: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]


def test_the_tables_hold_the_planted_scores_and_find_the_best_temperatures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection_curves.rejection, "run", planted)
    rejection_curves.main(("sft", "rlhf"), "rm", out=tmp_path, prompts=30, samples=100, temperatures=(0.5, 1.0, 1.5))
    out = capsys.readouterr().out
    best = {(row[0], int(row[1])): float(row[-1]) for name in SPREAD for row in cells(out, name)}
    # One answer alone: the highest mean; many: the widest spread that is not too low.
    assert best == {("sft", 1): 1.0, ("sft", 10): 1.0, ("sft", 100): 1.0} | {
        ("rlhf", 1): 0.5,
        ("rlhf", 10): 1.5,
        ("rlhf", 100): 1.5,
    }
    ((_, *of_all),) = cells(out, "100 ")
    sft = [sample["score"] for row in read(tmp_path / "0") for sample in row["samples"] if sample["temperature"] == 1.0]
    expected = (1 / (1 + np.exp(-np.array(sft).reshape(-1, 100)))).max(axis=1).mean()
    assert float(of_all[0]) == pytest.approx(expected, abs=1e-4) and float(of_all[1]) == pytest.approx(0.5, abs=0.02)
    low = next(float(row[2]) for row in cells(out, "sft") if row[1] == "1")
    assert low == pytest.approx(0.5 * 99 / 100, abs=0.002), "an empty answer is worth 0"
    assert (tmp_path / "rejection_curves.png").exists()


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_questions_are_held_out_and_wait_for_an_answer(tmp_path):
    rejection_curves.write_questions(tmp_path / "questions.jsonl", 20)
    prompts, _ = read_prompts(PromptsConfig(sources=(str(tmp_path / "questions.jsonl"),)), Llama2Chat())
    asked = {q.prompt for n in range(20) for q in rejection_curves.world.draw_dialogue(0, n, held_out=True)}
    assert len(prompts) > 15 and all(prompt[-1].role == "user" and prompt[-1].content in asked for prompt in prompts)
