"""The model's side of the safety benchmarks: texts and dialogues in, continuations, log-probabilities and answers out.

An answer depends on its own prompt and on the seed alone, so that neither a batch nor a stop between two of them changes it.
What is too long for the model's context loses its beginning, so much that the continuation has its room.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.errors import UserError
from llama_jax.evaluation.safety_config import Decoding
from llama_jax.evaluation.safety_paper_values import PaperModel, nearest_model
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.text.chat import Message, Template, encode_prompt

Dialogue = Sequence[Message]


@dataclass(frozen=True)
class SafetyModel:
    """A model as the benchmarks need it; any functions will do."""

    name: str
    """Tells its answers from those of another model."""
    paper: PaperModel
    """Whose numbers stand beside its."""
    generate: Callable[[Sequence[str]], list[str]]
    """The continuation of each prompt."""
    log_probs: Callable[[Sequence[str], Sequence[str]], list[float]]
    """The log-probability, in nats, of each continuation behind its prompt."""
    answer: Callable[[Sequence[Dialogue]], list[str]]
    """The next answer of each dialogue."""
    count_cut: Callable[[Sequence[str]], int] = lambda prompts: 0
    """How many prompts lose their beginning."""
    count_cut_pairs: Callable[[Sequence[str], Sequence[str]], int] = lambda prompts, continuations: 0
    """How many prompts do before their continuations."""
    has_room: Callable[[Dialogue], bool] = lambda dialogue: True
    """Whether the context holds a dialogue and an answer of full length."""


def make_safety_model(llama: Llama, name: str, *, is_chat: bool, template: Template, decoding: Decoding) -> SafetyModel:
    """A model of this project.

    Args:
      llama: the model.
      name: of the checkpoint.
      is_chat: whether it is to be compared with the paper's chat models or with its base models.
      template: in which it reads dialogues.
      decoding: how it answers.
    """
    context, config = llama.model.config.context_length, llama.model.config

    def has_room(dialogue: Dialogue) -> bool:
        return len(encode_prompt(llama.tokenizer, dialogue, template)) + decoding.max_answer_tokens <= context

    return SafetyModel(
        name,
        nearest_model(config.n_params, is_chat),
        make_generate(llama, decoding),
        make_log_probs(llama),
        make_answer(llama, template, decoding),
        lambda prompts: sum(_ids(llama, prompt, decoding.max_new_tokens)[1] for prompt in prompts),
        lambda prompts, texts: sum(_pair(llama, *pair)[2] for pair in zip(prompts, texts, strict=True)),
        has_room,
    )


def make_generate(llama: Llama, decoding: Decoding) -> Callable[[Sequence[str]], list[str]]:
    """Continues prompts as text."""

    def generate(prompts: Sequence[str]) -> list[str]:
        completions = llama.generate(
            [_ids(llama, prompt, decoding.max_new_tokens)[0] for prompt in prompts],
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=[_seed(decoding.seed, prompt) for prompt in prompts],
        )
        return [completion.text for completion in completions]

    return generate


def make_answer(llama: Llama, template: Template, decoding: Decoding) -> Callable[[Sequence[Dialogue]], list[str]]:
    """Answers dialogues, which must leave room for it."""

    def answer(dialogues: Sequence[Dialogue]) -> list[str]:
        replies = reply_to(
            llama,
            dialogues,
            template,
            seeds=[_seed(decoding.seed, json.dumps(dialogue)) for dialogue in dialogues],
            max_new_tokens=decoding.max_answer_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
        )
        return [reply.text for reply in replies]

    return answer


def make_log_probs(llama: Llama) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """Scores continuations as `Llama.score` does, which refuses what is too long for the context."""

    def log_probs(prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        pairs = [_pair(llama, *pair)[:2] for pair in zip(prompts, continuations, strict=True)]
        return [score.log_prob for score in llama.score(pairs)]

    return log_probs


def _ids(llama: Llama, prompt: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """A prompt's tokens, at most as many as leave room for BOS and the continuation; and whether any were cut."""
    room = llama.model.config.context_length - max_new_tokens - 1
    if room < 1:
        raise UserError(
            f"--safety.decoding.max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{llama.model.config.context_length} tokens; lower it"
        )
    ids = llama.tokenizer.encode(prompt, bos=False)
    return ids[-room:], len(ids) > room


def _pair(llama: Llama, prompt: str, continuation: str) -> tuple[list[int], list[int], bool]:
    """Prompt and continuation as tokens, parted where `Llama.score` parts texts; and whether any were cut."""
    whole = llama.tokenizer.encode(prompt + continuation, bos=False)
    start = len(llama.tokenizer.encode(prompt.rstrip(), bos=False))
    first = max(0, len(whole) - llama.model.config.context_length)  # BOS is before them, and the last is only predicted
    if first > start:
        raise UserError(
            f"an answer has {len(whole) - start} tokens and the model's context {llama.model.config.context_length}: "
            f"{continuation[:80]!r}..."
        )
    return whole[first:start], whole[start:], first > 0


def _seed(seed: int, text: str) -> int:
    return seed_of(seed, int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
