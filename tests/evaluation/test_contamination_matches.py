"""N-grams that samples and corpus share: equal, token by token, to a matcher that tries every pair of places."""

import itertools
import os
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.evaluation import contamination_corpus, contamination_matches
from llama_jax.evaluation.contamination_corpus import Found, Search, Shard, join
from llama_jax.evaluation.contamination_matches import index_samples, is_covered, longest_matches

# Written from the procedure as the paper states it, and not from the code: longer than 10, at most 4 mismatches.


def oracle(sample: list[int], documents: list[list[int]]) -> list[int]:
    """For each token of a sample, the length of the longest match that covers it; all lengths of all pairs are tried."""
    covered = [0] * len(sample)
    for document in documents:
        for i in range(len(sample)):
            for j in range(len(document)):
                misses = 0
                for k in range(min(len(sample) - i, len(document) - j)):
                    if sample[i + k] != document[j + k]:
                        misses += 1
                        if k < 10 or misses > 4:
                            break
                    elif k >= 10:  # so here may be the last of a match of k + 1
                        for place in range(i, i + k + 1):
                            covered[place] = max(covered[place], k + 1)
    return covered


def found(samples, documents) -> list[list[int]]:
    """The same by the program: what `is_covered` says of every minimum length, and so the longest."""
    index = index_samples([np.array(sample, np.uint32) for sample in samples])
    longest = longest_matches(index, [np.array(document, np.uint32) for document in documents])
    covering = np.zeros(len(longest), np.int64)
    for least in range(1, max([len(sample) for sample in samples], default=0) + 1):
        covering[is_covered(longest, least)] = least
    bounds = np.cumsum([0, *map(len, samples)])
    return [covering[first:last].tolist() for first, last in itertools.pairwise(bounds)]


