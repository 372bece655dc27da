"""Dialogues to rows of a batch whose loss falls on the answers (paper 3.1: 4096 tokens a row, two epochs).

The paper puts questions and answers one after the other until a row is full. Our choice: an example is never split
over two rows, where its answer would lose its question; instead each goes into the fullest row that has room for it.
Every example is a segment of its own, with positions from 0 (the paper does not say whether examples see each other).
All examples are tokenised at the start and kept (3 bytes a token): so a run knows the length of an epoch, and every
process can plan the same rows without reading them.
"""

import array
import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.data.dialogues import Shape, Skipped, detect_shape, open_rows, read_dialogues, shape_named
from llama_jax.data.drawing import check_sources, check_weights, random_order
from llama_jax.data.packing import Batch
from llama_jax.data.pipeline import own_rows
from llama_jax.errors import UserError
from llama_jax.text.chat import Dialogue, Encoded, Template, encode_dialogue, with_system
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class DialogueConfig:
    """What dialogues to train on and what to keep for evaluation."""

    sources: tuple[str, ...] = ()
    """Where dialogues come from: a .jsonl file, jsonl:GLOB, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    weights: tuple[float, ...] = ()
    """Each source's share of the tokens, in any unit; empty: every dialogue once an epoch."""
    shape: Literal["auto", "messages", "instruction", "prompt", "transcript"] = "auto"
    """How rows hold dialogues; auto: what fits most of a source's first rows."""
    system_prompt: str = ""
    """The system message of dialogues that have none; empty for none."""
    answers: Literal["all", "last"] = "all"
    """Which answers of a dialogue are trained: all, or the last alone, as for ghost attention (paper 3.3)."""
    held_out: float = 0.01
    """Fraction of the dialogues kept for evaluation, chosen by their content alone; 0 for none."""
    eval_dialogues: int = 1000
    """Evaluate on at most so many held-out dialogues, evenly spaced; 0 for all."""
    bad_rows: float = 0.01
    """Share of a source's rows that may be left out because they are no dialogues; more is an error."""


@dataclass(frozen=True)
class Examples:
    """Encoded dialogues by number, in flat arrays, those of one source after those of another."""

    ids: np.ndarray
    """All tokens, uint16 where the vocabulary allows, else int32."""
    answer_mask: np.ndarray
    """bool, which of them are trained."""
    starts: np.ndarray
    """int64, the number of each example's first token, and at the end the number of tokens."""
    sizes: tuple[int, ...]
    """Examples of each source."""

    @classmethod
    def of(cls, sources: Iterable[Iterable[Encoded]], vocab_size: int) -> "Examples":
        """Keeps the examples of sources."""
        growing = _Growing(vocab_size)
        for source in sources:
            growing.begin_source()
            for encoded in source:
                growing.add(encoded)
        return growing.examples()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives an example's ids and its answer mask."""
        span = slice(self.starts[number], self.starts[number + 1])
        return self.ids[span], self.answer_mask[span]

    @property
    def places(self) -> np.ndarray:
        """How many places of a row each example takes, int64: one less than its tokens, as the last is only a target."""
        return np.diff(self.starts) - 1


class _Growing:
    """Examples while they are read: lists of Python's integers would take ten times the memory."""

    def __init__(self, vocab_size: int):
        self._ids = array.array("H" if vocab_size <= 1 << 16 else "i")
        self._answer_mask = bytearray()
        self._starts = array.array("q", [0])
        self._sizes: list[int] = []

    def begin_source(self) -> None:
        self._sizes.append(0)

    def add(self, encoded: Encoded) -> None:
        self._ids.extend(encoded.ids)
        self._answer_mask.extend(encoded.answer_mask)
        self._starts.append(len(self._ids))
        self._sizes[-1] += 1

    def examples(self) -> Examples:
        ids = np.frombuffer(self._ids, np.uint16 if self._ids.typecode == "H" else np.int32)
        starts = np.frombuffer(self._starts, np.int64)
        return Examples(ids, np.frombuffer(self._answer_mask, bool), starts, tuple(self._sizes))


class Loaded(NamedTuple):
    """The examples of all sources and what did not become one."""

    train: Examples
    held_out: Examples
    shapes: tuple[Shape, ...]
    """How the rows of each source hold dialogues."""
    skipped: tuple[Skipped, ...]
    """Bad rows, for each source."""
    shortened: int
    """Dialogues that lost their last turns, being longer than a row."""
    too_long: int
    """Dialogues left out because not even their first question and answer fit a row."""

    def __str__(self) -> str:
        lines = [
            f"{shape.name} ({shape.description}): {skipped}"
            for shape, skipped in zip(self.shapes, self.skipped, strict=True)
        ]
        if self.shortened or self.too_long:
            lines.append(f"{self.shortened} dialogues cut at a turn to fit a row, {self.too_long} left out as too long")
        lines.append(f"{len(self.train)} examples to train on, {len(self.held_out)} held out")
        return "\n".join(lines)


