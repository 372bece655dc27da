"""BOLD: the sentiment with which a model goes on about people, beliefs and professions (paper 4.1, 4.4, A.4.7).

Sentiment is VADER's, of prompt and continuation together. Our choices, where the paper is silent: prompts are continued as
text by chat models too; a subgroup's prompts count alike, whosever name they begin with; the white space at the end of a
prompt goes, as the continuation begins with its own.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.errors import UserError
from llama_jax.evaluation.comparisons import Comparison, mean_line
from llama_jax.evaluation.safety_files import Row, files_of, read_rows, read_text, text_at
from llama_jax.evaluation.safety_paper_values import BOLD, BOLD_DROPPED, BOLD_GROUPS, PaperModel


class BoldPrompt(NamedTuple):
    """The beginning of a sentence of Wikipedia."""

    group: str
    """A subgroup of one of `BOLD_GROUPS`."""
    text: str


_KNOWN = {group: domain for domain, groups in BOLD_GROUPS.items() for group in groups}


def read_bold(patterns: Sequence[str], flag: str = "--safety.bold") -> tuple[list[BoldPrompt], tuple[str, ...]]:
    """The prompts of the paper's subgroups, in the order of the files, and what was found.

    Args:
      patterns: the public files, such as race_prompt.json, {subgroup: {name: [prompts]}}; or JSON lines with `category` or
        `cat`, `name` and `prompts`.
      flag: what they were named with, for messages.

    Raises:
      UserError: a file cannot be read, names an unknown subgroup, or none has a prompt.
    """
    prompts: list[BoldPrompt] = []
    dropped: dict[str, int] = {}
    for path in files_of(patterns, flag):
        for group, texts, place in _entries(path):
            if group not in _KNOWN and group not in BOLD_DROPPED:
                near = difflib.get_close_matches(group, _KNOWN, n=3, cutoff=0)
                raise UserError(f"{place}: {group!r} is no subgroup of BOLD; near are {', '.join(near)}")
            if not isinstance(texts, list):
                raise UserError(f"{place}: prompts is {type(texts).__name__}, expected a list of texts")
            if group in BOLD_DROPPED:
                dropped[group] = dropped.get(group, 0) + len(texts)
            else:
                prompts += [BoldPrompt(group, text_at(place, "a prompt", text).rstrip()) for text in texts]
    if not prompts:
        raise UserError(f"{flag} {' '.join(patterns)}: no prompt of the paper's subgroups")
    notes = [f"{group}, which the paper leaves out, is left out: {count} prompts" for group, count in dropped.items()]
    return prompts, tuple(notes)


def compare_bold(
    prompts: Sequence[BoldPrompt],
    continuations: Sequence[str],
    sentiment: Callable[[str], float],
    paper: PaperModel,
    notes: Sequence[str] = (),
) -> tuple[Comparison, ...]:
    """Mean sentiment by subgroup: a table for each domain that has prompts.

    Args:
      prompts: as read.
      continuations: of each, as the model gave them.
      sentiment: of a text, from -1 to 1.
      paper: whose numbers stand beside.
      notes: what else must be known.
    """
    by_group: dict[str, list[float]] = {group: [] for group in _KNOWN}
    for prompt, continuation in zip(prompts, continuations, strict=True):
        by_group[prompt.group].append(sentiment(prompt.text + continuation))
    return tuple(
        Comparison(
            f"BOLD, {domain}",
            "mean sentiment, -1 to 1",
            2,
            paper,
            tuple(
                mean_line(group.replace("_", " "), by_group[group], value)
                for group, value in zip(groups, BOLD[domain].of(paper), strict=True)
            ),
            tuple(notes),
        )
        for domain, groups in BOLD_GROUPS.items()
        if any(by_group[group] for group in groups)
    )


def _entries(path: Path) -> list[tuple[str, object, str]]:
    """Subgroup, prompts and place of each entry of a file."""
    if path.suffix != ".json":
        return [(row.text("category", "cat"), _prompts(row), row.place) for row in read_rows(path)]
    try:
        domain = json.loads(read_text(path))
        return [
            (group, texts, f"{path}, {group}, {name}")
            for group, names in domain.items()
            for name, texts in names.items()
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not {{subgroup: {{name: [prompts]}}}} ({error})") from error


def _prompts(row: Row) -> object:
    if "prompts" not in row.fields:
        raise UserError(f"{row.place} has the fields {', '.join(row.fields)}; expected prompts")
    return row.fields["prompts"]
