"""Log-probabilities of given tokens, in which the (B, T, V) logits never exist whole.

Texts of like length share a batch. Batches have a few shapes only, so that few programs are compiled, and what a text is given does not depend on the
others.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Compute
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import constrain, ways

BATCH_TOKENS = 4096  # tokens per dispatch, padding included; a longer text is one by itself
LOGIT_TOKENS = 512  # tokens whose logits exist at once


class Score(NamedTuple):
    """How likely a continuation is after its prompt."""

    log_prob: float
    """Sum over its tokens, in nats."""
    n_tokens: int
    """How many they are."""
    is_greedy: bool
    """Whether each is the likeliest after those before it (of equally likely ones the lowest id): what temperature 0 gives."""


@jax.jit
def score_batch(model: Transformer, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How likely each target is after the tokens up to its place.

    Args:
      model: its dtype is that of the computation.
      tokens_BT: int32, padded on the right.
      targets_BT: int32; the token after each.

    Returns:
      log-probabilities (B, T), float32, and whether the target is the likeliest (B, T), bool; whole on every process.
    """
    x_BTD = model.hidden(tokens_BT, compute=Compute(dtype=model.embedding_VD.dtype.name, remat="none"))
    return tuple(constrain(x_BT, None, None) for x_BT in logit_chunks(model, x_BTD, targets_BT))


def logit_chunks(model: Transformer, x_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each target's log-probability and whether it is the likeliest, from the residual stream, with `LOGIT_TOKENS` logits at a time."""
    B, T = targets_BT.shape
    n_chunks = min(T, -(-B * T // LOGIT_TOKENS))
    pad = -T % n_chunks

    def split(a: jax.Array) -> jax.Array:
        # Every n-th token makes a chunk, so that each device of a split sequence has a part in every chunk.
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, n_chunks, *a.shape[2:]), 2, 0)

    chunks = split(x_BTD), split(targets_BT)
    found = jax.lax.map(lambda chunk: of_target(model.logits(chunk[0]), chunk[1]), chunks)
    return tuple(jnp.moveaxis(a, 0, 2).reshape(B, -1)[:, :T] for a in found)


def of_target(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of a target, and whether it is the likeliest (of equally likely ones the lowest id is).

    Args:
      logits: (..., V), float32.
      target: (...), int32.
    """
    ids_V = jnp.arange(logits.shape[-1])
    # A sum, not a lookup, which would gather a sharded vocabulary.
    of_it = jnp.sum(jnp.where(ids_V == target[..., None], logits, 0.0), -1, keepdims=True)
    comes_first = (logits > of_it) | ((logits == of_it) & (ids_V < target[..., None]))
    return of_it[..., 0] - jax.nn.logsumexp(logits, -1), ~jnp.any(comes_first, -1)


def score_tokens(model: Transformer, texts: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its tokens' log-probabilities (float32) and whether they are the likeliest (bool), from the second token on.

    Args:
      model: on the ambient mesh, if any.
      texts: token ids, BOS first; each at most one more than the model's context, since its last token is only predicted.
    """
    scores: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.float32), np.zeros(0, bool)) for _ in texts]
    for members, T in batches([len(ids) - 1 for ids in texts], model.config.context_length):
        B = rounded_up(len(members), least=1)
        B += -B % ways("batch")
        tokens_BT = np.zeros((B, T + 1), np.int32)
        for row, i in enumerate(members):
            tokens_BT[row, : len(texts[i])] = texts[i]
        results = jax.device_get(score_batch(model, tokens_BT[:, :-1], tokens_BT[:, 1:]))
        for row, i in enumerate(members):
            scores[i] = tuple(result[row, : len(texts[i]) - 1] for result in results)
    return scores


def batches(lengths: Sequence[int], context: int) -> Iterator[tuple[list[int], int]]:
    """Which texts to score together, the longest first, and how many tokens they are padded to; a text of length 0 is in none."""
    by_size: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        if length:
            T = min(rounded_up(length, least=16), context)
            T += -T % ways("length")
            by_size.setdefault(T, []).append(i)
    for T, members in sorted(by_size.items(), reverse=True):
        rows = max(1, BATCH_TOKENS // T)
        for start in range(0, len(members), rows):
            yield members[start : start + rows], T


def rounded_up(n: int, least: int) -> int:
    """The next of a few sizes, so that few shapes are compiled: powers of two, and from 64 on three sizes between two of them."""
    power = 1 << (n - 1).bit_length()
    step = power // 8 if power > 64 else power
    return max(least, -(-n // step) * step)
