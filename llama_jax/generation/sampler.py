"""Choosing the next token (reference code of the paper): temperature, top-p, top-k; prefill and decode."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.generation.cache import Cache, append, init_cache
from llama_jax.model.transformer import Llama


class Sampling(NamedTuple):
    """How a token is drawn; numbers, not shapes, so changing them compiles nothing anew."""

    temperature: float = 0.6
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 0.9
    """Keeps a token if those likelier than it hold no more than this probability together; 1 keeps all."""
    top_k: int = 0
    """Keeps this many likeliest tokens; 0 keeps all."""


class Drawn(NamedTuple):
    """What one decoding step gives for every sequence."""

    token_B: jax.Array
    """int32."""
    logprob_B: jax.Array
    """float32, log-probability of the token under the distribution it was drawn from; at temperature 0 under the
    model's own.
    """


def sample(logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling) -> Drawn:
    """Draws one token for every sequence, each with a key of its own.

    Args:
      logits_BV: float32.
      key_B: JAX keys.
      sampling: temperature and truncation.
    """
    greedy = sampling.temperature == 0
    logprobs_BV = support_logprobs(logits_BV, sampling)
    drawn_B = jax.vmap(jax.random.categorical)(key_B, logprobs_BV)
    token_B = jnp.where(greedy, jnp.argmax(logits_BV, axis=-1), drawn_B).astype(jnp.int32)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
    return Drawn(token_B, logprob_B)


def support_logprobs(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities of the distribution that `sampling` draws from, -inf outside its support.

    The support is the top k of the tempered distribution and, of what these leave, top-p as the reference has it: a
    token stays if the mass of the likelier ones does not exceed p. Ties are kept or dropped together.
    """
    temperature = jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)
    scaled_BV = logits_BV / temperature

    def truncate(scaled_BV: jax.Array) -> jax.Array:
        V = scaled_BV.shape[-1]
        ordered_BV = -jnp.sort(-scaled_BV, axis=-1)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
        in_k_V = jnp.arange(V) < k
        mass_BV = jax.nn.softmax(jnp.where(in_k_V, ordered_BV, -jnp.inf), axis=-1)
        likelier_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
        stays_BV = in_k_V & (likelier_BV <= sampling.top_p)
        least_B1 = jnp.min(jnp.where(stays_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf)

    cuts = (sampling.temperature != 0) & ((sampling.top_p < 1) | (sampling.top_k > 0))
    return jax.nn.log_softmax(jax.lax.cond(cuts, truncate, lambda x: x, scaled_BV), axis=-1)


@partial(jax.jit, static_argnames=("slots", "dtype"))
def prefill(
    model: Llama,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    row_key_B: jax.Array,
    sampling: Sampling,
    slots: int,
    dtype: Any,
) -> tuple[Cache, Drawn]:
    """Reads the prompts into a new cache and draws the first token of every answer.

    Args:
      model: the weights.
      tokens_BT: int32 prompts, padded on the right.
      count_B: int32, real tokens of each.
      row_key_B: one JAX key for each sequence.
      sampling: how to draw.
      slots: tokens that the cache has room for.
      dtype: of the computation and the cache.
    """
    B = tokens_BT.shape[0]
    nothing = init_cache(model.config, B, 0, dtype)
    x_BTD, k_LBTKH, v_LBTKH = model.extend(tokens_BT, nothing.k_LBSKH, nothing.v_LBSKH, nothing.length_B)
    cache = append(init_cache(model.config, B, slots, dtype), k_LBTKH, v_LBTKH, count_B)
    last_B1D = jnp.take_along_axis(x_BTD, (count_B - 1)[:, None, None], axis=1)
    return cache, sample(model.logits(last_B1D)[:, 0], step_keys(row_key_B, 0), sampling)


@partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def decode(
    model: Llama, cache: Cache, token_B: jax.Array, row_key_B: jax.Array, first: int, sampling: Sampling, steps: int
) -> tuple[Cache, Drawn]:
    """Draws the next `steps` tokens of every sequence, on the device, without a word to the host.

    Args:
      model: the weights.
      cache: donated.
      token_B: int32, the last token drawn, not yet in the cache.
      row_key_B: one JAX key for each sequence, the same in every call.
      first: how many tokens of each answer have been drawn already.
      sampling: how to draw.
      steps: tokens to draw.

    Returns:
      the cache, and what was drawn, with a leading axis of `steps`.
    """
    one_B = jnp.ones_like(token_B)

    def step(carry: tuple[Cache, jax.Array], number: jax.Array) -> tuple[tuple[Cache, jax.Array], Drawn]:
        cache, token_B = carry
        x_B1D, k_LB1KH, v_LB1KH = model.extend(token_B[:, None], cache.k_LBSKH, cache.v_LBSKH, cache.length_B)
        cache = append(cache, k_LB1KH, v_LB1KH, one_B)
        drawn = sample(model.logits(x_B1D)[:, 0], step_keys(row_key_B, number), sampling)
        return (cache, drawn.token_B), drawn

    (cache, _), drawn = jax.lax.scan(step, (cache, token_B), first + jnp.arange(steps))
    return cache, drawn


def step_keys(row_key_B: jax.Array, number: jax.Array | int) -> jax.Array:
    """The keys with which token `number` of every answer is drawn: no key is used twice, whatever the batch."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(row_key_B)
