"""Prompts as they are asked (paper 3.2.3): encoded, some held out, one epoch after another in orders of their own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.chat import Dialogue, Template, encode_prompt
from llama_jax.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """A dialogue that waits for an answer."""

    dialogue: Dialogue
    ids: list[int]
    category: str
    """Its risk category; empty where it is not adversarial."""


def encode_fitting(
    prompts: Mapping[Dialogue, str], tokenizer: Tokenizer, template: Template, context: int, max_new_tokens: int
) -> tuple[list[Prompt], str]:
    """The prompts that leave room for an answer, encoded; and what is to be said of the others.

    Args:
      prompts: with their categories, as `read_prompts` gives them.
      tokenizer: of the model that is asked.
      template: its chat format.
      context: tokens that the model reads.
      max_new_tokens: of an answer.

    Raises:
      UserError: none fits.
    """
    encoded = [Prompt(one, encode_prompt(tokenizer, one, template), risk) for one, risk in prompts.items()]
    fitting = [prompt for prompt in encoded if len(prompt.ids) + max_new_tokens <= context]
    if not fitting:
        raise UserError(
            f"none of {len(encoded)} prompts leaves room for --max-new-tokens {max_new_tokens} in the model's context of "
            f"{context} tokens; lower it"
        )
    short = len(encoded) - len(fitting)
    return fitting, f"{short} of {len(encoded)} prompts leave no room for an answer and are left out" if short else ""


def hold_out(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and `count` others, which `seed` chooses, both in their order.

    Raises:
      UserError: no prompt would be left to train on.
    """
    if count and count >= len(prompts):
        raise UserError(
            f"--eval-prompts {count} would leave none of {len(prompts)} prompts to train on; lower it, 0 holds out none"
        )
    chosen = {int(i) for i in np.random.default_rng([seed, 1]).permutation(len(prompts))[:count]}
    return [p for i, p in enumerate(prompts) if i not in chosen], [p for i, p in enumerate(prompts) if i in chosen]


def batch_of(prompts: Sequence[Prompt], batch: int, iteration: int, seed: int) -> list[Prompt]:
    """The prompts of an iteration: the epochs, each in an order of its own, stand one behind another and are cut into
    batches.
    """
    count, places = len(prompts), range(iteration * batch, (iteration + 1) * batch)
    orders = {e: np.random.default_rng([seed, 2, e]).permutation(count) for e in {p // count for p in places}}
    return [prompts[orders[place // count][place % count]] for place in places]
