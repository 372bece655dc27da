"""Log-probabilities of given tokens, in which the (B, T, V) logits never exist whole.

Texts of like length share a batch. Batches have a few shapes only, so that few programs are compiled, and what a text is given does not depend on the
others.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Compute
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import ways

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


@partial(jax.jit, static_argnames="n_chunks")
def score_batch(
    model: Transformer, tokens_BT: jax.Array, targets_BT: jax.Array, n_chunks: int
) -> tuple[jax.Array, jax.Array]:
    """How likely each target is after the tokens up to its place.

    Args:
      model: its dtype is that of the computation.
      tokens_BT: int32, padded on the right.
      targets_BT: int32; the token after each.
      n_chunks: in how many parts the logits are computed, one after another.

    Returns:
      log-probabilities (B, T), float32, and whether the target is the likeliest (B, T), bool.
    """
    x_BTD = model.hidden(tokens_BT, compute=Compute(dtype=model.embedding_VD.dtype.name, remat="none"))
    T, pad = tokens_BT.shape[1], -tokens_BT.shape[1] % n_chunks

    def split(a: jax.Array) -> jax.Array:
        # Every n-th token makes a chunk, so that each device of a split sequence has a part in every chunk.
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, n_chunks, *a.shape[2:]), 2, 0)

    def chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = inputs
        logits_BCV = model.logits(x_BCD)
        ids_V = jnp.arange(logits_BCV.shape[-1])
        # A sum, not a lookup, which would gather a sharded vocabulary.
        target_BC1 = jnp.sum(jnp.where(ids_V == targets_BC[..., None], logits_BCV, 0.0), -1, keepdims=True)
        comes_first_BCV = (logits_BCV > target_BC1) | ((logits_BCV == target_BC1) & (ids_V < targets_BC[..., None]))
        return target_BC1[..., 0] - jax.nn.logsumexp(logits_BCV, -1), ~jnp.any(comes_first_BCV, -1)

    log_probs, is_greedy = jax.lax.map(chunk, (split(x_BTD), split(targets_BT)))
    joined = (jnp.moveaxis(a, 0, 2).reshape(a.shape[1], -1)[:, :T] for a in (log_probs, is_greedy))
    return tuple(joined)


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
        n_chunks = min(T, -(-B * T // LOGIT_TOKENS))
        results = jax.device_get(score_batch(model, tokens_BT[:, :-1], tokens_BT[:, 1:], n_chunks))
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
    """The next power of two, so that few shapes are compiled."""
    return max(least, 1 << (n - 1).bit_length())
