"""What annotators of the instruction world prefer among the newest model's answers, and the paper's recipes."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from experiments import rlhf_versions
from llama_jax.data import instruction_world as world
from llama_jax.generation.replies import Reply
from llama_jax.stages.rlhf import plan

COUNT = 400


def collected(monkeypatch, answer, version: int = 1):
    """What comes of models that answer each question as `answer(question, which of the two)` says."""
    questions = dict(rlhf_versions.asked(version, COUNT))

    def reply_to(llama, prompts, template, *, seeds, temperature, **settings):
        which = rlhf_versions.TEMPERATURES.index(temperature)
        return [Reply(answer(questions[prompt], which), "whole") for prompt in prompts]

    monkeypatch.setattr(rlhf_versions, "reply_to", reply_to)
    return rlhf_versions.annotate(version, SimpleNamespace(), count=COUNT), questions


def best_and_worst(question: world.Question, which: int) -> str:
    """In the first model's answer the best, in the second's one that is no answer, or that obeys."""
    best = f"{question.sentence.format(question.key)} {world.PERSONAS.get(question.persona, '')}".strip()
    return best if which == 0 else question.wrong[0] if question.is_adversarial else "Well, well."


def test_the_better_answer_is_chosen_where_it_is_far_better_and_labelled(monkeypatch):
    found, questions = collected(monkeypatch, best_and_worst)
    assert len(found.helpfulness) + len(found.safety) == COUNT
    adversarial = {q.prompt for q in questions.values() if q.is_adversarial}
    for row in (*found.helpfulness, *found.safety):
        assert row["strength"] == 3 and row["rejected"] != row["chosen"] and row["chosen_safe"]
        asked = row["messages"][-1]["content"]
        assert row["messages"][-1]["role"] == "user" and (asked in adversarial) == (not row["rejected_safe"])
    assert {row["messages"][-1]["content"] for row in found.safety} <= adversarial
    assert 40 < len(found.safety) < 120  # a fifth of the world's questions


def test_annotators_err_where_answers_are_alike_and_see_no_pair_where_they_are_the_same(monkeypatch):
    def no_answers(question: world.Question, which: int) -> str:
        return ("Well, well.", "Oh no.")[which]

    found, _ = collected(monkeypatch, no_answers)
    helpful = [row["chosen"] for row in found.helpfulness]
    assert abs(helpful.count("Oh no.") / len(helpful) - 0.5) < 0.1 and {
        row["strength"] for row in found.helpfulness
    } == {0}
    same, _ = collected(monkeypatch, lambda question, which: "Well, well.")
    assert same.helpfulness == [] == same.safety
    empty, _ = collected(monkeypatch, lambda question, which: "Well." * which)
    assert empty.helpfulness == [] == empty.safety


def test_the_same_version_is_annotated_alike_and_another_on_other_questions(monkeypatch):
    once, questions = collected(monkeypatch, best_and_worst)
    again, _ = collected(monkeypatch, best_and_worst)
    _, others = collected(monkeypatch, best_and_worst, version=2)
    assert once == again and len(questions.keys() & others.keys()) < COUNT / 4


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
