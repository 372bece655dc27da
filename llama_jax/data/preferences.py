"""Preferences (paper 3.2.1, Table 6): two answers to one prompt, which of them is better, by how much, and how safe both are.

Sources are those of dialogues (`open_rows`); rows hold pairs in one of the shapes below, among them those of the public
data sets that the paper mixes in. A row that is no pair is bad: counted, named by its place, and too many are an error. A
good row that nothing should be learned from is excluded and counted, however many there are.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from llama_jax.data.dialogues import Rows, Skipped, checked_messages, read_messages, read_transcript
from llama_jax.errors import UserError
from llama_jax.text.chat import BadDialogue, Dialogue, Message, Template, check_dialogue, encode_dialogue
from llama_jax.text.tokenizer import Tokenizer

_LOOKED_AT = 20  # rows that decide which shape a source has


class Strength(IntEnum):
    """By how much the chosen answer is better, on the paper's scale of four."""

    NEGLIGIBLY = 0
    SLIGHTLY = 1
    BETTER = 2
    SIGNIFICANTLY = 3


@dataclass(frozen=True)
class Preference:
    """A prompt, which ends with a question, and two answers to it."""

    prompt: Dialogue
    chosen: str
    rejected: str
    strength: Strength | None = None
    """None where the source does not say."""
    chosen_safe: bool | None = None
    """Whether the chosen answer is safe; None where the source does not say."""
    rejected_safe: bool | None = None

    @property
    def dialogues(self) -> tuple[Dialogue, Dialogue]:
        """The prompt with the chosen answer, and with the rejected one."""
        chosen, rejected = ((*self.prompt, Message("assistant", text)) for text in (self.chosen, self.rejected))
        return chosen, rejected


class Excluded(Exception):
    """A pair that is whole, but that nothing should be learned from; `args[0]` is the reason in a few words."""


@dataclass(frozen=True)
class PairShape:
    """One way in which rows hold pairs."""

    name: str
    description: str
    """The fields, for people."""
    fits: Callable[[dict], bool]
    """Whether a row has the fields."""
    read: Callable[[dict], tuple[list[Message], list[Message]]]
    """Both dialogues of a row that fits, the better one first; raises BadDialogue or Excluded."""


def pair_shape_named(name: str) -> PairShape | None:
    """The shape of that name; None for "auto". Raises UserError for another name."""
    if name == "auto":
        return None
    for shape in PAIR_SHAPES:
        if shape.name == name:
            return shape
    raise UserError(f"--data.shape {name} is none of auto, {', '.join(shape.name for shape in PAIR_SHAPES)}.")


def detect_pair_shape(rows: Rows, spec: str) -> PairShape:
    """The shape that fits most of the first readable rows. Raises UserError if none fits any."""
    votes: Counter[PairShape] = Counter()
    found = "it has no rows"
    looked_at = 0
    for index in range(min(len(rows), 50 * _LOOKED_AT)):
        try:
            row = rows[index]
        except BadDialogue as error:
            found = f"{rows.place(index)}: {error}" if not looked_at else found
            continue
        votes.update([shape for shape in PAIR_SHAPES if shape.fits(row)][:1])
        if not looked_at:
            found = f"its first row has the fields {_fields(row)}"
        looked_at += 1
        if looked_at == _LOOKED_AT:
            break
    if votes:
        return votes.most_common(1)[0][0]
    known = "; ".join(f"{shape.name}: {shape.description}" for shape in PAIR_SHAPES)
    raise UserError(f"{spec} holds no preferences of a known shape: {found}. Expected one of {known}.")


def read_preferences(
    rows: Rows, shape: PairShape, template: Template, skipped: Skipped, excluded: Counter[str]
) -> Iterator[Preference]:
    """Gives the preferences of rows that can be encoded with `template`, in order; counts bad rows in `skipped`, and
    pairs that are left out on purpose in `excluded`.
    """
    for index in range(len(rows)):
        skipped.rows += 1
        try:
            preference = _read_row(rows[index], shape)
            for dialogue in preference.dialogues:
                check_dialogue(dialogue, template, last="assistant")
        except BadDialogue as error:
            skipped.add(error, lambda index=index: rows.place(index))
        except Excluded as reason:
            excluded[reason.args[0]] += 1
        else:
            yield preference


class Judged(NamedTuple):
    """A dialogue as a reward model reads it."""

    ids: list[int]
    answer: int
    """Tokens of the last answer, with the id that ends it."""
    questions: int
    """Tokens of all questions, with what the format puts around them."""
    turns: int
    """How many questions that are."""


class EncodedPair(NamedTuple):
    """Both dialogues of a pair as ids, the tokens of their last answers, and what they share."""

    chosen: list[int]
    rejected: list[int]
    answers: tuple[int, int]
    questions: int
    turns: int
    dropped: int
    """Turns that were taken away."""


