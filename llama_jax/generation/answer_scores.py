"""Scores of sampled answers (paper 3.2.3, 4.2.4), by a reward model or by a Python function in its place."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from llama_jax.errors import UserError
from llama_jax.generation.llama import Llama
from llama_jax.generation.rewards import check_format, make_score, reward_info, warnings_of
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.chat import Dialogue, Message, Template
from llama_jax.training.checkpoint import newest_readable
from llama_jax.training.metrics import say

Score = Callable[[Sequence[Dialogue]], Sequence[float]]
"""How good the last answer of each dialogue is; more is better, and -inf never the best."""


def check_judge(reward: str, has_score: bool, what: str) -> None:
    """Raises UserError unless either a reward model judges, which `what` calls by its kind, or a function does."""
    if not reward and not has_score:
        raise UserError(f"name the {what} that judges, with --reward RUN (llama-jax reward trains one)")
    if reward and has_score:
        raise UserError(f"both --reward {reward} and a score function judge; give one of them")


def find_judge(path: str, template: Template) -> Path:
    """The checkpoint of a reward model; says what speaks against it.

    Raises:
      UserError: it is no reward model, or one of another chat format.
    """
    info = reward_info(newest_readable(Path(path)))
    check_format(info, path, template)
    for reason in warnings_of(info.findings):
        say(f"warning: {path} is a poor judge: {reason}")
    return info.folder


def load_with_judge(
    checkpoint: Path, reward: Path | None, score: Score | None, *, mesh: str, int8: bool
) -> tuple[Llama, Score]:
    """Reads the model that answers, and what judges: the reward model unless a function does.

    Args:
      checkpoint: of the model that answers.
      reward: the reward model's; None where a function judges.
      score: that function.
      mesh: devices to lie on; one if empty.
      int8: whether the weights of the model that answers are kept in 8 bits.
    """
    llama = Llama.load(checkpoint, mesh=mesh or None, int8=int8)
    return llama, score or make_score(reward, make_mesh(mesh) if mesh else None)


def score_answers(score: Score, answers: Sequence[tuple[Dialogue, str]]) -> list[float | None]:
    """The score of each answer to its prompt; None where there is nothing to judge, or where it cannot be judged.

    Raises:
      UserError: the scores are not one number for each answer.
    """
    dialogues = [(*prompt, Message("assistant", text)) for prompt, text in answers if text]
    scores = iter(_checked(score(dialogues), len(dialogues)) if dialogues else [])
    values = [next(scores) if text else -math.inf for _, text in answers]
    return [value if value > -math.inf else None for value in values]  # JSON has no -inf


def finite_scores(score: Score, prompts: Sequence[Dialogue], texts: Sequence[str]) -> np.ndarray:
    """What a function makes of an answer to each prompt, just as it gave it: float32 (B,).

    Raises:
      UserError: the function failed, or did not return a finite number for each answer.
    """
    dialogues = [(*prompt, Message("assistant", text)) for prompt, text in zip(prompts, texts, strict=True)]
    try:
        scores = score(dialogues)
    except Exception as error:  # of code that is not ours: whatever it raises
        raise UserError(f"the score function failed: {type(error).__name__}: {error}") from error
    values = _checked(scores, len(texts))
    with np.errstate(over="ignore"):
        values_B = np.array(values, np.float32)
    if not np.isfinite(values_B).all():
        number = int(np.argmin(np.isfinite(values_B)))
        raise UserError(
            f"the score of the answer {texts[number][:200]!r} is {values[number]}; expected a finite number, for 32 bits"
        )
    return values_B


def _checked(scores: Sequence[float], count: int) -> list[float]:
    """Raises UserError unless these are so many numbers, none above all others and none unknown."""
    values = np.array(jax.device_get(scores))
    if values.shape != (count,) or values.dtype.kind not in "fiub":
        raise UserError(
            f"the score function gave {values.dtype} of shape {values.shape} for {count} dialogues; expected a number for each"
        )
    values = values.astype(np.float64)
    if bad := [i for i, value in enumerate(values) if math.isnan(value) or value == math.inf]:
        raise UserError(
            f"the score of answer {bad[0]} of {count} is {values[bad[0]]}; expected a number, or -inf for none"
        )
    return values.tolist()
