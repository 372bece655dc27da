"""How likely each of several continuations of one prompt is, as benchmarks of multiple choice ask (paper 2.3 and A.2.2).

A prompt is read once for all its choices; each choice then goes on from a copy of its keys and values. So five examples of a
thousand tokens and four answers of one token cost one reading, not four.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.generation.cache import Cache, extend, repeat, slots_for
from llama_jax.generation.llama import Llama
from llama_jax.generation.scoring import Score, logit_chunks, of_target, rounded_up, score_tokens
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import constrain, ways

CHOICE_TOKENS = 64  # of a choice; one that is longer is scored with its prompt as a text of its own

Choices = Sequence[Sequence[int]]


def score_choices(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Choices],
    *,
    batch_tokens: int = 8192,
    on_score: Callable[[int, list[Score]], None] | None = None,
) -> list[list[Score]]:
    """Scores the choices of each prompt: each the sum of its tokens' log-probabilities, given the prompt.

    Every process of a run calls it with the same arguments, and gets the same.

    Args:
      llama: the model.
      prompts: token ids as the model shall read them, one or more each; nothing is put before them.
      choices: of each prompt, one or more, each of one token or more; a prompt with its choice is at most a token longer than the context.
      batch_tokens: places for keys and values that a batch takes at most, all choices together; one prompt may take more.
      on_score: is told a prompt's number and its scores as soon as they are known; the longest come first.
    """
    scores: list[list[Score]] = [[] for _ in prompts]

    def take(number: int, of_prompt: list[Score]) -> None:
        scores[number] = of_prompt
        if on_score is not None:
            on_score(number, of_prompt)

    alone = {
        number
        for number, of_prompt in enumerate(choices)
        if len(of_prompt) == 1 or max(map(len, of_prompt)) > CHOICE_TOKENS
    }
    with llama.on_mesh():
        shared = [number for number in range(len(prompts)) if number not in alone]
        for members, slots in _batches(prompts, choices, shared, batch_tokens):
            found = _score_shared(llama, [prompts[i] for i in members], [choices[i] for i in members], slots)
            for number, of_prompt in zip(members, found, strict=False):  # rows that fill a batch stand behind
                take(number, of_prompt)
        _score_alone(llama, prompts, choices, sorted(alone), take)
    return scores


def _score_alone(llama: Llama, prompts: Sequence, choices: Sequence, numbers: list[int], take: Callable) -> None:
    """Scores prompts with their choices as texts, so many at a time that progress shows."""
    numbers = sorted(numbers, key=lambda i: -len(prompts[i]) - max(map(len, choices[i])))
    for start in range(0, len(numbers), 64):
        part = numbers[start : start + 64]
        texts = [[*prompts[i], *choice] for i in part for choice in choices[i]]
        found = iter(score_tokens(llama.model, texts))
        for i in part:
            take(i, [_score(*(x[-len(choice) :] for x in next(found))) for choice in choices[i]])


def _score(log_prob_T: np.ndarray, is_greedy_T: np.ndarray) -> Score:
    return Score(float(log_prob_T.sum(dtype=np.float64)), len(log_prob_T), bool(is_greedy_T.all()))


def _batches(
    prompts: Sequence, choices: Sequence, numbers: list[int], batch_tokens: int
) -> list[tuple[list[int], int]]:
    """Which prompts to read together and the slots of their rows: those of like length, the longest first."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i in numbers:
        slots = slots_for(len(prompts[i]) + max(map(len, choices[i])) - 1)
        by_shape.setdefault((slots, len(choices[i])), []).append(i)
    batches = []
    for (slots, n_choices), members in sorted(by_shape.items(), reverse=True):
        rows = 1 << max(1, batch_tokens // (slots * n_choices)).bit_length() - 1  # what a batch is filled up to anyway
        rows += -rows % ways("batch")
        batches += [(members[start : start + rows], slots) for start in range(0, len(members), rows)]
    return batches


def _score_shared(llama: Llama, prompts: list, choices: list[Choices], slots: int) -> list[list[Score]]:
    """Scores the choices of prompts with equally many choices each, every prompt read once."""
    B, C = rounded_up(len(prompts), least=1), len(choices[0])
    B += -B % ways("batch")
    prompts, choices = prompts + prompts[:1] * (B - len(prompts)), choices + choices[:1] * (B - len(choices))
    T = rounded_up(max(len(choice) for of_prompt in choices for choice in of_prompt), least=1)
    target_RT = np.zeros((B * C, T), np.int32)
    for row, choice in enumerate(choice for of_prompt in choices for choice in of_prompt):
        target_RT[row, : len(choice)] = choice
    cache, logits_BV = llama.read([list(ids) for ids in prompts], slots)
    first = _first_tokens(logits_BV, target_RT[:, 0].reshape(B, C))
    scored = [first]
    if T > 1:
        count_R = np.array([len(choice) - 1 for of_prompt in choices for choice in of_prompt], np.int32)
        cache, _ = repeat(cache, logits_BV, C)
        scored.append(_further_tokens(llama.model, cache, target_RT, count_R))
    log_prob_RT, is_greedy_RT = (np.concatenate(part, axis=1) for part in zip(*jax.device_get(scored), strict=True))
    rows = iter(zip(log_prob_RT, is_greedy_RT, strict=True))
    return [[_score(*(x[: len(choice)] for x in next(rows))) for choice in of_prompt] for of_prompt in choices]


@jax.jit
def _first_tokens(logits_BV: jax.Array, token_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each choice's first token, and whether it is the likeliest, both (B*C, 1)."""
    found = jax.vmap(of_target, in_axes=(None, 1), out_axes=1)(logits_BV.astype(jnp.float32), token_BC)
    return tuple(constrain(x_BC, None, None).reshape(-1, 1) for x_BC in found)


@jax.jit
def _further_tokens(
    model: Transformer, cache: Cache, token_RT: jax.Array, count_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same of each choice's tokens behind the first, (B*C, T-1), from a copy of its prompt's cache."""
    x_RTD, _ = extend(model, token_RT[:, :-1], count_R, cache)
    found = logit_chunks(model, x_RTD, token_RT[:, 1:])
    return tuple(constrain(x_RT, None, None) for x_RT in found)
