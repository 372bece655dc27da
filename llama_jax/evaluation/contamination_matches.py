"""Where evaluation samples and a corpus share long n-grams (paper A.6): exact, in one pass over a corpus of any size.

A match is a stretch of a sample and one of a document, of equal length, that hold the same tokens at the same offsets but for
at most four, the skipgram budget; none of the four is among the first ten tokens, and none is the last. "Longer than 10
tokens" is taken as written, so a match has 11 tokens or more. No match leaves its sample or its document.

Our choice: mismatches are substitutions, nothing is inserted or left out; they count towards the length of the match and among
its tokens. At a minimum match length L count the matches of L tokens or more, so that L = 10 and L = 11 are the same.

What is small, the samples, is indexed by the hashes of all stretches of ten tokens; what is large, the corpus, passes by. Equal
hashes are looked at token by token, so that a collision costs time and never a result. Of all matches that begin at a token of
a sample the longest holds the others, so one length for every token of the samples is all there is to remember, and what
several processes found is joined by the maximum.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

EXACT, BUDGET = 10, 4  # tokens at the beginning of a match that must agree; of the others, those that may not
_BLOCK = 1 << 15  # windows hashed at once: with their hashes they stay in a core's cache
_JOINED = 1 << 20  # tokens of documents that are joined before they are searched
_PAIRS = 1 << 15  # places of samples and corpus compared at once
_BYTES = 8  # of the table, for each window: of windows that no sample has, less than 1 in 64 are looked up further
_WIDEST = 256  # tokens by which matches are extended at once, EXACT or more
_SPREAD, _BASE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd and without a pattern in their bits


@dataclass(frozen=True)
class SampleIndex:
    """The tokens of all samples, one after another, and where each ten of them stand."""

    tokens: np.ndarray
    """uint32, [tokens of all samples]."""
    ends: np.ndarray
    """int64, [tokens of all samples]: where the sample of this token ends."""
    hashes: np.ndarray
    """uint64, ascending, each once: of the windows of ten tokens that a match can begin with."""
    firsts: np.ndarray
    """int64, [hashes + 1]: the places of window k are places[firsts[k] : firsts[k + 1]]."""
    places: np.ndarray
    """int64: where windows begin in `tokens`."""
    table: np.ndarray
    """uint8, [a power of two]: a bit for every hash, in the byte that its leading bits name; see `_slots`."""


def index_samples(samples: Sequence[np.ndarray]) -> SampleIndex:
    """Indexes the evaluation samples.

    Args:
      samples: the ids of each, without BOS and EOS.
    """
    sizes = np.array([len(sample) for sample in samples], np.int64)
    tokens = np.concatenate([np.zeros(0, np.uint32), *samples]).astype(np.uint32)
    ends = np.repeat(np.cumsum(sizes), sizes)
    starts = np.flatnonzero(np.arange(len(tokens)) + EXACT < ends)  # room for one token more than the window
    hashes = window_hashes(tokens)[starts] if len(starts) else np.zeros(0, np.uint64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    firsts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
    unique = hashes[firsts]
    table = np.zeros(1 << max(16, (_BYTES * len(unique)).bit_length()), np.uint8)
    np.bitwise_or.at(table, _slots(table, unique), _bits(unique))
    return SampleIndex(tokens, ends, unique, np.append(firsts, len(order)), starts[order], table)


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash (uint64) for each window of ten tokens, the same wherever it stands: a polynomial modulo 2**64.

    By way of the hashes of two, four and eight tokens, with half the multiplications of one token after another.
    """
    ones = np.multiply(tokens, np.uint64(_SPREAD), dtype=np.uint64)
    twos = _joined(ones, ones, 1)
    fours = _joined(twos, twos, 2)
    eights = _joined(fours, fours, 4)
    return _joined(eights, twos, 8)


def _joined(heads: np.ndarray, tails: np.ndarray, size: int) -> np.ndarray:
    """Hashes of stretches of `size` tokens, each joined with that of the stretch which begins where it ends."""
    count = max(0, len(tails) - size)
    hashes = heads[:count] * np.uint64(pow(_BASE, size, 1 << 64))
    hashes += tails[size:]
    return hashes


