"""The next answer of many dialogues at once, each as in a conversation of its own (paper 3.3 samples its dialogues so)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from llama_jax.generation.session import spoken
from llama_jax.text.chat import Message, Template, encode_prompt

if TYPE_CHECKING:
    from llama_jax.generation.llama import Llama


class Reply(NamedTuple):
    """What a model answered."""

    text: str
    """Without white space around it, and up to the first of the template's tags, as in a conversation."""
    ended: Literal["whole", "empty", "too long", "no room"]
    """Whether the model ended it, at once or not, or max_new_tokens did; or the context had no room for so many tokens."""


def reply_to(
    llama: "Llama",
    dialogues: Sequence[Sequence[Message]],
    template: Template,
    *,
    seeds: Sequence[int],
    max_new_tokens: int = 200,
    temperature: float = 0.6,
    top_p: float = 0.9,
    samples: int = 1,
) -> list[Reply]:
    """Answers dialogues that wait for an answer, as one batch.

    Args:
      llama: the model.
      dialogues: each ends with the user's turn.
      template: the format that the model was trained with.
      seeds: one for each answer, so that it does not depend on the others.
      max_new_tokens: of an answer; so much of the context must be free for it.
      temperature: as in `Llama.generate`, like top_p.
      samples: answers to each dialogue, side by side in what is returned; its prompt is read once for all of them.

    Raises:
      UserError: a dialogue that cannot be encoded, or a setting out of range.
    """
    prompts = [encode_prompt(llama.tokenizer, messages, template) for messages in dialogues]
    room = llama.model.config.context_length - max_new_tokens
    fitting = [number for number, ids in enumerate(prompts) if len(ids) <= room]
    replies = [Reply("", "no room")] * (len(prompts) * samples)
    # Filled up with the first again, so that few sizes of a batch are compiled, and nothing ends later than without.
    rows = fitting + fitting[:1] * ((1 << max(0, len(fitting) - 1).bit_length()) - len(fitting))
    completions = llama.generate(
        [prompts[number] for number in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=[seeds[place] for number in rows for place in range(number * samples, (number + 1) * samples)],
        samples=samples,
    )
    places = [place for number in fitting for place in range(number * samples, (number + 1) * samples)]
    for place, completion in zip(places, completions[: len(places)], strict=True):
        is_whole = completion.finish_reason == "eos" or any(tag in completion.text for tag in template.tags)
        text = "".join(spoken(iter([completion.text]), template.tags))
        replies[place] = Reply(text, "too long" if not is_whole else "whole" if text else "empty")
    return replies


def seed_of(*key: int) -> int:
    """A seed of 32 bits, another one for each key of equally many numbers."""
    return int(np.random.SeedSequence([number & 0xFFFFFFFF for number in key]).generate_state(1)[0])
