"""The user's side of dialogues alone, for a model to answer anew (paper 3.3)."""

import itertools
from dataclasses import dataclass
from typing import Literal

from llama_jax.data.dialogues import Skipped, detect_shape, open_rows, read_dialogues, shape_named
from llama_jax.errors import UserError
from llama_jax.text.chat import Template


@dataclass(frozen=True)
class QuestionsConfig:
    """Whose questions are asked again."""

    sources: tuple[str, ...] = ()
    """Dialogues, whose user's messages alone are used: a .jsonl file, jsonl:GLOB, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    shape: Literal["auto", "messages", "instruction", "prompt", "transcript"] = "auto"
    """How rows hold dialogues; auto: what fits most of a source's first rows."""
    bad_rows: float = 0.01
    """Share of a source's rows that may be left out because they are no dialogues; more is an error."""
    join: int = 1
    """Make one dialogue of the questions of so many: data of single questions leave no turn to forget in."""


def read_questions(config: QuestionsConfig, template: Template) -> tuple[list[tuple[str, ...]], str]:
    """The user's messages of each dialogue, or of every few of them joined; and what was found, a line for each source.

    Raises:
      UserError: bad sources, too many bad rows, or nothing in them.
    """
    named = shape_named(config.shape)
    found: list[list[str]] = []
    notes: list[str] = []
    for spec in config.sources:
        rows = open_rows(spec)
        shape, skipped = named or detect_shape(rows, spec), Skipped()
        for dialogue in read_dialogues(rows, shape, template, skipped):
            found.append([message.content for message in dialogue if message.role == "user"])
        skipped.check(config.bad_rows)
        notes.append(f"{spec}: {shape.name}: {skipped}")
    if not found:
        raise UserError(f"{', '.join(config.sources)}: no dialogue is left to take questions from")
    joined = [tuple(itertools.chain(*found[at : at + config.join])) for at in range(0, len(found), config.join)]
    return joined, "\n".join(notes)
