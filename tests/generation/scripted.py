"""In place of a `Llama`: it says what a script has, at once or slowly, and remembers what it was asked."""

import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

from llama_jax.text.tokenizer import Tokenizer


class ScriptedLlama:
    """Gives the answers in turn, each as its pieces; `prompts` and `seeds` are those it got."""

    def __init__(
        self, tokenizer: Tokenizer, answers: Sequence[Sequence[str]], context_length: int = 4096, delay: float = 0.0
    ):
        self.tokenizer = tokenizer
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=context_length))
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []
        self._answers = iter(answers)
        self._delay = delay  # seconds before each piece

    def stream(self, prompt: str | Sequence[int], *, seed: int = 0, **settings) -> Iterator[str]:
        if prompt == "":  # asks only whether the settings are good
            return iter(())
        self.prompts.append(list(prompt))
        self.seeds.append(seed)
        return self._pieces(next(self._answers))

    def _pieces(self, answer: Sequence[str]) -> Iterator[str]:
        for piece in answer:
            time.sleep(self._delay)
            yield piece
