"""Text from a model: whole batches of prompts, or one answer streamed as it is made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import UserError
from llama_jax.generation.sampler import Sampling, decode, prefill
from llama_jax.model.transformer import Llama
from llama_jax.text.tokenizer import Tokenizer

BATCH_STEPS = 16  # tokens drawn between two looks at which sequences have ended; a stream looks at every token
SMALLEST_BUCKET = 32  # prompts and caches are padded to powers of two from here on, so that few shapes are compiled


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt."""

    text: str
    ids: tuple[int, ...]
    """Tokens of the answer, without EOS."""
    logprobs: tuple[float, ...]
    """Log-probability of each, under the distribution it was drawn from."""
    finish_reason: Literal["eos", "length"]
    """Whether the model ended the answer, or the limit or the context did."""


class Engine:
    """A model and its tokenizer, ready to answer."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, dtype: Any = None):
        """Casts the weights once.

        Args:
          model: any Llama.
          tokenizer: of the same vocabulary.
          dtype: of the computation; float32 on CPU and bfloat16 elsewhere if none.
        """
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model {model.config.vocab_size}; "
                "load both from one checkpoint"
            )
        self.dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        self.model = jax.jit(lambda model: model.cast(self.dtype))(model)
        self.tokenizer = tokenizer

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Gives the answer to one prompt piece by piece, the prompt not repeated; never half a character.

        Raises:
          UserError: as `generate`.
        """
        ids = self._prompt_ids(prompt)
        sampling = check_sampling(temperature, top_p, top_k)
        text = self.tokenizer.stream()
        limit = self._limit(ids, max_new_tokens)
        for token_B, _ in islice(self._draw([ids], [limit], sampling, seed, steps=1), limit):
            if token_B[0] == self.tokenizer.eos_id:
                break
            if piece := text.push(int(token_B[0])):
                yield piece
        if rest := text.finish():
            yield rest

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[Completion]:
        """Answers a batch of prompts; no answer depends on the other prompts, only on its place in the list.

        Args:
          prompts: texts, to which BOS is added, or ids taken as they are.
          max_new_tokens: most tokens of an answer; the context length limits it too.
          temperature: divides the logits; 0 takes the likeliest token.
          top_p: draws from the likeliest tokens that together hold this probability.
          top_k: draws from this many likeliest tokens; 0 for all.
          seed: the same seed gives the same answers.

        Raises:
          UserError: a prompt that leaves no room in the context, or a setting out of its range.
        """
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        if not ids:
            return []
        sampling = check_sampling(temperature, top_p, top_k)
        limits = [self._limit(prompt, max_new_tokens) for prompt in ids]
        answers: list[list[int]] = [[] for _ in ids]
        logprobs: list[list[float]] = [[] for _ in ids]
        ended = [False for _ in ids]
        by_eos = [False for _ in ids]
        for token_B, logprob_B in self._draw(ids, limits, sampling, seed, steps=BATCH_STEPS):
            for row in (row for row, done in enumerate(ended) if not done):
                by_eos[row] = int(token_B[row]) == self.tokenizer.eos_id
                if not by_eos[row]:
                    answers[row].append(int(token_B[row]))
                    logprobs[row].append(float(logprob_B[row]))
                ended[row] = by_eos[row] or len(answers[row]) == limits[row]
            if all(ended):
                break
        return [
            Completion(self.tokenizer.decode(answer), tuple(answer), tuple(scores), "eos" if eos else "length")
            for answer, scores, eos in zip(answers, logprobs, by_eos, strict=True)
        ]

    def _draw(
        self, prompts: list[list[int]], limits: list[int], sampling: Sampling, seed: int, steps: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives (token_B, logprob_B) without end; beyond its limit a sequence may go on with garbage."""
        count_B = np.array([len(prompt) for prompt in prompts], np.int32)
        context = self.model.config.context_length
        tokens_BT = np.zeros((len(prompts), bucket(count_B.max(), context)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        row_key_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(prompts)))
        # Room for the longest answer from the start: a cache that grew would be copied, and compiled for anew.
        slots = bucket((count_B + limits).max(), context)
        cache, drawn = prefill(self.model, tokens_BT, count_B, row_key_B, sampling, slots=slots, dtype=self.dtype)
        yield np.asarray(drawn.token_B), np.asarray(drawn.logprob_B)
        number, token_B = 1, drawn.token_B
        while True:
            cache, drawn = decode(self.model, cache, token_B, row_key_B, number, sampling, steps=steps)
            number, token_B = number + steps, drawn.token_B[-1]
            yield from zip(np.asarray(drawn.token_B), np.asarray(drawn.logprob_B), strict=True)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
        context = self.model.config.context_length
        if not 0 < len(ids) < context:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the model's context has room for 1 to {context - 1} and an answer. "
                "Shorten the prompt"
            )
        return ids

    def _limit(self, prompt: list[int], max_new_tokens: int) -> int:
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
        return min(max_new_tokens, self.model.config.context_length - len(prompt))


def check_sampling(temperature: float, top_p: float, top_k: int) -> Sampling:
    """The three as a `Sampling`.

    Raises:
      UserError: one is out of its range; says which range that is.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UserError(
            f"--temperature {temperature} --top-p {top_p} --top-k {top_k}: expected a temperature of at least 0, "
            "a top-p above 0 and at most 1, a top-k of at least 0 (0 keeps all)"
        )
    return Sampling(temperature, top_p, top_k)


def bucket(length: int, longest: int) -> int:
    """The power of two, from `SMALLEST_BUCKET` on, that a length is padded to; never beyond `longest`."""
    return min(max(SMALLEST_BUCKET, 1 << (int(length) - 1).bit_length()), longest)
