"""Scored samples (paper 3.2.3): a row for each prompt, as a run of rejection sampling keeps them and later ones read them.

    {"prompt": [messages], "samples": [a sample ...], "earlier": [samples of earlier runs, scored anew ...]}

A sample has temperature, sample (its number), text, ended ("whole", "too long" or "empty") and score: null where there is
nothing to judge, or where it cannot be judged. One of an earlier run has that run's folder as `run`.

A row of safety context distillation (4.2.4) has no earlier samples, but the prompt's risk category and `original`, the answer
without a preprompt; the others have kind and preprompt instead of a temperature.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.chat import BadDialogue, Dialogue, Message, Template, check_dialogue

SAMPLES = "samples.jsonl"


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run.

    Raises:
      UserError: it has none that can be read.
    """
    path = Path(folder) / SAMPLES
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected the folder of a finished llama-jax reject or distill"
        ) from error


def read_pool(folders: Sequence[str], template: Template) -> dict[Dialogue, list[dict[str, Any]]]:
    """The samples of earlier runs by prompt, in the order of the folders, each with the folder that it is from.

    Raises:
      UserError: a folder has no samples, or a prompt cannot be encoded.
    """
    pool: dict[Dialogue, list[dict[str, Any]]] = {}
    for folder in folders:
        for number, row in enumerate(read_samples(folder)):
            try:
                prompt = tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])
                check_dialogue(prompt, template, last="user")
                named = [{"run": folder, **one} for one in row["samples"]]
            except (BadDialogue, KeyError, TypeError) as error:
                raise UserError(
                    f"{Path(folder) / SAMPLES}:{number + 1} is no row of samples ({error}); expected those of a run of "
                    "llama-jax reject with the same chat format"
                ) from error
            if named:
                pool.setdefault(prompt, []).extend(named)
    return pool


def is_scored(sample: dict[str, Any]) -> bool:
    """Whether a sample may be kept: it says something, and could be judged."""
    return sample["score"] is not None


def best_sample(row: dict[str, Any]) -> dict[str, Any] | None:
    """The sample of a row with the highest score, of equal ones the first: this run's before those of earlier ones, by
    temperature and number. None if no sample has a score.
    """
    return max(
        filter(is_scored, (*row["samples"], *row.get("earlier", ()))), key=lambda one: one["score"], default=None
    )


def as_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON; raises ValueError for a number that JSON has not."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
