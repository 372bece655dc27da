"""Dialogues of other people's files (paper 3.1): the common shapes of rows, and what becomes of bad ones.

jsonl:GLOB, or the bare name of a .jsonl file   plain, .gz or .zst
hf:NAME[@CONFIG][:SPLIT]  and  tfds:NAME[:VERSION][:SPLIT]   as for pretraining

A row that is no dialogue is left out, counted under a reason and named by file and line; the caller decides how many
of them are too many.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from llama_jax.data.files import Lines, whole_characters
from llama_jax.data.sources import open_records
from llama_jax.errors import UserError
from llama_jax.text.chat import BadDialogue, Dialogue, Message, Template, check_dialogue

LONGEST_MESSAGE = 1_000_000  # characters; about twice what a context of 131072 tokens holds
_LOOKED_AT = 20  # rows that decide which shape a source has
_SHOWN = 5  # bad rows that a report names

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Shape:
    """One way in which rows hold dialogues."""

    name: str
    description: str
    """The fields, for people."""
    fits: Callable[[dict], bool]
    """Whether a row has the fields."""
    read: Callable[[dict], list[Message]]
    """The messages of a row that fits; raises BadDialogue."""


@dataclass
class Skipped:
    """The rows that were left out, counted by reason."""

    rows: int = 0
    """Rows looked at, good ones too."""
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    """What the first few were, each with its place."""

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def add(self, error: BadDialogue, place: Callable[[], str]) -> None:
        """Counts a row; `place` is asked only while rows are still named one by one."""
        self.reasons[error.reason] += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{place()}: {error}")

    def check(self, limit: float) -> None:
        """Raises UserError with the first of them if more than the share `limit` of all rows was left out."""
        if self.count > limit * self.rows:
            listed = "\n  ".join(self.first)
            raise UserError(
                f"{self}; at most {limit:.2%} may be. The first:\n  {listed}\n"
                "Repair these rows, name the shape of the rows (--data.shape), or raise --data.bad-rows."
            )

    def __str__(self) -> str:
        if not self.count:
            return f"all {self.rows} rows are good"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.count} of {self.rows} rows ({self.count / self.rows:.2%}) left out: {reasons}"


class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """Gives a row's fields; raises BadDialogue if it cannot be read."""
        ...

    def place(self, index: int) -> str:
        """Where the row stands, for people."""
        ...


def open_rows(spec: str) -> Rows:
    """Opens a source of dialogues. Raises UserError for a name that is none, or if there is nothing to read."""
    if re.search(r"\.jsonl?(\.gz|\.zst)?$", spec) and (":" not in spec or Path(spec).exists()):
        return _JsonRows(spec)
    scheme, _, rest = spec.partition(":")
    if scheme == "jsonl" and rest:
        return _JsonRows(rest)
    if scheme in ("hf", "tfds") and rest:
        return _LibraryRows(spec)
    raise UserError(
        f"{spec!r} is no source of dialogues. Expected a .jsonl file (.gz and .zst too), jsonl:GLOB, "
        "hf:NAME[@CONFIG][:SPLIT] or tfds:NAME[:SPLIT]."
    )


def shape_named(name: str) -> Shape | None:
    """The shape of that name; None for "auto". Raises UserError for another name."""
    if name == "auto":
        return None
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise UserError(f"--data.shape {name} is none of auto, {', '.join(shape.name for shape in SHAPES)}.")


def detect_shape(rows: Rows, spec: str) -> Shape:
    """The shape that fits most of the first readable rows. Raises UserError if none fits any."""
    votes: Counter[Shape] = Counter()
    fields: list[str] = []
    problem = None
    looked_at = 0
    for index in range(min(len(rows), 50 * _LOOKED_AT)):
        try:
            row = rows[index]
        except BadDialogue as error:
            problem = problem or f"{rows.place(index)}: {error}"
            continue
        votes.update([shape for shape in SHAPES if shape.fits(row)][:1])
        fields = fields or sorted(map(str, row))
        looked_at += 1
        if looked_at == _LOOKED_AT:
            break
    if votes:
        return votes.most_common(1)[0][0]
    found = f"its first row has the fields {', '.join(fields) or '(none)'}" if looked_at else problem
    known = "; ".join(f"{shape.name}: {shape.description}" for shape in SHAPES)
    raise UserError(f"{spec} holds no dialogues of a known shape: {found}. Expected one of {known}.")


def read_dialogues(
    rows: Rows, shape: Shape, template: Template, skipped: Skipped, *, last: Literal["assistant", "user"] = "assistant"
) -> Iterator[Dialogue]:
    """Gives the dialogues of rows that can be encoded with `template`, in order; counts the rest in `skipped`.

    With the user `last` they end with a question: an answer that stands behind it is taken away.
    """
    for dialogue, _ in read_tagged(rows, shape, template, skipped, lambda row: None, last=last):
        yield dialogue


def read_tagged(
    rows: Rows,
    shape: Shape,
    template: Template,
    skipped: Skipped,
    tag: Callable[[dict], Tag],
    *,
    last: Literal["assistant", "user"],
) -> Iterator[tuple[Dialogue, Tag]]:
    """As `read_dialogues`, each with what `tag` reads in its row; a row of which that raises BadDialogue is left out too."""
    for index in range(len(rows)):
        skipped.rows += 1
        try:
            row = rows[index]
            dialogue = _read_row(row, shape)
            if last == "user" and dialogue and dialogue[-1].role == "assistant":
                dialogue = dialogue[:-1]
            check_dialogue(dialogue, template, last=last)
            tagged = dialogue, tag(row)
        except BadDialogue as error:
            skipped.add(error, lambda index=index: rows.place(index))
        else:
            yield tagged


