"""Preferences to batches of pairs (paper 3.2.2: 512 pairs, one epoch), and the statistics of the paper's Table 6.

A batch has a fixed number of pairs. The two dialogues of a pair stand one behind the other in the same row, and a row holds
as many pairs as have room in it: dialogues are of very different lengths (the paper's mean is 600 tokens, its context 4096).
Every dialogue is a segment of its own. An epoch shows no pair twice, since the paper found that more of the same makes a
reward model overfit; its last batch is smaller.
"""

import array
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.data.dialogues import Skipped, open_rows
from llama_jax.data.drawing import check_sources, check_weights, random_order
from llama_jax.data.examples import best_fit
from llama_jax.data.pipeline import own_rows
from llama_jax.data.preferences import (
    EncodedPair,
    PairShape,
    Preference,
    detect_pair_shape,
    encode_pair,
    pair_shape_named,
    prompt_hash,
    read_preferences,
)
from llama_jax.errors import UserError
from llama_jax.text.chat import Template
from llama_jax.text.tokenizer import Tokenizer

MOST_IN_ROW = 32  # pairs
UNKNOWN = -1  # a strength or a safety label that the source does not give


@dataclass(frozen=True)
class PreferenceConfig:
    """What preferences to train on and what to keep for evaluation."""

    sources: tuple[str, ...] = ()
    """Where pairs come from: a .jsonl file, jsonl:GLOB, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    weights: tuple[float, ...] = ()
    """Each source's share of the pairs, in any unit: an epoch ends where the first source would have to repeat itself;
    empty: every pair once an epoch.
    """
    tests: tuple[str, ...] = ()
    """Sources that are only evaluated, each by itself, at the end."""
    shape: Literal["auto", "transcripts", "dialogues", "answers", "stackexchange", "shp", "webgpt", "summaries"] = (
        "auto"
    )
    """How rows hold pairs; auto: what fits most of a source's first rows."""
    held_out: float = 0.01
    """Fraction of the pairs kept for evaluation, chosen by their prompts alone; 0 for none."""
    eval_pairs: int = 1000
    """Evaluate on at most so many held-out pairs, evenly spaced, while training; 0 for all."""
    bad_rows: float = 0.01
    """Share of a source's rows that may be left out because they are no pairs; more is an error."""


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs by number, in flat arrays, those of one source after those of another."""

    ids: np.ndarray
    """All tokens, uint16 where the vocabulary allows, else int32: of each pair the chosen dialogue, then the rejected."""
    starts: np.ndarray
    """int64, where each dialogue begins (two for each pair), and at the end the number of tokens."""
    answers: np.ndarray
    """int32 (pairs, 2): tokens of the last answer."""
    questions: np.ndarray
    """int32 (pairs,): tokens of all questions, which both dialogues have, with what the format puts around them."""
    turns: np.ndarray
    """int32 (pairs,): how many questions that are."""
    strength: np.ndarray
    """int8 (pairs,): `Strength`, or UNKNOWN."""
    safe: np.ndarray
    """int8 (pairs, 2): 1, 0 or UNKNOWN."""
    sizes: tuple[int, ...]
    """Pairs of each source."""

    def __len__(self) -> int:
        return len(self.strength)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives the ids of both dialogues, the chosen one first."""
        a, b, c = self.starts[2 * number : 2 * number + 3]
        return self.ids[a:b], self.ids[b:c]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each dialogue, int64 (pairs, 2)."""
        return np.diff(self.starts).reshape(-1, 2)

    @property
    def source(self) -> np.ndarray:
        """The number of each pair's source."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)


class _Growing:
    """Pairs while they are read."""

    def __init__(self, vocab_size: int):
        self._ids = array.array("H" if vocab_size <= 1 << 16 else "i")
        self._starts = array.array("q", [0])
        self._rest: list[tuple[int, ...]] = []
        self._sizes: list[int] = []

    def begin_source(self) -> None:
        self._sizes.append(0)

    def add(self, encoded: EncodedPair, preference: Preference) -> None:
        for ids in (encoded.chosen, encoded.rejected):
            self._ids.extend(ids)
            self._starts.append(len(self._ids))
        labels = (preference.strength, preference.chosen_safe, preference.rejected_safe)
        self._rest.append(
            (
                *encoded.answers,
                encoded.questions,
                encoded.turns,
                *(UNKNOWN if label is None else int(label) for label in labels),
            )
        )
        self._sizes[-1] += 1

    def pairs(self) -> Pairs:
        ids = np.frombuffer(self._ids, np.uint16 if self._ids.typecode == "H" else np.int32)
        rest = np.array(self._rest, np.int32).reshape(-1, 7)
        return Pairs(
            ids,
            np.frombuffer(self._starts, np.int64),
            rest[:, :2],
            rest[:, 2],
            rest[:, 3],
            rest[:, 4].astype(np.int8),
            rest[:, 5:].astype(np.int8),
            tuple(self._sizes),
        )