def encode_pair(tokenizer: Tokenizer, preference: Preference, template: Template, longest: int) -> EncodedPair | None:
    """Encodes both dialogues of a pair, at most `longest` tokens each; None if that cannot be.

    Where a dialogue is too long, the oldest question and answer of both go first, then the next; the system message
    stays. What is judged, the answers and the question before them, is never cut.
    """
    pair = preference.dialogues
    dropped = max(encode_judged(tokenizer, dialogue, template, longest)[1] for dialogue in pair)
    both = [encode_judged(tokenizer, without_turns(dialogue, dropped), template, longest)[0] for dialogue in pair]
    if None in both:
        return None
    chosen, rejected = both
    return EncodedPair(
        chosen.ids, rejected.ids, (chosen.answer, rejected.answer), chosen.questions, chosen.turns, dropped
    )


def encode_judged(
    tokenizer: Tokenizer, dialogue: Dialogue, template: Template, longest: int
) -> tuple[Judged | None, int]:
    """Encodes a dialogue without as many of its oldest turns as it takes to fit, and says how many those are; None if its
    last turn alone is too long.
    """
    turns = sum(message.role == "user" for message in dialogue)
    for dropped in range(turns):
        ids, answer_mask = encode_dialogue(tokenizer, without_turns(dialogue, dropped), template)
        if len(ids) <= longest:
            return Judged(ids, answer_mask[::-1].index(False), answer_mask.count(False), turns - dropped), dropped
    return None, turns - 1


def without_turns(dialogue: Dialogue, turns: int) -> Dialogue:
    """The dialogue without its first so many questions and their answers; a system message stays."""
    first = int(dialogue[0].role == "system")
    return (*dialogue[:first], *dialogue[first + 2 * turns :])


def prompt_hash(preference: Preference) -> int:
    """A number of 64 bits that depends on the prompt alone, so that all pairs of a prompt stay together."""
    return int.from_bytes(hashlib.sha256(json.dumps(preference.prompt).encode()).digest()[:8], "big")


def _read_row(row: dict, shape: PairShape) -> Preference:
    if not shape.fits(row):
        raise BadDialogue(
            "another shape", f"the row has the fields {_fields(row)}, expected {shape.name}: {shape.description}"
        )
    chosen, rejected = map(checked_messages, shape.read(row))
    if not chosen or not rejected or chosen[:-1] != rejected[:-1] or chosen[-1].role != rejected[-1].role:
        raise BadDialogue("different prompts", "the two dialogues differ in more than their last answer")
    chosen_safe, rejected_safe = _safety(row)
    if rejected_safe and chosen_safe is False:
        # The paper's: safer answers are believed to be better ones as well.
        raise Excluded("chosen unsafe, other safe")
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise Excluded("equal answers")
    return Preference(chosen[:-1], chosen[-1].content, rejected[-1].content, _strength(row), chosen_safe, rejected_safe)


def _fields(row: dict) -> str:
    return ", ".join(sorted(map(str, row))) or "(none)"


# The first word of how a source may put it.
_STRENGTHS = {
    "significantly": Strength.SIGNIFICANTLY,
    "better": Strength.BETTER,
    "slightly": Strength.SLIGHTLY,
    "negligibly": Strength.NEGLIGIBLY,
    "unsure": Strength.NEGLIGIBLY,
}


def _strength(row: dict) -> Strength | None:
    value = row.get("strength", row.get("rating"))
    if value is None:
        return None
    if isinstance(value, str) and value.split() and (word := value.split()[0].strip(",/").lower()) in _STRENGTHS:
        return _STRENGTHS[word]
    if isinstance(value, int | float) and value in tuple(Strength) and not isinstance(value, bool):
        return Strength(int(value))
    raise BadDialogue(
        "unknown strength", f"the strength is {value!r}, expected one of {', '.join(_STRENGTHS)}, or 3 to 0"
    )


_SAFETY = {
    "chosen safe": (True, False),
    "both safe": (True, True),
    "both unsafe": (False, False),
    "rejected safe": (False, True),
}


def _safety(row: dict) -> tuple[bool | None, bool | None]:
    value = row.get("safety")
    if value is None:
        given = (row.get("chosen_safe"), row.get("rejected_safe"))
        if all(one is None or isinstance(one, bool) for one in given):
            return given
        raise BadDialogue("unknown safety", f"chosen_safe and rejected_safe are {given}, expected true or false")
    if isinstance(value, str) and (label := value.replace("_", " ").strip().lower()) in _SAFETY:
        return _SAFETY[label]
    raise BadDialogue("unknown safety", f"the safety label is {value!r}, expected one of {', '.join(_SAFETY)}")


Pair = tuple[list[Message], list[Message]]


