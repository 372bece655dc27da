"""In place of a `Llama`: what it says is a function of what it is asked and of the seed."""

import zlib
from pathlib import Path
from types import SimpleNamespace

from llama_jax.generation.llama import Completion
from llama_jax.text.tokenizer import Tokenizer


class Speaker:
    """In place of a model: each answer is a number from its prompt and its seed; `calls` is what was asked, and `asked` every
    prompt with its last answer.
    """

    def __init__(self, base: Path, context: int, say=None, stop_at: int = 0, stop=None):
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