class Found(NamedTuple):
    """What became of a source's rows."""

    source: str
    shape: PairShape
    skipped: Skipped
    excluded: Counter[str]
    """Pairs left out on purpose, by reason."""
    shortened: int
    """Pairs whose prompts lost their oldest turns, being longer than a row."""
    too_long: int
    """Pairs left out because an answer and its question alone do not fit a row."""

    def __str__(self) -> str:
        text = f"{self.source}: {self.shape.name}: {self.skipped}"
        if self.excluded:
            text += "; excluded: " + ", ".join(f"{n} {reason}" for reason, n in self.excluded.most_common())
        if self.shortened or self.too_long:
            text += f"; {self.shortened} lost their oldest turns to fit a row, {self.too_long} left out as too long"
        return text


class LoadedPairs(NamedTuple):
    """The pairs of all sources."""

    train: Pairs
    held_out: Pairs
    """Of the sources."""
    tests: Pairs
    """All of the test sources."""
    found: tuple[Found, ...]
    """For each source, and then for each test source."""

    @property
    def longest(self) -> int:
        """Tokens of the longest pair, whose two dialogues stand one behind the other."""
        return max(int(pairs.lengths.sum(1).max()) for pairs in (self.train, self.held_out, self.tests) if len(pairs))

    def __str__(self) -> str:
        counts = f"{len(self.train)} pairs to train on, {len(self.held_out)} held out, {len(self.tests)} in test sets"
        return "\n".join([*map(str, self.found), counts])


def load_pairs(config: PreferenceConfig, tokenizer: Tokenizer, template: Template, length: int) -> LoadedPairs:
    """Reads and encodes all pairs for rows of `length` tokens.

    Raises UserError for bad sources, too many bad rows, or if nothing is left to train on.
    """
    _check(config)
    train, held_out, tests = (_Growing(tokenizer.vocab_size) for _ in range(3))
    named = pair_shape_named(config.shape)
    all_found = []
    for number, spec in enumerate((*config.sources, *config.tests)):
        is_test = number >= len(config.sources)
        rows = open_rows(spec)
        found = Found(spec, named or detect_pair_shape(rows, spec), Skipped(), Counter(), 0, 0)
        shortened = too_long = 0
        for growing in (tests,) if is_test else (train, held_out):
            growing.begin_source()
        for preference in read_preferences(rows, found.shape, template, found.skipped, found.excluded):
            encoded = encode_pair(tokenizer, preference, template, length)
            too_long += encoded is None
            if encoded:
                shortened += encoded.dropped > 0
                is_held_out = prompt_hash(preference) < config.held_out * 2**64
                (tests if is_test else held_out if is_held_out else train).add(encoded, preference)
        found.skipped.check(config.bad_rows)
        all_found.append(found._replace(shortened=shortened, too_long=too_long))
    loaded = LoadedPairs(train.pairs(), held_out.pairs(), tests.pairs(), tuple(all_found))
    if not len(loaded.train):
        raise UserError(f"No pair is left to train on:\n{loaded}\nUse longer rows (--length) or more data.")
    return loaded


class PairBatch(NamedTuple):
    """Rows of pairs, one process's share of a global batch; K counts the places for pairs in a row."""

    tokens_BT: np.ndarray  # int32, padded on the right
    segment_ids_BT: np.ndarray  # int32, another number for every dialogue of a row, 0 for padding
    chosen_last_BK: np.ndarray  # int32, where each chosen dialogue's last token stands
    rejected_last_BK: np.ndarray  # int32
    chosen_answer_BK: np.ndarray  # int32, tokens of each chosen dialogue's last answer, with the id that ends it
    rejected_answer_BK: np.ndarray  # int32
    strength_BK: np.ndarray  # int32, `Strength` or UNKNOWN
    chosen_safe_BK: np.ndarray  # int32, 1, 0 or UNKNOWN
    rejected_safe_BK: np.ndarray  # int32
    pair_mask_BK: np.ndarray  # bool, False where the place holds no pair


class BatchShape(NamedTuple):
    """The shape of a global batch."""

    rows: int
    length: int
    """Tokens in a row."""
    places: int
    """For pairs, in a row."""


class BatchCursor(NamedTuple):
    """A place in the stream of batches: how many are used."""

    batch: int = 0


