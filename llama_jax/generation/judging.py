"""Answers as people and functions judge them: their text, and a function's numbers for it (verifiable rewards)."""

from collections.abc import Callable, Sequence

import numpy as np

from llama_jax.errors import UserError
from llama_jax.generation.session import spoken
from llama_jax.text.chat import Dialogue, Message, Template
from llama_jax.text.tokenizer import Tokenizer

Score = Callable[[Sequence[Dialogue]], Sequence[float]]
"""How good the last answer of each dialogue is; more is better."""


def spoken_text(tokenizer: Tokenizer, template: Template, ids: Sequence[int], ended: bool) -> str:
    """What drawn tokens say: up to the first of the template's tags, without white space around it, as in a conversation.

    Args:
      tokenizer: of the model.
      template: of the dialogue.
      ids: the drawn tokens; with the EOS that ended them, where `ended`.
      ended: whether the last of them is that.
    """
    stream = tokenizer.stream(continues=True)
    text = "".join(map(stream.push, ids[:-1] if ended else ids)) + stream.finish()
    return "".join(spoken(iter([text]), template.tags))


def judged_by(score: Score, prompts: Sequence[Dialogue], texts: Sequence[str]) -> np.ndarray:
    """What a function makes of an answer to each prompt: float32, just as it gave them.

    Raises:
      UserError: it failed, or did not return a finite number for each answer.
    """
    dialogues = [(*prompt, Message("assistant", text)) for prompt, text in zip(prompts, texts, strict=True)]
    try:
        values = np.asarray(score(dialogues), np.float32)
    except Exception as error:  # of code that is not ours: whatever it raises
        raise UserError(f"the reward function failed: {type(error).__name__}: {error}") from error
    if values.shape != (len(texts),):
        raise UserError(
            f"the reward function returned the shape {values.shape} for {len(texts)} answers; expected ({len(texts)},)"
        )
    if not np.isfinite(values).all():
        number = int(np.argmin(np.isfinite(values)))
        raise UserError(
            f"the reward function returned {values[number]} for the answer {texts[number][:200]!r}; expected a finite number"
        )
    return values
