"""Drawing tokens: temperature, top-k and top-p as the reference's generation defines them, and the steps that feed them back.

Temperature, top-k and top-p are traced, so another value costs no compilation. Nothing is sorted: a support is found by bisection over the logits'
bits, 31 sums over the vocabulary (measured at 32k on a CPU: 0.4 ms a row, where sorting takes 20).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.generation.cache import Cache, extend
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import constrain

NO_TOKEN = -1  # what a row draws after its end


class Sampling(NamedTuple):
    """How the next token is drawn: the logits are divided, cut to the k likeliest, then to the nucleus, and renormalised."""

    temperature: float | jax.Array = 0.6
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float | jax.Array = 0.9
    """Leaves out the tokens whose likelier ones hold more probability than this; 1 leaves out none."""
    top_k: int | jax.Array = 0
    """Leaves out all but this many likeliest tokens; 0 leaves out none."""


class Decoding(NamedTuple):
    """Sequences under way; a pytree that `decode` takes over and gives back."""

    cache: Cache
    token_B: jax.Array
    """Last token of each row; not in the cache yet."""
    left_B: jax.Array
    """Tokens that each row may still draw; 0 once it has ended."""
    key_B: jax.Array
    """Each row's own random key. A draw folds in its position, so that no draw shares its bits with another."""


@jax.jit
def row_keys(seed_B: jax.Array, number_B: jax.Array) -> jax.Array:
    """Each row's random key, from a seed of 32 bits and the number that tells apart rows of one seed."""
    seed_B = constrain(seed_B, "batch")
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seed_B, number_B)


def sample(logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits_BV: next-token logits.
      key_B: one random key per row; a row's draw depends on its own key and logits alone.
      sampling: the distribution.

    Returns:
      token_B int32, and its log-probability in float32 under the distribution it was drawn from (0 at temperature 0).
    """
    # Gathered along the vocabulary once, instead of a reduction over devices in every sum below.
    logits_BV = constrain(logits_BV.astype(jnp.float32), "batch", None)

    def greedy() -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32), jnp.zeros(logits_BV.shape[0])

    def draw() -> tuple[jax.Array, jax.Array]:
        log_probs_BV = log_probs(logits_BV, sampling)
        token_B = categorical(key_B, log_probs_BV)
        return token_B, jnp.take_along_axis(log_probs_BV, token_B[:, None], -1)[:, 0]

    return jax.lax.cond(sampling.temperature == 0, greedy, draw)


def log_probs(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities (B, V), float32, of the distribution that `sample` draws from at a temperature above 0; -inf outside its support."""
    logits_BV = logits_BV.astype(jnp.float32)
    # The largest is subtracted first: a tiny temperature then gives -inf, not NaN.
    gap_BV = (logits_BV.max(-1, keepdims=True) - logits_BV) / sampling.temperature

    def top_k(scores_BV: jax.Array) -> jax.Array:
        keep_BV = likeliest(gap_BV, jnp.ones_like(gap_BV), sampling.top_k - 1)
        return jnp.where(keep_BV, scores_BV, -jnp.inf)

    def top_p(scores_BV: jax.Array) -> jax.Array:
        keep_BV = likeliest(gap_BV, jax.nn.softmax(scores_BV), sampling.top_p)
        return jnp.where(keep_BV, scores_BV, -jnp.inf)

    scores_BV = jax.lax.cond(sampling.top_k > 0, top_k, lambda scores_BV: scores_BV, -gap_BV)
    scores_BV = jax.lax.cond(sampling.top_p < 1, top_p, lambda scores_BV: scores_BV, scores_BV)
    return jax.nn.log_softmax(scores_BV)


def likeliest(gap_BV: jax.Array, weight_BV: jax.Array, limit: float | jax.Array) -> jax.Array:
    """True for each token whose likelier tokens together weigh at most `limit`; equal ones count the lower id as likelier.

    Args:
      gap_BV: float32 >= 0, how far each token's logit lies below the row's largest.
      weight_BV: float32 >= 0; probabilities for top-p, ones for top-k.
      limit: same unit.
    """
    # Floats that are not negative are ordered as their bits are.
    bits_BV = jax.lax.bitcast_convert_type(gap_BV, jnp.int32)

    def weight_before(edge_B1: jax.Array) -> jax.Array:
        return jnp.sum(weight_BV, -1, keepdims=True, where=bits_BV < edge_B1)

    def set_bit(i: jax.Array, edge_B1: jax.Array) -> jax.Array:
        higher_B1 = edge_B1 | (1 << (30 - i))
        return jnp.where(weight_before(higher_B1) <= limit, higher_B1, edge_B1)

    # The largest edge with no more than `limit` before it: all before it stay, all behind it go.
    edge_B1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((gap_BV.shape[0], 1), jnp.int32))
    tied_BV = bits_BV == edge_B1
    tied_weight_BV = jnp.where(tied_BV, weight_BV, 0)
    before_BV = weight_before(edge_B1) + jnp.cumsum(tied_weight_BV, -1) - tied_weight_BV
    return (bits_BV < edge_B1) | (tied_BV & (before_BV <= limit))


