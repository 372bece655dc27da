"""Lists that a model writes itself (paper 3.3: hobbies and figures for ghost attention, so that it knows all of them)."""

import re
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.errors import UserError
from llama_jax.generation.replies import reply_to
from llama_jax.text.chat import Message, Template

if TYPE_CHECKING:
    from llama_jax.generation.llama import Llama

_ANSWERS = 8  # Our choice: lists that are asked for, as one repeats itself before it is long
_TOKENS = 512  # of each
_MARK = re.compile(r"(?:[-*\u2022]|\(?\d+\s*[.):])\s*")


def write_list(
    llama: "Llama", wanted: str, length: int, template: Template, *, seed: int, temperature: float, top_p: float
) -> list[str]:
    """Asks a model for a list, several times, and puts together what is in its answers.

    Args:
      llama: the model.
      wanted: of what, in the plural.
      length: entries at most.
      template: the format that the model was trained with.
      seed: the same seed gives the same list.
      temperature: as in `Llama.generate`, like top_p.

    Raises:
      UserError: there are fewer than two entries.
    """
    request = f"Write a list of {length} {wanted}, one a line, each in a few words and without an explanation."
    replies = reply_to(
        llama,
        [(Message("user", request),)] * _ANSWERS,
        template,
        seeds=np.random.SeedSequence(seed & 0xFFFFFFFF).generate_state(_ANSWERS).tolist(),
        max_new_tokens=min(_TOKENS, llama.model.config.context_length // 2),
        temperature=temperature,
        top_p=top_p,
    )
    # Of an answer that was cut off, the last entry may be half.
    lists = [read_list(reply.text)[: None if reply.ended == "whole" else -1] for reply in replies]
    found = list(dict.fromkeys(entry for entries in lists for entry in entries))[:length]
    if len(found) < 2:
        raise UserError(
            f"asked to {request[0].lower()}{request[1:]} the model wrote {replies[0].text[:200]!r}; give lists with "
            "--constraints FILE.json"
        )
    return found


def read_list(answer: str) -> list[str]:
    """The entries of a list in an answer: its lines with a number or a bullet, if any has one, else all its lines.

    Our choice: a line of more than six words is no entry, as it explains, or stands before or behind the list.
    """
    lines = [line.strip() for line in answer.splitlines()]
    marked = [line for line in lines if _MARK.match(line)]
    entries = [_MARK.sub("", line, count=1).strip(" .*\"'") for line in marked or lines]
    return list(dict.fromkeys(entry for entry in entries if 0 < len(entry.split()) <= 6 and not entry.endswith(":")))