@dataclass(frozen=True)
class PairOrder:
    """How pairs are drawn into batches: a function of the pairs and the seed, epoch by epoch."""

    pairs: Pairs
    count: int
    """Pairs in a global batch."""
    seed: int = 0
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        """Raises UserError for weights that do not suit the sources."""
        check_weights(self.weights, self.pairs.sizes, "pairs")

    @property
    def drawn(self) -> tuple[int, ...]:
        """How many pairs each source gives to an epoch."""
        sizes = self.pairs.sizes
        if not self.weights:
            return sizes
        unit = min(size / weight for size, weight in zip(sizes, self.weights, strict=True))
        return tuple(min(size, round(unit * weight)) for size, weight in zip(sizes, self.weights, strict=True))

    @property
    def batches(self) -> int:
        """Batches in an epoch, the last of which may be smaller."""
        return -(-sum(self.drawn) // self.count)

    def epoch(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's pairs in random order, none of them twice."""
        starts = np.cumsum([0, *self.pairs.sizes])
        parts = [
            starts[source] + random_order(self.pairs.sizes[source], self.seed, 0, source, epoch)[:count]
            for source, count in enumerate(self.drawn)
        ]
        drawn = np.concatenate(parts)
        return drawn[random_order(len(drawn), self.seed, 1, epoch)]

    def shape(self, epochs: int, length: int, multiple: int) -> BatchShape:
        """What every batch of so many epochs fits into: rows of `length` tokens, as many as a multiple of `multiple`."""
        packed = [pack_pairs(self.pairs, part, length) for epoch in range(epochs) for part in self.parts(epoch)]
        rows = max(map(len, packed))
        return BatchShape(rows + -rows % multiple, length, max(len(row) for rows in packed for row in rows))

    def parts(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the pairs in each of an epoch's batches."""
        return np.split(self.epoch(epoch), np.arange(1, self.batches) * self.count)


def pair_batches(
    order: PairOrder,
    shape: BatchShape,
    *,
    cursor: BatchCursor | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[PairBatch, BatchCursor]]:
    """Gives training batches without end, each with the cursor from which the batch after it can be made again.

    Each process gets its equal, contiguous share of every global batch.
    Raises UserError for rows that the processes do not divide.
    """
    own = own_rows(shape.rows, process_index, process_count)
    first = (cursor or BatchCursor()).batch

    def stream() -> Iterator[tuple[PairBatch, BatchCursor]]:
        for epoch in itertools.count(first // order.batches):
            for batch, numbers in enumerate(order.parts(epoch), start=1 + epoch * order.batches):
                if batch > first:
                    packed = pack_pairs(order.pairs, numbers, shape.length)
                    yield make_pair_batch(order.pairs, packed, shape, own), BatchCursor(batch)

    return stream()


def pack_pairs(pairs: Pairs, numbers: np.ndarray, length: int) -> list[list[int]]:
    """Puts the pairs of these numbers into rows of `length` tokens, both dialogues of a pair in the same one."""
    # No pair counts as less than a 32nd of a row, so that no row needs places for more than 32.
    sizes = np.maximum(pairs.lengths[numbers].sum(1), -(-length // MOST_IN_ROW))
    return [[int(numbers[i]) for i in row] for row in best_fit(sizes.tolist(), length)]


def make_pair_batch(pairs: Pairs, packed: Sequence[Sequence[int]], shape: BatchShape, own: range) -> PairBatch:
    """Lays out this process's own rows of a global batch; what is left of rows and places holds no pair."""
    tokens, segments = (np.zeros((len(own), shape.length), np.int32) for _ in range(2))
    last, answer = (np.zeros((2, len(own), shape.places), np.int32) for _ in range(2))
    safe = np.full((2, len(own), shape.places), UNKNOWN, np.int32)
    strength, mask = np.full((len(own), shape.places), UNKNOWN, np.int32), np.zeros((len(own), shape.places), bool)
    for r, numbers in enumerate(packed[own.start : own.stop]):
        start = 0
        for k, number in enumerate(numbers):
            for side, ids in enumerate(pairs[number]):
                at = slice(start, start + len(ids))
                tokens[r, at], segments[r, at] = ids, 2 * k + side + 1
                start, last[side, r, k] = at.stop, at.stop - 1
            strength[r, k], safe[:, r, k], mask[r, k] = pairs.strength[number], pairs.safe[number], True
            answer[:, r, k] = pairs.answers[number]
    return PairBatch(tokens, segments, *last, *answer, strength, *safe, mask)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most so many numbers below `count`, evenly spaced; all of them for 0."""
    kept = min(count, most or count)
    return np.arange(kept) * count // max(kept, 1)


def _check(config: PreferenceConfig) -> None:
    check_sources(config.sources, config.held_out, config.bad_rows, "preferences")
    if config.eval_pairs < 0:
        raise UserError(f"--data.eval-pairs is {config.eval_pairs}; it must be above 0, or 0 for all held out.")