def _read_transcripts(row: dict) -> Pair:
    return read_transcript({"text": row["chosen"]}), read_transcript({"text": row["rejected"]})


def _is_turns(value: Any) -> bool:
    # A library may give a column for each field instead of a list of turns.
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(turn, dict) for turn in value))


def _read_answers(row: dict) -> Pair:
    """Each side the whole dialogue, or what follows the prompt alone."""
    sides = [read_messages({"messages": row[name]}) for name in ("chosen", "rejected")]
    if all(len(side) == 1 for side in sides) and (prompt := _prompt(row)):
        return [*prompt, *sides[0]], [*prompt, *sides[1]]
    return sides[0], sides[1]


def _prompt(row: dict) -> list[Message]:
    system = [Message("system", row["system"])] if row.get("system") else []
    for name in ("prompt", "messages"):
        if _is_turns(value := row.get(name)):
            return [*system, *read_messages({"messages": value})]
        if isinstance(value, str):
            return [*system, Message("user", value)]
    return []


def _read_texts(row: dict) -> Pair:
    return _answered(_prompt(row), row["chosen"], row["rejected"])


def _answered(prompt: list[Message], chosen: Any, rejected: Any) -> Pair:
    return [*prompt, Message("assistant", chosen)], [*prompt, Message("assistant", rejected)]


def _read_stackexchange(row: dict) -> Pair:
    return _answered([Message("user", row["question"])], row["response_j"], row["response_k"])


def _read_shp(row: dict) -> Pair:
    answers = row["human_ref_A"], row["human_ref_B"]
    return _answered([Message("user", row["history"])], *(answers if row["labels"] == 1 else answers[::-1]))


def _read_webgpt(row: dict) -> Pair:
    if row["score_0"] == row["score_1"]:
        raise Excluded("no preference")
    question = row["question"]["full_text"] if isinstance(row["question"], dict) else row["question"]
    answers = row["answer_0"], row["answer_1"]
    return _answered([Message("user", question)], *(answers if row["score_0"] > row["score_1"] else answers[::-1]))


def _read_summaries(row: dict) -> Pair:
    """Our choice: the request, of which the source has none, stands behind the text."""
    given = row["summaries"]
    texts = given.get("text") if isinstance(given, dict) else [summary.get("text") for summary in given]
    if not isinstance(texts, list) or len(texts) != 2 or row["choice"] not in (0, 1):
        raise BadDialogue("no two summaries", "expected two summaries and a choice of 0 or 1")
    text = row["info"].get("post") or row["info"].get("article")
    if not isinstance(text, str):
        raise BadDialogue("not text", "info has neither a post nor an article")
    return _answered([Message("user", f"{text}\n\nSummarize this.")], texts[row["choice"]], texts[1 - row["choice"]])


def _has(*names: str) -> Callable[[dict], bool]:
    return lambda row: all(name in row for name in names)


def _both(row: dict, kind: Callable[[Any], bool]) -> bool:
    return all(name in row and kind(row[name]) for name in ("chosen", "rejected"))


PAIR_SHAPES = (
    PairShape(
        "transcripts",
        "`chosen` and `rejected`, whole dialogues whose turns begin with Human: and Assistant: after an empty line",
        lambda row: _both(row, lambda text: isinstance(text, str) and bool(read_transcript({"text": text}))),
        _read_transcripts,
    ),
    PairShape(
        "dialogues",
        "`chosen` and `rejected`, lists of turns: whole dialogues, or one answer each behind `prompt` or `messages`",
        lambda row: _both(row, _is_turns),
        _read_answers,
    ),
    PairShape(
        "answers",
        "`prompt` (or `messages`), `chosen` and `rejected`, texts; with any of them strength (or rating) and safety",
        lambda row: _both(row, lambda text: isinstance(text, str)) and bool({"prompt", "messages"} & row.keys()),
        _read_texts,
    ),
    PairShape(
        "stackexchange",
        "`question`, `response_j` (better) and `response_k`, as paired StackExchange",
        _has("question", "response_j", "response_k"),
        _read_stackexchange,
    ),
    PairShape(
        "shp",
        "`history`, `human_ref_A`, `human_ref_B` and `labels` (1: A), as Stanford's SHP",
        _has("history", "human_ref_A", "human_ref_B", "labels"),
        _read_shp,
    ),
    PairShape(
        "webgpt",
        "`question`, `answer_0`, `answer_1`, `score_0` and `score_1`, as OpenAI's WebGPT",
        _has("question", "answer_0", "answer_1", "score_0", "score_1"),
        _read_webgpt,
    ),
    PairShape(
        "summaries",
        "`info`, `summaries` and `choice`, as OpenAI's comparisons of summaries",
        lambda row: (
            "choice" in row and isinstance(row.get("info"), dict) and isinstance(row.get("summaries"), list | dict)
        ),
        _read_summaries,
    ),
)
