"""Versions are compared as the paper's rule of two reward models has it."""

import math

import numpy as np
import pytest

from llama_jax.generation.held_out_answers import Judges, compare, wins
from llama_jax.text.chat import Message

PROMPTS = {(Message("user", text),): risk for text, risk in (("a", ""), ("b", "odd"), ("c", ""), ("d", ""))}


def judges(helpful: dict[str, float], safe: dict[str, float] | None) -> Judges:
    """Scores by the text of the answer."""

    def score_by(table):
        return lambda dialogues: [table[dialogue[-1].content] for dialogue in dialogues]

    return Judges(score_by(helpful), safe and score_by(safe), PROMPTS, 0.15)


def rows(*texts: str) -> list[dict]:
    return [
        {"prompt": [prompt[0]._asdict()], "risk": risk, "text": text, "ended": "whole", "tokens": len(text)}
        for (prompt, risk), text in zip(PROMPTS.items(), texts, strict=True)
    ]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_safety_judges_adversarial_prompts_and_unsafe_answers_helpfulness_the_others():
    own = judges(
        {"w": 1.0, "x": 2.0, "y": 3.0, "z": -math.inf},
        {"w": logit(0.149), "x": logit(0.9), "y": logit(0.151), "z": logit(0.151)},
    )
    dialogues = [(*prompt, Message("assistant", text)) for prompt, text in zip(PROMPTS, "wxyz", strict=True)]
    np.testing.assert_allclose(own(dialogues), [logit(0.149), logit(0.9), 3.0, -math.inf])


def test_numbers_are_means_over_their_own_prompts_and_an_empty_answer_is_worth_nothing():
    own = judges({"w": 0.0, "x": 2.0, "y": 4.0}, {"w": 0.0, "x": logit(0.8), "y": 1.0})
    first, second = compare(own, [rows("w", "w", "w", "w"), rows("y", "x", "w", "")])
    assert first["helpfulness"] == 0.5 and first["safety"] == 0.5 and first["wins"] is None
    assert second["helpfulness"] == pytest.approx((1 / (1 + math.exp(-4)) + 0.5 + 0) / 3)
    assert second["safety"] == pytest.approx(0.8)
    assert second["reward"] == pytest.approx((1 / (1 + math.exp(-4)) + 0.8 + 0.5 + 0) / 4)
    assert second["wins"] == second["wins_over_first"] == 2 / 3  # better, better, a tie, worse
    assert second["tokens"] == 0.75 and second["cut"] == 0.0


def test_one_model_alone_judges_everything():
    own = judges({"w": 0.0, "x": logit(0.9)}, None)
    (only,) = compare(own, [rows("w", "x", "w", "x")])
    assert only["helpfulness"] == only["reward"] == pytest.approx(0.7) and only["safety"] is None


def test_wins_leave_ties_out():
    assert wins(np.array([1.0, 2, 3, -np.inf]), np.array([1.0, 1, 4, -np.inf])) == 0.5
    assert wins(np.array([1.0]), np.array([1.0])) is None