def _slots(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The byte of the table that tells of each hash."""
    return (hashes >> np.uint64(65 - len(table).bit_length())).view(np.int64)


def _bits(hashes: np.ndarray) -> np.ndarray:
    """The bit, of its byte of the table, that tells of each hash."""
    return np.left_shift(1, (hashes & np.uint64(7)).astype(np.uint8), dtype=np.uint8)


def longest_matches(index: SampleIndex, documents: Iterable[np.ndarray]) -> np.ndarray:
    """The length of the longest match with any of the documents that begins at each token of the samples; 0 is none.

    Memory is that of the index, of about a million tokens and of the longest document.

    Args:
      index: of the samples.
      documents: the ids of each; BOS and EOS, which no sample holds, change nothing.

    Returns:
      int32, [tokens of all samples].
    """
    longest = np.zeros(len(index.tokens), np.int32)
    for tokens, ends in _together(documents):
        for first in range(0, len(tokens) - EXACT, _BLOCK):
            hashes = window_hashes(tokens[first : first + _BLOCK + EXACT - 1])
            told = index.table.take(_slots(index.table, hashes), mode="clip")
            found = np.flatnonzero(told)
            found = found[(told[found] & _bits(hashes[found])) > 0]
            if len(found):
                _match(index, tokens, ends, found + first, hashes[found], longest)
    return longest


def _together(documents: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Joins documents, whole, into about a million tokens: (tokens, where each document ends)."""
    waiting, count = [], 0
    for document in documents:
        waiting.append(document)
        count += len(document)
        if count >= _JOINED:
            yield _join(waiting)
            waiting, count = [], 0
    if waiting:
        yield _join(waiting)


def _join(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate(documents).astype(np.uint32, copy=False)
    return tokens, np.cumsum([len(document) for document in documents])


def _match(
    index: SampleIndex,
    tokens: np.ndarray,
    ends: np.ndarray,
    starts: np.ndarray,
    hashes: np.ndarray,
    longest: np.ndarray,
) -> None:
    """Raises `longest` by the matches of corpus windows, which begin at `starts`, with samples' windows of equal hash."""
    which = np.searchsorted(index.hashes, hashes)
    known = index.hashes[np.minimum(which, len(index.hashes) - 1)] == hashes
    starts, which = starts[known], which[known]
    document_ends = ends[np.searchsorted(ends, starts, side="right")]
    counts = index.firsts[which + 1] - index.firsts[which]
    for some in _portions(counts):
        repeats = counts[some]
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        at_sample = index.places[np.repeat(index.firsts[which[some]], repeats) + within]
        at_corpus = np.repeat(starts[some], repeats)
        left = index.ends[at_sample] - at_sample
        room = np.minimum(left, np.repeat(document_ends[some], repeats) - at_corpus)
        # Where a match already reaches the sample's end none is longer: what a corpus repeats is looked at once.
        open_ = np.flatnonzero((room > EXACT) & (longest[at_sample] < left))
        at_sample, lengths = at_sample[open_], _lengths(index, tokens, at_sample[open_], at_corpus[open_], room[open_])
        np.maximum.at(longest, at_sample, np.where(lengths > EXACT, lengths, 0).astype(np.int32))


def _portions(counts: np.ndarray) -> Iterator[slice]:
    """Slices whose counts sum to not much more than _PAIRS."""
    portion = (np.cumsum(counts) - counts) // _PAIRS
    bounds = np.flatnonzero(np.diff(portion)) + 1
    for first, last in zip([0, *bounds], [*bounds, len(counts)], strict=True):
        if first < last:
            yield slice(first, last)


def _lengths(
    index: SampleIndex, tokens: np.ndarray, at_sample: np.ndarray, at_corpus: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """The length of the longest match that begins at each pair of places, EXACT or less where there is none.

    Args:
      index: of the samples.
      tokens: of some documents.
      at_sample: places in the samples.
      at_corpus: places in `tokens`.
      room: tokens to the end of sample or document, whichever is nearer.
    """
    lengths, missed = np.zeros(len(room), np.int64), np.zeros(len(room), np.int64)
    live, done = np.arange(len(room)), 0
    while len(live):
        width = min(
            done or EXACT, _WIDEST
        )  # most matches are by chance and end soon, so few tokens at first, then more
        offsets = done + np.arange(width)
        equal = offsets < room[live, None]  # what lies outside agrees with nothing
        equal &= index.tokens.take(at_sample[live, None] + offsets, mode="clip") == tokens.take(
            at_corpus[live, None] + offsets, mode="clip"
        )
        misses = missed[live, None] + np.cumsum(~equal, axis=1)
        budget = BUDGET if done else 0  # the first round is that of the tokens that must agree
        agreed = equal & (misses <= budget)
        last = done + width - np.argmax(agreed[:, ::-1], axis=1)
        lengths[live] = np.where(agreed.any(axis=1), last, lengths[live])
        missed[live] = misses[:, -1]
        done += width
        live = live[(missed[live] <= budget) & (done < room[live])]
    return lengths


def is_covered(longest: np.ndarray, least: int) -> np.ndarray:
    """Whether each token of the samples lies in a match of at least so many tokens.

    Args:
      longest: as `longest_matches` gives it.
      least: the minimum match length L, 1 or more; as no match is shorter than 11 tokens, 10 and 11 are the same.

    Returns:
      bool, [tokens of all samples].
    """
    starts = np.flatnonzero(longest >= least)
    changes = np.zeros(len(longest) + 1, np.int32)
    np.add.at(changes, starts, 1)
    np.add.at(changes, starts + longest[starts], -1)
    return np.cumsum(changes[:-1]) > 0
