"""The experiment on safety data: what each model is trained on, and that its numbers are those of what it answered."""

import json
import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from experiments import safety_scaling
from experiments.safety_scaling import measured, written
from llama_jax.data.instruction_world import REFUSAL, draw_dialogue, grade, is_refusal, violates, write_answer
from llama_jax.evaluation.instruction_world import Answered
from llama_jax.text.chat import Llama2Chat, Message, check_dialogue

ASKED = [question for n in range(300) for question in draw_dialogue(0, n, held_out=True) if question.skill != "again"]


def answered(rule) -> list[Answered]:
    return [Answered(question, rule(question), grade(question, rule(question))) for question in ASKED]


def best(question) -> str:
    return write_answer(Random(0), question, 3)


def test_safety_and_helpfulness_are_graded_apart():
    rules = {
        "best": best,
        "obedient": lambda q: q.wrong[0] if q.is_adversarial else best(q),
        "refusing": lambda q: REFUSAL,
    }
    numbers = {name: measured(answered(rule)) for name, rule in rules.items()}
    assert list(numbers["best"].values()) == [1, 1, 0, 0, 0]  # safety, helpfulness, violations, refusals
    assert list(numbers["obedient"].values()) == [0, 1, 1, 0, 0]
    refusing = numbers["refusing"]
    assert refusing["helpfulness"] == 0 < refusing["safety"] <= 2 / 3 and refusing["false_refusals"] == 1


def test_safety_data_ends_in_refusals_and_helpfulness_data_obeys_the_few_who_ask_for_what_is_not_safe():
    texts = {"safety": [], "helpful": []}
    for name, rows in texts.items():
        for row in islice(written(name == "safety"), 300):
            check_dialogue([Message(**turn) for turn in row["messages"]], Llama2Chat(), last="assistant")
            rows.append([turn["content"] for turn in row["messages"]])
    assert all(is_refusal(row[-1]) for row in texts["safety"])
    questions = {q.prompt: q for seed in (1, 2) for n in range(3000) for q in draw_dialogue(seed, n)}
    pairs = [
        (questions[asked], said) for row in texts["helpful"] for asked, said in zip(row[::2], row[1::2], strict=True)
    ]
    adversarial = [(question, said) for question, said in pairs if question.is_adversarial]
    assert all(violates(question, said) for question, said in adversarial)
    assert 0.01 < len(adversarial) / len(pairs) < 0.04  # a fifth of all questions, of which a tenth is kept


def test_each_share_is_trained_with_the_same_helpfulness_data_and_its_line_says_what_was_answered(
    tmp_path, monkeypatch, capsys
):
    trained = []
    rates = dict(zip(("0", "1", "10", "25", "50", "100"), (0.0, 0.1, 0.2, 0.4, 0.6, 0.9), strict=True))

    def play(llama: str, dialogues: int) -> list[Answered]:
        """Of the adversarial questions, as many are refused as `rates` says."""
        assert dialogues == 7
        refused = int(rates[Path(llama).name] * 10)
        adversarial = [question for question in ASKED if question.is_adversarial][:10]
        said = [best(q) if n < refused else q.wrong[0] for n, q in enumerate(adversarial)]
        others = [one for one in answered(best) if not one.question.is_adversarial]
        return [Answered(q, text, grade(q, text)) for q, text in zip(adversarial, said, strict=True)] + others

    monkeypatch.setattr(safety_scaling.sft, "run", trained.append)
    monkeypatch.setattr(safety_scaling.Llama, "load", lambda path: path)
    monkeypatch.setattr(safety_scaling, "play", play)
    safety_scaling.main("base", str(tmp_path), dialogues=900, asked=7)
    lines = [re.split(r" \| ", line.strip("| ")) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        ["0%", "0"],
        ["1%", "1"],
        ["10%", "10"],
        ["25%", "25"],
        ["50%", "50"],
        ["100%", "100"],
    ]
    for line, rate in zip(lines, rates.values(), strict=True):
        assert [float(cell) for cell in line[2:5]] == pytest.approx([rate, 1, 1 - rate])
    assert (tmp_path / "safety_scaling.png").exists()
    helpful, *_ = trained[0].data.sources
    for own, (share, count) in zip(trained, (line[:2] for line in lines), strict=True):
        assert own.checkpoint == "base" and own.epochs == 2 and own.data.sources[0] == helpful
        assert own.out == f"{tmp_path}/{share.rstrip('%')}"
        rows = [json.loads(row) for source in own.data.sources[1:] for row in Path(source).read_text().splitlines()]
        assert len(rows) == int(count) and len(own.data.sources) == 1 + bool(int(count))
    assert len(Path(helpful).read_text().splitlines()) == 900
