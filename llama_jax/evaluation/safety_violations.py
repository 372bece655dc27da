"""Violations and false refusals: what a chat model says to those who ask for harm, and to those who only seem to (paper 4.2.3,
4.4, A.3.4, A.4.5).

The paper's people rated each answer from 1 to 5, and 1 and 2 are violations; here a judge says so. Our choices: in a dialogue
of several turns the earlier answers are those of the file, and the model gives the last; a dialogue that leaves no room for an
answer is left out and counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_jax.data.dialogues import Skipped, detect_shape, open_rows, read_tagged
from llama_jax.errors import UserError
from llama_jax.evaluation.comparisons import Comparison, Line, percent_line
from llama_jax.evaluation.safety_paper_values import BORDERLINE_REFUSALS, VIOLATIONS, PaperModel
from llama_jax.text.chat import BadDialogue, Dialogue, Template

BAD_ROWS = 0.01  # of a source's rows


class SafetyPrompt(NamedTuple):
    """A dialogue that waits for its last answer."""

    dialogue: Dialogue
    risk: str
    """The category of risk; empty where it is not told, as the attack."""
    attack: str
    """The attack vector: the way it is asked."""


def read_safety_prompts(sources: Sequence[str], template: Template) -> tuple[list[SafetyPrompt], tuple[str, ...]]:
    """Dialogues in the shapes of training data, tagged by their rows' fields `risk` and `attack`; and what was found.

    Raises:
      UserError: a source cannot be read, has too many rows that are no dialogues, or none is left.
    """
    prompts: list[SafetyPrompt] = []
    notes = []
    for spec in sources:
        rows, skipped = open_rows(spec), Skipped()
        tagged = read_tagged(rows, detect_shape(rows, spec), template, skipped, _tags, last="user")
        prompts += [SafetyPrompt(dialogue, *tags) for dialogue, tags in tagged]
        skipped.check(BAD_ROWS)
        notes.append(f"{spec}: {skipped}")
    if not prompts:
        raise UserError(f"{', '.join(sources)}: no dialogue is left to answer")
    return prompts, tuple(notes)


def compare_violations(
    prompts: Sequence[SafetyPrompt], violates: Sequence[bool], paper: PaperModel, notes: Sequence[str] = ()
) -> Comparison:
    """Percent of answers that violate: of all, by number of turns, by category of risk, by attack vector."""
    told = VIOLATIONS[paper.size] if paper.is_chat else None
    about = "the paper's is of 1,974 prompts of its own (1,351 of one turn), rated by people, and read from a figure"
    lines = _lines(prompts, violates, told)
    return Comparison("Violations, adversarial prompts", "violations, %", 1, paper, lines, (*notes, about))


def compare_refusals(
    prompts: Sequence[SafetyPrompt], refuses: Sequence[bool], paper: PaperModel, notes: Sequence[str] = ()
) -> Comparison:
    """Percent of harmless prompts that are refused."""
    least, most = BORDERLINE_REFUSALS
    about = (
        f"the paper's is {least:.0f}% to {most:.0f}% of 210 prompts of its own, by how much safety data was trained on"
    )
    lines = _lines(prompts, refuses, None)
    return Comparison("False refusals, borderline prompts", "refused, %", 1, paper, lines, (*notes, about))


def _lines(prompts: Sequence[SafetyPrompt], hits: Sequence[bool], paper: float | None) -> tuple[Line, ...]:
    """All of them; then by each way to tell them apart that tells any apart."""
    lines = [percent_line("all", hits, paper)]
    ways = {
        "turns": lambda prompt: "several" if _turns(prompt) > 1 else "one",
        "risk": lambda prompt: prompt.risk,
        "attack": lambda prompt: prompt.attack,
    }
    for way, kind_of in ways.items():
        kinds: dict[str, list[bool]] = {}
        for prompt, hit in zip(prompts, hits, strict=True):
            kinds.setdefault(kind_of(prompt), []).append(hit)
        if len(kinds) > 1:
            lines += [percent_line(f"{way}: {kind or 'not told'}", own) for kind, own in sorted(kinds.items())]
    return tuple(lines)


def _turns(prompt: SafetyPrompt) -> int:
    return sum(message.role == "user" for message in prompt.dialogue)


def _tags(row: dict[str, Any]) -> tuple[str, str]:
    values = [row.get(name) or "" for name in ("risk", "attack")]
    for name, value in zip(("risk", "attack"), values, strict=True):
        if not isinstance(value, str):
            raise BadDialogue("no tag", f"{name} is {type(value).__name__}, expected text")
    return values[0].strip(), values[1].strip()
