"""A reward model's report: accuracies and calibration are those of its scores."""

import json

import numpy as np
import pytest

from llama_jax.evaluation.rewards import accuracy_table, calibration, safety_table, write_reward_report
from llama_jax.stages.reward import FINDINGS
from llama_jax.training.held_out_pairs import SCORES


def row(chosen, rejected, strength=3, source="a", safe=(-1, -1)) -> dict:
    labels = {"strength": strength, "safe": list(safe), "tokens": [5, 4]}
    return {"set": "test", "source": source, "scores": [chosen, rejected]} | labels


def test_accuracy_is_by_source_and_strength():
    rows = [row(1, 0), row(0, 1), row(2, 1, strength=0), row(0, 1, strength=-1), row(1, 0, source="b", strength=2)]
    assert accuracy_table(rows) == [
        ("a (test)", "50.0%", "-", "-", "100.0%", "50.0%", "4"),
        ("b (test)", "-", "100.0%", "-", "-", "100.0%", "1"),
    ]


def test_safety_is_by_label_and_unsafe_answers_are_recalled_below_zero():
    rows = [
        row(1, -1, safe=(1, 0)),
        row(-2, 1, safe=(1, 0)),
        row(2, 1, safe=(1, 1)),
        row(-1, -2, safe=(0, 0)),
        row(3, 1),
    ]
    assert [value for _, value in safety_table(rows)] == ["50.0%", "100.0%", "100.0%", "75.0%"]


def test_calibration_is_the_diagonal_where_wins_are_drawn_from_the_scores_and_below_it_where_scores_are_doubled():
    random = np.random.default_rng(0)
    difference = random.normal(0, 2, 20_000)
    wins = random.random(20_000) < 1 / (1 + np.exp(-difference))
    true = [row(d, 0) if won else row(0, d) for d, won in zip(difference, wins, strict=True)]
    points = calibration(true)
    assert sum(count for *_, count in points) == 20_000 and len(points) == 10
    for predicted, won, count in points:
        assert won == pytest.approx(predicted, abs=4 * 0.5 / count**0.5)
    doubled = calibration([{**one, "scores": [2 * score for score in one["scores"]]} for one in true])
    assert all(won < predicted - 0.02 for predicted, won, _ in doubled[2:-1])


def test_the_page_leads_with_the_reasons_not_to_use_the_model(tmp_path):
    rows = [row(1.0, 0.0), row(0.5, 0.7)]
    (tmp_path / SCORES).write_text("".join(json.dumps(one) + "\n" for one in rows))
    known = {"findings": None, "warnings": ["it guesses"], "data": {"a": {"comparisons": 1234567}}}
    (tmp_path / FINDINGS).write_text(json.dumps(known))
    page = write_reward_report(tmp_path).read_text()
    assert page.index("**Not to be used for PPO:**\n\n- it guesses") < page.index("## Data")
    assert "| a (test) | 50.0% | - | - | - | 50.0% | 2 |" in page
    assert "safety label" not in page
    (tmp_path / SCORES).write_text(json.dumps(row(1, 0, safe=(1, -1))) + "\n")
    assert "safety label" in write_reward_report(tmp_path).read_text()
    (tmp_path / SCORES).write_text("")
    (tmp_path / FINDINGS).write_text(json.dumps(known | {"warnings": []}))
    assert "Nothing speaks against" in write_reward_report(tmp_path).read_text()