def load_examples(config: DialogueConfig, tokenizer: Tokenizer, template: Template, length: int) -> Loaded:
    """Reads and encodes all dialogues of the sources for rows of `length` tokens.

    Raises UserError for bad sources, too many bad rows, or if nothing is left to train on.
    """
    _check(config)
    train, held_out = _Growing(tokenizer.vocab_size), _Growing(tokenizer.vocab_size)
    named = shape_named(config.shape)
    shapes: list[Shape] = []
    all_skipped: list[Skipped] = []
    shortened = too_long = 0
    for spec in config.sources:
        rows = open_rows(spec)
        shapes.append(shape := named or detect_shape(rows, spec))
        all_skipped.append(skipped := Skipped())
        train.begin_source()
        held_out.begin_source()
        for dialogue in read_dialogues(rows, shape, template, skipped):
            whole = with_system(dialogue, config.system_prompt)
            encoded, kept = encode_to_fit(tokenizer, whole, template, length + 1, config.answers)
            shortened += 0 < kept < len(whole)
            too_long += kept == 0
            if kept:
                (held_out if content_hash(dialogue) < config.held_out * 2**64 else train).add(encoded)
        skipped.check(config.bad_rows)
    loaded = Loaded(train.examples(), held_out.examples(), tuple(shapes), tuple(all_skipped), shortened, too_long)
    if not len(loaded.train):
        raise UserError(f"No dialogue is left to train on:\n{loaded}\nUse longer rows or more data.")
    return loaded


def encode_to_fit(
    tokenizer: Tokenizer,
    dialogue: Dialogue,
    template: Template,
    longest: int,
    answers: Literal["all", "last"] = "all",
) -> tuple[Encoded, int]:
    """Encodes as many turns of a dialogue as make at most `longest` tokens, and says how many messages those are.

    Our choice: the first turns are kept, as the later ones depend on them and the system message stands there; the cut
    is behind an answer, so nothing trained is half. Where not even the first answer fits, nothing is kept. Of the
    answers, all are trained, or the last of those that are kept.
    """
    encoded = encode_dialogue(tokenizer, dialogue, template, answers)
    if len(encoded.ids) <= longest:
        return encoded, len(dialogue)
    first = 1 + (dialogue[0].role == "system")  # the number of the first answer
    ends = range(first + 1, len(dialogue), 2)

    def tokens(end: int) -> int:
        return len(encode_dialogue(tokenizer, dialogue[:end], template).ids)

    fitting = bisect.bisect_right(ends, longest, key=tokens)
    if not fitting:
        return Encoded([], []), 0
    return encode_dialogue(tokenizer, dialogue[: ends[fitting - 1]], template, answers), ends[fitting - 1]


def content_hash(dialogue: Dialogue) -> int:
    """A number of 64 bits that depends on the messages alone: not on their row, file, or what stands around them."""
    content = json.dumps(dialogue).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


class RowCursor(NamedTuple):
    """A place in the stream of rows: how many are used."""

    row: int = 0