class _JsonRows:
    """Rows of JSON-lines files."""

    def __init__(self, pattern: str):
        self._lines = Lines(pattern)
        self.place = self._lines.place

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        try:
            row = json.loads(self._lines[index].decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise BadDialogue("not UTF-8", f"byte 0x{byte:02x} at {error.start} of the line is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise BadDialogue("not JSON", f"the line is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise BadDialogue(
                "not an object",
                f"the line is a JSON {type(row).__name__}, expected an object a line (a file that is one list: "
                "jq -c '.[]' FILE > FILE.jsonl)",
            )
        return row


class _LibraryRows:
    """Rows of a tfds: or hf: source, with text for bytes and lists for arrays."""

    def __init__(self, spec: str):
        self._spec, self._records = spec, open_records(spec)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return _plain(self._records[index])

    def place(self, index: int) -> str:
        return f"{self._spec}, record {index}"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadDialogue("not UTF-8", f"byte {error.start} of a field is not UTF-8") from None
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _read_row(row: dict, shape: Shape) -> Dialogue:
    if not shape.fits(row):
        fields = ", ".join(sorted(map(str, row))) or "(none)"
        raise BadDialogue(
            "another shape", f"the row has the fields {fields}, expected {shape.name}: {shape.description}"
        )
    return checked_messages(shape.read(row))


def checked_messages(messages: list[Message]) -> Dialogue:
    """The messages as a dialogue, without an empty system message; raises BadDialogue for one that is no text, too long
    or empty.
    """
    messages = [Message(role, _text(content)) for role, content in messages]
    for number, (role, content) in enumerate(messages):
        if len(content) > LONGEST_MESSAGE:
            raise BadDialogue(
                "message too long",
                f"message {number + 1} has {len(content):,} characters, expected at most {LONGEST_MESSAGE:,}",
            )
        if role != "system" and not content.strip():
            kind = "answer" if role == "assistant" else "question"
            raise BadDialogue(f"empty {kind}", f"message {number + 1} ({role}) is empty")
    # Our choice: an empty system message says nothing, so it is none.
    return tuple(message for message in messages if message.role != "system" or message.content.strip())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadDialogue("not text", f"a message is {type(value).__name__}, expected text")
    return whole_characters(value)


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _turns(row: dict) -> list[dict] | None:
    """The turns of a row of messages; a library may give a column for each field instead of a list of turns."""
    for name in ("messages", "conversations", "chosen"):
        turns = row.get(name)
        if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
            length = min(map(len, turns.values()))
            turns = [{key: column[i] for key, column in turns.items()} for i in range(length)]
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return turns
    return None


def read_messages(row: dict) -> list[Message]:
    """The turns of a row's `messages`, `conversations` or `chosen`; raises BadDialogue for an unknown role."""
    messages = []
    for turn in _turns(row) or []:
        name = turn.get("role", turn.get("from"))
        if not isinstance(name, str) or name not in _ROLES:
            raise BadDialogue("wrong roles", f"the role {name!r} is none of {', '.join(_ROLES)}")
        messages.append(Message(_ROLES[name], turn.get("content", turn.get("value"))))
    return messages


def _first(row: dict, *names: str) -> str | None:
    return next((name for name in names if name in row), None)


def _read_question(row: dict) -> list[Message]:
    system = [Message("system", row["system"])] if row.get("system") else []
    return [*system, Message("user", row["prompt"])]


def _read_prompt(row: dict) -> list[Message]:
    return [*_read_question(row), Message("assistant", row[_first(row, "response", "completion")])]


def _read_instruction(row: dict) -> list[Message]:
    """Our choice: what the instruction is about follows it after an empty line, without Alpaca's headings."""
    about = _first(row, "input", "context")
    instruction = _text(row["instruction"])
    given = _text(row[about]) if about and row[about] else ""
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return [Message("user", question), Message("assistant", row[_first(row, "output", "response")])]


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _transcript(row: dict) -> str | None:
    for name in ("chosen", "text"):
        text = row.get(name)
        if isinstance(text, str) and _TURN.match(text := "\n\n" + text.lstrip("\n")):
            return text
    return None


def read_transcript(row: dict) -> list[Message]:
    """The turns of a transcript in a row's `chosen` or `text`; none if it is no transcript."""
    parts = _TURN.split(_transcript(row) or "")[1:]
    return [
        Message("user" if name == "Human" else "assistant", text.strip())
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]


SHAPES = (
    Shape(
        "messages",
        "`messages` or `conversations`, a list of turns with role and content, or from and value",
        lambda row: _turns(row) is not None,
        read_messages,
    ),
    Shape(
        "instruction",
        "`instruction`, `output` (or `response`) and, if any, `input` (or `context`)",
        lambda row: "instruction" in row and _first(row, "output", "response") is not None,
        _read_instruction,
    ),
    Shape(
        "prompt",
        "`prompt`, `response` (or `completion`) and, if any, `system`",
        lambda row: "prompt" in row and _first(row, "response", "completion") is not None,
        _read_prompt,
    ),
    Shape(
        "transcript",
        "`chosen` (or `text`), turns that begin with Human: and Assistant: after an empty line",
        lambda row: _transcript(row) is not None,
        read_transcript,
    ),
    Shape(
        "question",
        "`prompt` alone and, if any, `system`, where a model is to answer",
        lambda row: "prompt" in row and _first(row, "response", "completion") is None,
        _read_question,
    ),
)
