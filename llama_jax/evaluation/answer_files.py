"""Several models' answers to the same prompts, from one file for each model: what is put before raters and judges.

A row has `prompt` (a text, with `system` if there is one, or a list of turns) or `dialogue` (a list of turns), `answer`, and, where
they are known, `id` and `category`. Prompts of two files are the same where their ids are, or without an id their texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from llama_jax.data.dialogues import checked_messages, open_rows, read_messages
from llama_jax.errors import UserError
from llama_jax.text.chat import BadDialogue, Dialogue, Message


@dataclass(frozen=True)
class Prompt:
    """What was answered."""

    id: str
    """As in the files, or else the row of the first file."""
    dialogue: Dialogue
    """Ends with the user's message."""
    category: str = ""

    @property
    def turns(self) -> int:
        """How many messages of the user it has."""
        return sum(message.role == "user" for message in self.dialogue)


@dataclass(frozen=True)
class Answers:
    """Prompts and what each model answered to them."""

    prompts: tuple[Prompt, ...]
    by_model: dict[str, tuple[str, ...]]
    """In the order of the prompts."""

    def pairs(self) -> tuple[list[tuple[int, str, str]], list[tuple[int, str, str]]]:
        """All pairs of answers to a prompt: its number and two models, in the order of their files.

        Those that differ come first, and apart from them those that are equal but for white space around them, which nobody
        needs to compare.
        """
        different, equal = [], []
        for first, second in combinations(self.by_model, 2):
            for number, texts in enumerate(zip(self.by_model[first], self.by_model[second], strict=True)):
                one, other = map(str.strip, texts)
                (equal if one == other else different).append((number, first, second))
        return different, equal


def read_answers(paths: Sequence[str]) -> Answers:
    """Reads the files; a model is called as its file is, without folder and ending.

    Raises:
      UserError: a row is no answer to a prompt, a prompt occurs twice, two files have the same name, or not the same prompts.
    """
    files = {Path(path).name.split(".")[0]: path for path in paths}
    if len(files) < len(paths):
        raise UserError(f"two of {', '.join(paths)} have the same name, and so would their models; rename one")
    read = {model: _read(path) for model, path in files.items()}
    (first, known), *others = read.items()
    for model, rows in others:
        for name, missing in ((files[model], known.keys() - rows.keys()), (files[first], rows.keys() - known.keys())):
            if missing:
                prompt = next(rows_of[key] for rows_of in (known, rows) for key in rows_of if key in missing)[0]
                raise UserError(
                    f"{name} has no answer to {len(missing)} of the prompts that {files[first]} or {files[model]} has, "
                    f"such as {prompt.id!r} ({prompt.dialogue[-1].content[:60]!r}); let every model answer all of them"
                )
        for key, (prompt, _) in rows.items():
            if prompt.dialogue != known[key][0].dialogue:
                raise UserError(
                    f"the prompt with id {prompt.id!r} is not the same in {files[first]} and {files[model]}"
                )
    prompts = tuple(prompt for prompt, _ in known.values())
    return Answers(prompts, {model: tuple(rows[key][1] for key in known) for model, rows in read.items()})


def _read(path: str) -> dict[str | Dialogue, tuple[Prompt, str]]:
    """The prompts and answers of a file, by what says that a prompt is the same."""
    rows, found = open_rows(path), {}
    for index in range(len(rows)):
        try:
            prompt, answer, key = _read_row(rows[index], index)
        except BadDialogue as error:
            raise UserError(
                f"{rows.place(index)}: {error}; expected `prompt` (or `dialogue`, a list of turns with role and content) "
                "and `answer`"
            ) from None
        if key in found:
            raise UserError(f"{rows.place(index)}: the prompt {found[key][0].id!r} again; give each once")
        found[key] = prompt, answer
    if len({prompt.id for prompt, _ in found.values()}) < len(found):
        raise UserError(
            f"{path}: some rows have an id that another one, without an id, has as its place; give all rows ids"
        )
    return found


def _read_row(row: dict, index: int) -> tuple[Prompt, str, str | Dialogue]:
    answer = row.get("answer")
    if not isinstance(answer, str):
        raise BadDialogue("no answer", f"the answer is {type(answer).__name__}, expected text")
    prompt = read_prompt(row, index)
    return prompt, answer, prompt.id if "id" in row else prompt.dialogue


def read_prompt(row: dict, index: int) -> Prompt:
    """The prompt of a row.

    Args:
      row: with `prompt` or `dialogue`.
      index: of the row, for one without an id.

    Raises:
      BadDialogue: it holds none that ends with the user's turn.
    """
    turns = row.get("dialogue", row.get("prompt"))
    if isinstance(turns, str):
        messages = [Message("system", row.get("system") or ""), Message("user", turns)]
    elif isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        messages = read_messages({"messages": turns})
    else:
        raise BadDialogue("no prompt", f"the prompt is {type(turns).__name__}, expected text or a list of turns")
    dialogue = checked_messages(messages)
    if dialogue[-1].role != "user":
        raise BadDialogue("wrong roles", "the prompt ends with the assistant's turn, and an answer follows the user's")
    return Prompt(str(row.get("id", index + 1)), dialogue, str(row.get("category") or ""))
