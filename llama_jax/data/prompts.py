"""Dialogues that wait for their last answer, which a model is to give (paper 3.2.3), and which of them are adversarial (4.2.1).

An adversarial prompt asks for what should not be given. Its annotators tag it with a risk category; the paper's are illicit
and criminal activities, hateful and harmful activities, and unqualified advice. How it is asked (the paper's attack vector)
is not read, as nothing depends on it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llama_jax.data.dialogues import Skipped, detect_shape, open_rows, read_tagged, shape_named
from llama_jax.errors import UserError
from llama_jax.text.chat import BadDialogue, Dialogue, Template

UNKNOWN_RISK = "unknown"


@dataclass(frozen=True)
class PromptsConfig:
    """What is asked."""

    sources: tuple[str, ...] = ()
    """Dialogues, of each its last question with all before it: a .jsonl file, jsonl:GLOB, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    shape: Literal["auto", "messages", "instruction", "prompt", "transcript", "question"] = "auto"
    """How rows hold dialogues; auto: what fits most of a source's first rows."""
    category: str = "risk"
    """The rows' field that says which prompts are adversarial: a risk category, or true; other rows have none, "" or false."""
    bad_rows: float = 0.01
    """Share of a source's rows that may be left out because they are no dialogues; more is an error."""


def check_sources(config: PromptsConfig) -> None:
    """Raises UserError if nothing is named that prompts could be read from."""
    if not config.sources:
        raise UserError("No prompts. Set --data.sources to a .jsonl file of dialogues, hf:NAME or tfds:NAME.")


def read_prompts(config: PromptsConfig, template: Template) -> tuple[dict[Dialogue, str], str]:
    """The different prompts in order, each ending with a question, with their risk categories; and what was found, a line
    for each source.

    The category is "" where a prompt is not adversarial, and `UNKNOWN_RISK` where it is and no more is said. Of a prompt
    that is there twice the first category counts.

    Raises:
      UserError: bad sources, too many bad rows, or nothing in them.
    """
    named = shape_named(config.shape)
    prompts: dict[Dialogue, str] = {}
    notes: list[str] = []
    for spec in config.sources:
        rows = open_rows(spec)
        shape, skipped, before, count = named or detect_shape(rows, spec), Skipped(), len(prompts), 0
        risks: Counter[str] = Counter()
        for prompt, risk in read_tagged(rows, shape, template, skipped, _risk_in(config.category), last="user"):
            prompts[prompt] = prompts.get(prompt) or risk
            count += 1
            risks[risk] += bool(risk)
        skipped.check(config.bad_rows)
        repeated = count - (len(prompts) - before)
        notes.append(
            f"{spec}: {shape.name}: {skipped}"
            + (f"; {repeated} are there already" if repeated else "")
            + (f"; adversarial: {_listed(risks)}" if risks.total() else "")
        )
    if not prompts:
        raise UserError(f"{', '.join(config.sources)}: no dialogue is left to take a question from")
    return prompts, "\n".join(notes)


def _risk_in(field: str) -> Callable[[dict], str]:
    """What reads a row's risk category; raises BadDialogue if it is neither text nor true or false."""

    def risk(row: dict) -> str:
        value = row.get(field)
        if value is None or isinstance(value, bool):
            return UNKNOWN_RISK if value else ""
        if not isinstance(value, str):
            raise BadDialogue("no category", f"{field} is {type(value).__name__}, expected text, true or false")
        return value.strip()

    return risk


def _listed(risks: Counter[str]) -> str:
    return ", ".join(f"{count} {risk}" for risk, count in risks.most_common() if risk)