@dataclass(frozen=True)
class Packing:
    """How examples are drawn and put into rows: a function of the examples and the seed, epoch by epoch."""

    examples: Examples
    length: int
    """Tokens in a row."""
    seed: int = 0
    weights: tuple[float, ...] = ()
    """Each source's share of the tokens; empty: every example once an epoch."""

    def __post_init__(self):
        """Raises UserError for weights that do not suit the sources."""
        check_weights(self.weights, self.examples.sizes, "examples")

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, each the numbers of its examples, in random order.

        With weights, an epoch has as many examples as the sources together, and a source that runs out begins again,
        in a new order, without regard to where the others are.
        """
        drawn = np.concatenate([self._draw(source, epoch) for source in range(len(self.examples.sizes))])
        drawn = drawn[random_order(len(drawn), self.seed, 1, epoch)]
        rows = best_fit(self.examples.places[drawn].tolist(), self.length)
        # The last rows to be opened hold what came late and was small: shuffled, so that no batch is all of those.
        return [drawn[rows[i]].tolist() for i in random_order(len(rows), self.seed, 2, epoch)]

    def count(self, epochs: int) -> int:
        """The rows of so many epochs."""
        return sum(len(self.epoch(epoch)) for epoch in range(epochs))

    def report(self) -> dict[str, float]:
        """What the first epoch takes: rows, examples, tokens that are trained, and the share of places that hold one."""
        rows = self.epoch(0)
        numbers = list(itertools.chain(*rows))
        trained = np.add.reduceat(self.examples.answer_mask.astype(np.int64), self.examples.starts[:-1])
        return {
            "rows": len(rows),
            "examples": len(numbers),
            "answer_tokens": int(trained[numbers].sum()),
            "efficiency": float(self.examples.places[numbers].sum()) / (len(rows) * self.length),
        }

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        """The numbers of the examples that a source gives to an epoch."""
        size = self.examples.sizes[source]
        share = self._per_epoch(source)
        # In the endless order in which the source gives all its examples, round after round:
        start, stop = int(epoch * share), int((epoch + 1) * share)
        rounds = [
            random_order(size, self.seed, 0, source, number)[max(start - number * size, 0) : stop - number * size]
            for number in (range(start // size, -(-stop // size)) if size else ())
        ]
        return sum(self.examples.sizes[:source]) + np.concatenate([np.zeros(0, np.int64), *rounds])

    def _per_epoch(self, source: int) -> float:
        """How many examples of a source an epoch has."""
        sizes = self.examples.sizes
        if not self.weights:
            return sizes[source]
        ends = np.cumsum(sizes)
        means = [part.mean() for part in np.split(self.examples.places, ends[:-1])]
        shares = [weight / mean for weight, mean in zip(self.weights, means, strict=True)]
        return sum(sizes) * shares[source] / sum(shares)


def answer_batches(
    packing: Packing,
    *,
    rows: int,
    cursor: RowCursor | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, RowCursor]]:
    """Gives training batches without end, each with the cursor from which the batch after it can be made again.

    `rows` counts the global batch, of which this process gets its equal, contiguous share; a batch may begin in one
    epoch and end in the next. `loss_mask_BT` keeps the places whose next token is trained.
    Raises UserError for rows that the processes do not divide.
    """
    own = own_rows(rows, process_index, process_count)
    cursor = cursor or RowCursor()
    stream = _from_row(packing, cursor.row)
    groups = (list(itertools.islice(stream, rows)) for _ in itertools.count())
    return (
        (make_batch(packing.examples, group[own.start : own.stop], packing.length), RowCursor(cursor.row + n * rows))
        for n, group in enumerate(groups, start=1)
    )


def held_out_answer_batches(
    examples: Examples, *, length: int, rows: int, most: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Gives all examples once, or `most` of them, evenly spaced, if that is above 0 and they are more; they are packed
    in their order, and the last batch is filled with empty rows.

    Each process gets equally many batches of its equal share of `rows`.
    """
    own = own_rows(rows, process_index, process_count)
    count = min(len(examples), most or len(examples))
    numbers = np.arange(count) * len(examples) // max(count, 1)
    packed = [numbers[row].tolist() for row in best_fit(examples.places[numbers].tolist(), length)]
    for start in range(0, len(packed), rows):
        chosen = packed[start : start + rows]
        chosen += [[] for _ in range(rows - len(chosen))]
        yield make_batch(examples, chosen[own.start : own.stop], length)


def make_batch(examples: Examples, rows: Sequence[Sequence[int]], length: int) -> Batch:
    """Lays out rows of examples; the rest of each row is padding, segment 0."""
    batch = Batch(*(np.zeros((len(rows), length), np.int32) for _ in range(4)), np.zeros((len(rows), length), bool))
    for r, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            ids, answer_mask = examples[number]
            at = slice(start, start + len(ids) - 1)
            batch.tokens_BT[r, at] = ids[:-1]
            batch.targets_BT[r, at] = ids[1:]
            batch.segment_ids_BT[r, at] = segment
            batch.positions_BT[r, at] = np.arange(len(ids) - 1)
            batch.loss_mask_BT[r, at] = answer_mask[1:]
            start = at.stop
    return batch


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts numbered things of given sizes, in their order, each into the fullest row that has room for it.

    Raises ValueError for a size above the capacity.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room left in them
    rooms = 0  # the same as bits: bit n is set where a row has room n
    for number, size in enumerate(sizes):
        if size > capacity:
            raise ValueError(f"thing {number} of size {size} does not fit a row of {capacity}")
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(number)
        else:
            room, row = capacity, len(rows)
            rows.append([number])
        if left := room - size:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


def _from_row(packing: Packing, first: int) -> Iterator[list[int]]:
    """The endless stream of rows from number `first` on."""
    for epoch in itertools.count():
        rows = packing.epoch(epoch)
        yield from rows[first:]
        first = max(0, first - len(rows))


def _check(config: DialogueConfig) -> None:
    check_sources(config.sources, config.held_out, config.bad_rows, "dialogues")
    if config.eval_dialogues < 0:
        raise UserError(f"--data.eval-dialogues is {config.eval_dialogues}; it must be above 0, or 0 for all held out.")