@st.composite
def overlapping(draw) -> tuple[list[list[int]], list[list[int]]]:
    """Samples and documents of few tokens, with stretches of samples copied into documents with mistakes."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    letters = draw(st.sampled_from([1, 2, 3, 50]))
    samples = [
        generator.integers(0, letters, draw(st.integers(0, 60))).tolist() for _ in range(draw(st.integers(1, 3)))
    ]
    documents = []
    for _ in range(draw(st.integers(1, 3))):
        document = generator.integers(0, letters, draw(st.integers(0, 12))).tolist()
        for sample in draw(st.lists(st.sampled_from(samples), min_size=1, max_size=2)):
            first = draw(st.integers(0, len(sample) // 2))
            copied = sample[first : first + draw(st.integers(9, 60))]
            for place in draw(st.lists(st.integers(0, 60), max_size=7)):
                if place < len(copied):
                    copied[place] = 50  # which no sample holds
            document += copied + generator.integers(0, letters, draw(st.integers(0, 3))).tolist()
        documents.append(document)
    return samples, documents


WINDOW_HASHES = contamination_matches.window_hashes


def short_hashes(bits):
    """Hashes of so few bits that different windows share them."""
    return lambda tokens: WINDOW_HASHES(tokens) & np.uint64(2**bits - 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(overlapping(), st.booleans(), st.sampled_from([64, 3, 0]))
def test_as_every_pair_tried(case, small, bits):
    """Also in blocks and portions so small that every match goes across their borders, and with windows of equal hash."""
    samples, documents = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination_matches, "window_hashes", short_hashes(bits))
        if small:
            for name, size in {"_BLOCK": 7, "_JOINED": 40, "_PAIRS": 3, "_WIDEST": 11}.items():
                patch.setattr(contamination_matches, name, size)
        assert found(samples, documents) == [oracle(sample, documents) for sample in samples]


SAMPLE = list(range(100, 140))


def with_mismatches(*places: int) -> list[int]:
    return [0 if place in places else token for place, token in enumerate(SAMPLE)]


@pytest.mark.parametrize(
    ("document", "covered"),
    [
        (with_mismatches(), range(40)),
        (SAMPLE[:11], range(11)),
        (SAMPLE[:10], []),  # not longer than 10
        (SAMPLE[29:], range(29, 40)),
        (SAMPLE[30:], []),
        (with_mismatches(9), range(10, 40)),  # none of the first ten
        (with_mismatches(10), range(40)),
        (with_mismatches(9, 19, 29, 39), []),  # nowhere ten that agree
        (with_mismatches(9, 20), range(10, 40)),
        (with_mismatches(10, 12, 14, 16, *range(24, 40)), range(24)),  # four, and what is trailing is not counted
        (with_mismatches(10, 12, 14, 16, 18, *range(24, 40)), range(18)),  # the fifth
        (
            with_mismatches(10, 12, 14, 16, 18, 30),
            [*range(18), *range(19, 40)],
        ),  # two matches, neither of which holds it
        (with_mismatches(10, 11, 12, 13), range(40)),
        (with_mismatches(10, 11, 12, 13, 14, *range(24, 40)), []),
        (with_mismatches(39), range(39)),  # not the last
        (with_mismatches(36, 37, 38, 39), range(36)),
        ([*SAMPLE[:20], 0, 0, *SAMPLE[20:]], range(40)),  # two matches
        ([*SAMPLE[:10], 0, *SAMPLE[10:20]], []),  # nothing is inserted into one
        ([7] * 3 + SAMPLE[5:25] + [7] * 3, range(5, 25)),
    ],
)
def test_what_the_paper_says_of_mismatches(document, covered):
    """Which tokens lie in a match, found by hand from the words; and its length as by the matcher that tries all."""
    lengths = found([SAMPLE], [document])
    assert [place for place, length in enumerate(lengths[0]) if length] == list(covered)
    assert lengths == [oracle(SAMPLE, [document])]


def test_no_match_leaves_its_document_or_its_sample():
    halves = [SAMPLE[:10], SAMPLE[10:20]]
    assert found([SAMPLE[:20]], halves) == [[0] * 20]
    assert found([SAMPLE[:20]], [SAMPLE[:20]]) == [[20] * 20]
    assert found(halves, [SAMPLE[:20]]) == [[0] * 10, [0] * 10]
    # Not by way of mismatches either, as which EOS and BOS between documents would count.
    assert found([[*SAMPLE[:11], 2, 1, *SAMPLE[13:20]]], [[*SAMPLE[:11], 2], [1, *SAMPLE[13:20]]]) == [
        [12] * 12 + [0] * 8
    ]


def test_hashes_tell_windows_apart_and_do_not_depend_on_the_place():
    """The table and the search rely on it for speed; every token of a window counts, and its place among the ten."""
    tokens = np.random.default_rng(3).integers(0, 32000, 5000).astype(np.uint32)
    hashes = contamination_matches.window_hashes(tokens)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 10)
    assert len(hashes) == len(windows) == len(np.unique(hashes))
    one = windows[77]
    assert contamination_matches.window_hashes(one.copy()).tolist() == [hashes[77]]
    swapped = [one[[*range(k), k + 1, k, *range(k + 2, 10)]] for k in range(9)]
    changed = [np.where(np.arange(10) == k, one + 1, one).astype(np.uint32) for k in range(10)]
    others = {int(contamination_matches.window_hashes(other)[0]) for other in [*swapped, *changed]}
    assert len(others) == 19 and int(hashes[77]) not in others
    top = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
    assert top.min() > 200  # 312 each


def test_of_what_shards_hold_the_longest_stays():
    def shard(number, places, lengths):
        return Found((number,), 1, 7, np.array(places, np.int64), np.array(lengths, np.int32))

    for parts in itertools.permutations([shard(0, [3, 5], [20, 11]), shard(1, [5, 9], [13, 11]), shard(2, [3], [12])]):
        together = join(parts)
        assert (together.places.tolist(), together.lengths.tolist()) == ([3, 5, 9], [20, 13, 11])
        assert (together.shards, together.documents, together.tokens) == ((0, 1, 2), 3, 21)


class Documents:
    """Ids by number, which a search in other processes can take with it."""

    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, number):
        return self.documents[number]


def planted(count: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    samples = [generator.integers(3, 3000, 60).astype(np.uint32) for _ in range(20)]
    documents = []
    for number in range(count):
        document = generator.integers(3, 3000, 200).astype(np.uint16)
        if number % 3 == 0:
            first, size = generator.integers(0, 40), generator.integers(12, 60)
            copied = samples[generator.integers(20)][first : first + size].copy()
            copied[generator.integers(len(copied), size=2)] = 1
            document[50 : 50 + len(copied)] = copied
        documents.append(document)
    return samples, documents


def test_shards_and_processes_change_nothing(monkeypatch):
    samples, documents = planted(60, seed=4)
    monkeypatch.setattr(contamination_corpus, "open_source", lambda spec, tokenizer: Documents(documents))
    search = Search(samples, ["planted"], None)
    whole = search(Shard(0, 0, 0, 60))
    assert (whole.documents, whole.tokens) == (60, 12000) and len(whole.places) > 100
    assert whole.lengths.tolist() == longest_matches(search.index, documents)[whole.places].tolist()
    for size in (1, 7, 59):
        shards = [Shard(k, 0, first, min(60, first + size)) for k, first in enumerate(range(0, 60, size))]
        ways = [contamination_corpus.search_here(search, shards[::-1])]
        if size == 59:
            ways.append(contamination_corpus.search_in_processes(search, shards, 3))  # more than there are shards
        for way in ways:
            parts = join(way)
            assert parts.shards == tuple(range(len(shards)))
            assert (parts.documents, parts.tokens) == (whole.documents, whole.tokens)
            assert parts.places.tolist() == whole.places.tolist() and parts.lengths.tolist() == whole.lengths.tolist()
            assert join([join([parts]), join([])]).lengths.tolist() == whole.lengths.tolist()


class Deadly(Documents):
    """Documents of which one kills who reads it, as a system short of memory does."""

    def __getitem__(self, number):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def test_a_process_that_is_killed_is_no_silent_end(monkeypatch):
    samples, documents = planted(60, seed=4)
    monkeypatch.setattr(contamination_corpus, "open_source", lambda spec, tokenizer: Deadly(documents))
    search = Search(samples, ["deadly"], None)
    shards = [Shard(k, 0, first, first + 10) for k, first in enumerate(range(0, 60, 10))]
    with pytest.raises(UserError, match="ended with -9; .* fewer --workers"):
        list(contamination_corpus.search_in_processes(search, shards, 2))
