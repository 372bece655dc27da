"""A function's rewards arrive as it gave them, or not at all."""

import math

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generation.answer_scores import finite_scores
from llama_jax.text.chat import Message

PROMPTS = [(Message("user", "one"),), (Message("user", "two"),)]


def test_a_reward_is_a_float_all_the_way():
    values = finite_scores(lambda dialogues: [0.7, -1e-3], PROMPTS, ["a", "b"])
    assert values.dtype == np.float32 and np.array_equal(values, np.array([0.7, -1e-3], np.float32))


def test_it_sees_each_prompt_with_its_answer():
    seen = []
    finite_scores(lambda dialogues: seen.extend(dialogues) or [0, 0], PROMPTS, ["a", ""])
    assert seen == [(*PROMPTS[0], Message("assistant", "a")), (*PROMPTS[1], Message("assistant", ""))]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda dialogues: [1.0], r"gave float64 of shape \(1,\) for 2 dialogues; expected a number for each"),
        (lambda dialogues: [[1.0], [2.0]], r"gave float64 of shape \(2, 1\) for 2 dialogues"),
        (lambda dialogues: [1.0, math.inf], "the score of answer 1 of 2 is inf"),
        (lambda dialogues: 1 / 0, "the score function failed: ZeroDivisionError: division by zero"),
        (lambda dialogues: ["good", "bad"], "gave <U4 of shape"),
        (lambda dialogues: [1.0, -math.inf], "the score of the answer 'b' is -inf; expected a finite number"),
        (
            lambda dialogues: [1.0, -1e39],
            r"the score of the answer 'b' is -1e\+39; expected a finite number, for 32 bits",
        ),
    ],
)
def test_anything_else_is_an_error_that_says_what_came(score, message):
    with pytest.raises(UserError, match=message):
        finite_scores(score, PROMPTS, ["a", "b"])
