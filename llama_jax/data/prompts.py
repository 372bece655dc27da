"""Dialogues that wait for their last answer, which a model is to give (paper 3.2.3)."""

from dataclasses import dataclass
from typing import Literal

from llama_jax.data.dialogues import Skipped, detect_shape, open_rows, read_dialogues, shape_named
from llama_jax.errors import UserError
from llama_jax.text.chat import Dialogue, Template


@dataclass(frozen=True)
class PromptsConfig:
    """What is asked."""

    sources: tuple[str, ...] = ()
    """Dialogues, of each its last question with all before it: a .jsonl file, jsonl:GLOB, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    shape: Literal["auto", "messages", "instruction", "prompt", "transcript"] = "auto"
    """How rows hold dialogues; auto: what fits most of a source's first rows."""
    bad_rows: float = 0.01
    """Share of a source's rows that may be left out because they are no dialogues; more is an error."""


def read_prompts(config: PromptsConfig, template: Template) -> tuple[list[Dialogue], str]:
    """The different prompts in order, each ending with a question; and what was found, a line for each source.

    Raises:
      UserError: bad sources, too many bad rows, or nothing in them.
    """
    named = shape_named(config.shape)
    prompts: dict[Dialogue, None] = {}
    notes: list[str] = []
    for spec in config.sources:
        rows = open_rows(spec)
        shape, skipped, before, count = named or detect_shape(rows, spec), Skipped(), len(prompts), 0
        for prompt in read_dialogues(rows, shape, template, skipped, last="user"):
            prompts[prompt] = None
            count += 1
        skipped.check(config.bad_rows)
        repeated = count - (len(prompts) - before)
        notes.append(f"{spec}: {shape.name}: {skipped}" + (f"; {repeated} are there already" if repeated else ""))
    if not prompts:
        raise UserError(f"{', '.join(config.sources)}: no dialogue is left to take a question from")
    return list(prompts), "\n".join(notes)