def categorical(key_B: jax.Array, log_probs_BV: jax.Array) -> jax.Array:
    """One draw per row by the inverse of its cumulative distribution: one random number a row, where the Gumbel trick takes one a token."""
    probs_BV = jnp.exp(log_probs_BV)
    # A parallel sum may round so that it falls, or rises at a probability of 0: tokens of probability 0 are never candidates, and the largest
    # sum, wherever it stands, lies above every target.
    cumulative_BV = jnp.where(probs_BV > 0, jnp.cumsum(probs_BV, -1), 0)
    uniform_B1 = jax.vmap(lambda key: jax.random.uniform(key, (1,)))(key_B)
    return jnp.argmax(cumulative_BV > uniform_B1 * cumulative_BV.max(-1, keepdims=True), -1).astype(jnp.int32)


@partial(jax.jit, donate_argnames="cache")
def prefill(model: Transformer, tokens_BT: jax.Array, count_B: jax.Array, cache: Cache) -> tuple[Cache, jax.Array]:
    """Reads the next piece of every row's prompt into the cache, which is donated.

    Args:
      model: in the cache's dtype, or it is cast each time.
      tokens_BT: int32, padded on the right.
      count_B: int32, how many of a row's T tokens are real; may be 0.
      cache: with room for them.

    Returns:
      the cache, and float32 logits (B, V) behind each row's last real token (without meaning where there is none).
    """
    x_BTD, cache = extend(model, tokens_BT, count_B, cache)
    last_B = jnp.maximum(count_B - 1, 0)
    x_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
    return cache, model.logits(x_B1D)[:, 0]


@partial(jax.jit, donate_argnames="cache")
def begin(
    logits_BV: jax.Array, cache: Cache, left_B: jax.Array, key_B: jax.Array, sampling: Sampling, eos_id: int
) -> tuple[Decoding, jax.Array, jax.Array]:
    """Draws every row's first token behind its prompt.

    Args:
      logits_BV: what `prefill` gave.
      cache: donated; holds the prompts.
      left_B: int32, tokens that each row may draw, this one included.
      key_B: each row's random key.
      sampling: how to draw.
      eos_id: the token that ends a row.

    Returns:
      what `decode` goes on from; token_B (`NO_TOKEN` where none may be drawn); its log-probability.
    """
    return _draw(logits_BV, cache, left_B, key_B, sampling, eos_id)


@partial(jax.jit, static_argnames="steps", donate_argnames="state")
def decode(
    model: Transformer, state: Decoding, sampling: Sampling, eos_id: int, steps: int, enough: int = 0
) -> tuple[Decoding, jax.Array, jax.Array]:
    """Draws up to `steps` further tokens per row in one dispatch; returns early once every row has ended, or enough of them.

    Args:
      model: in the cache's dtype, or it is cast each time.
      state: donated: the cache is written in place.
      sampling: how to draw.
      eos_id: the token that ends a row.
      steps: tokens at most; a compilation for each value.
      enough: how many rows may still go on where others could be put in the place of those that ended.

    Returns:
      the state; tokens (B, steps) int32, an ended row's being `NO_TOKEN`; their log-probabilities.
    """
    B = state.token_B.shape[0]
    drawn = (jnp.full((B, steps), NO_TOKEN, jnp.int32), jnp.zeros((B, steps)))

    def going(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & (jnp.sum(state.left_B > 0) > enough)

    def step(carry: tuple) -> tuple:
        i, state, (tokens_BT, log_probs_BT) = carry
        state, token_B, log_prob_B = decode_token(model, state, sampling, eos_id)
        return i + 1, state, (tokens_BT.at[:, i].set(token_B), log_probs_BT.at[:, i].set(log_prob_B))

    _, state, (tokens_BT, log_probs_BT) = jax.lax.while_loop(going, step, (0, state, drawn))
    return state, tokens_BT, log_probs_BT


def decode_token(
    model: Transformer, state: Decoding, sampling: Sampling, eos_id: int
) -> tuple[Decoding, jax.Array, jax.Array]:
    """One step of `decode`: reads each row's last token and draws the next; gives state, token_B and log_prob_B."""
    cache, token_B, left_B, key_B = state
    x_BTD, cache = extend(model, token_B[:, None], (left_B > 0).astype(jnp.int32), cache)
    return _draw(model.logits(x_BTD)[:, 0], cache, left_B, key_B, sampling, eos_id)


def _draw(logits_BV, cache, left_B, key_B, sampling, eos_id) -> tuple[Decoding, jax.Array, jax.Array]:
    token_B, log_prob_B = sample(logits_BV, jax.vmap(jax.random.fold_in)(key_B, cache.length_B), sampling)
    draws_B = left_B > 0
    left_B = jnp.where(draws_B & (token_B != eos_id), left_B - 1, 0)
    state = Decoding(cache, token_B, left_B, key_B)
    return state, jnp.where(draws_B, token_B, NO_TOKEN), jnp.where(draws_B, log_prob_B, 0.0)
