"""In place of a `Llama`: what it says is a function of what it is asked and of the seed; and what it is asked."""

import json
import os
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_jax.errors import Preempted
from llama_jax.generation.llama import Completion
from llama_jax.text.tokenizer import Tokenizer

QUESTIONS = [f"what is {number} and {number * 7 % 10}?" for number in range(10)]


def row_of(number: int, **more: str) -> dict:
    """A question in dialogues of both forms, open and answered; every third has a system message and a turn before."""
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what is the old one?"},
        {"role": "assistant", "content": "the answer"},
    ]
    asked = [*(before if number % 3 == 0 else []), {"role": "user", "content": QUESTIONS[number]}]
    return {"messages": asked + [{"role": "assistant", "content": "An old answer."}] * (number % 2), **more}


def value(dialogues) -> list[float]:
    """The number that was answered, as a score."""
    return [float(dialogue[-1].content) for dialogue in dialogues]


def rows_of(config: Any) -> list[dict]:
    """The dialogues that a run has made."""
    return [json.loads(line) for line in (Path(config.out) / "dialogues.jsonl").read_text().splitlines()]


def interrupt() -> None:
    """Ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def terminate() -> None:
    """Tells a run to stop as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


either_stop = pytest.mark.parametrize(("stop", "error"), [(interrupt, KeyboardInterrupt), (terminate, Preempted)])


class Speaker:
    """In place of a model: each answer is a number from its prompt and its seed; `calls` is what was asked, and `asked` every
    prompt with its last answer.
    """

    def __init__(self, base: Path, say=None, stop_at: int = 0, stop=None):
        context = json.loads((base / "config.json").read_text())["max_position_embeddings"]
        self.tokenizer = Tokenizer.load(base / "tokenizer.model")
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=context))
        self.calls: list[tuple[str, int, float]] = []
        self.asked: dict[str, str] = {}
        self._say = say or (lambda text, seed: (str(zlib.crc32(f"{text}{seed}".encode()) % 1000), "eos"))
        self._dispatches, self._stop_at, self._stop = 0, stop_at, stop

    def generate(self, prompts, *, seed, samples, temperature, **settings):
        self._dispatches += 1
        if self._dispatches == self._stop_at:
            self._stop()
        texts = [" ".join(self.tokenizer.decode(ids).split()) for ids in prompts for _ in range(samples)]
        assert len(texts) == len(seed)
        self.calls += [(text, number, temperature) for text, number in zip(texts, seed, strict=True)]
        said = [self._say(text, number) for text, number in zip(texts, seed, strict=True)]
        self.asked |= {text: answer for text, (answer, _) in zip(texts, said, strict=True)}
        return [Completion(answer, [], [], reason) for answer, reason in said]
