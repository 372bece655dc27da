"""Answers that are kept: each question is asked once, whatever stops between, and other recipes are refused."""

import json
import os
import signal

import pytest

from llama_jax.errors import Preempted, UserError
from llama_jax.evaluation.kept_answers import ask_all

QUESTIONS = ["a", "ccc", "bb", "dddd\u2028\x85 with other line ends", "ä"]


class Asked:
    """Answers in capitals, remembers what it was asked, and may fail at a question."""

    def __init__(self, fails_at=None):
        self.batches, self.fails_at = [], fails_at

    def __call__(self, questions):
        if self.fails_at in questions:
            raise RuntimeError("killed")
        self.batches.append(list(questions))
        return [question.upper() for question in questions]


def test_answers_come_in_the_order_of_the_questions_and_the_longest_are_asked_first(tmp_path):
    ask = Asked()
    answers = ask_all(tmp_path / "a.jsonl", {}, QUESTIONS, ask, batch=2)
    assert answers == [question.upper() for question in QUESTIONS]
    assert [len(batch) for batch in ask.batches] == [2, 2, 1] and ask.batches[0][0] == QUESTIONS[3]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().split("\n")[1:-1]]
    assert {row["number"]: (row["question"], row["answer"]) for row in rows} == dict(
        enumerate(zip(QUESTIONS, answers, strict=True))
    )


def test_what_was_answered_is_not_asked_again_after_a_crash_in_the_middle_of_a_line(tmp_path):
    path, first, second = tmp_path / "a.jsonl", Asked(fails_at="a"), Asked()
    with pytest.raises(RuntimeError):
        ask_all(path, {"model": "m"}, QUESTIONS, first, batch=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # the last answer was not written to its end
    answers = ask_all(path, {"model": "m"}, QUESTIONS, second, batch=1)
    assert answers == [question.upper() for question in QUESTIONS]
    asked = [question for ask in (first, second) for batch in ask.batches for question in batch]
    assert len(asked) == len(QUESTIONS) + 1 and set(asked) == set(QUESTIONS)
    third = Asked()
    assert ask_all(path, {"model": "m"}, QUESTIONS, third, batch=1) == answers and third.batches == []


def test_a_signal_stops_it_between_two_batches(tmp_path):
    def ask(questions):
        os.kill(os.getpid(), signal.SIGTERM)
        return [question.upper() for question in questions]

    with pytest.raises(Preempted, match="2 answers are in"):
        ask_all(tmp_path / "a.jsonl", {}, QUESTIONS, ask, batch=2)
    rest = Asked()
    ask_all(tmp_path / "a.jsonl", {}, QUESTIONS, rest, batch=5)
    assert sum(map(len, rest.batches)) == 3


def test_another_recipe_or_other_questions_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    ask_all(path, {"temperature": 0.1}, QUESTIONS, Asked(), batch=2)
    with pytest.raises(UserError, match=r"temperature: 0\.1 there, 0\.2 here"):
        ask_all(path, {"temperature": 0.2}, QUESTIONS, Asked(), batch=2)
    with pytest.raises(UserError, match="questions: .* there"):
        ask_all(path, {"temperature": 0.1}, QUESTIONS[::-1], Asked(), batch=2)
    path.write_text("something else\n")
    with pytest.raises(UserError, match="holds no answers"):
        ask_all(path, {}, QUESTIONS, Asked(), batch=2)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no answers"):
        ask_all(tmp_path / "empty.jsonl", {}, QUESTIONS, Asked(), batch=2)
