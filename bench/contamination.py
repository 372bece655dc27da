"""Tokens per second and memory of the search for evaluation samples in a corpus, which is made on the fly.

    python bench/contamination.py
    python bench/contamination.py --gigabytes 10 --samples 100000

The corpus is ids as token shards hold them: uint16, of a vocabulary of 32,000 with the frequencies of words, in documents of
about 600. Four bytes of text are taken for a token, so that 1 GB is 250 million tokens. One document in a hundred holds 60
tokens of a sample, of which two are wrong; in the end each of these matches must be found, and none that begins elsewhere.

The limit is measured in turns with it: the same tokens joined, and one addition with NumPy for each, at the width of a hash.
Nothing that looks at every token in NumPy can be faster. Times are CPU seconds of one process. Memory is the most that
the process had before the search, with samples and libraries loaded, and in the end.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator

import numpy as np

from llama_jax.evaluation.contamination_matches import index_samples, longest_matches

VOCABULARY, TOKEN_BYTES = 32_000, 4
DOCUMENT, SAMPLE, PLANTED = 600, 120, 60  # tokens
WRONG = [15, 30]  # of the planted ones
PART = 2000  # documents that are made at once


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of text that the corpus stands for")
    parser.add_argument("--samples", type=int, default=10_000, help=f"of {SAMPLE} tokens")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:40} {value:,.3f}" if isinstance(value, float) else f"{name:40} {value:,}")


def measure(options: argparse.Namespace) -> dict[str, float | int]:
    """Searches and compares, part by part."""
    generator = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    counts = np.ceil(frequencies / frequencies.sum() * (1 << 20)).astype(int)
    likely = np.repeat(np.arange(VOCABULARY, dtype=np.uint16), counts)  # one of these is an id with its frequency
    samples = [likely[generator.integers(len(likely), size=SAMPLE)] for _ in range(options.samples)]
    planted = np.zeros(len(samples) * SAMPLE, bool)
    before, began = memory(), time.process_time()
    index = index_samples(samples)
    indexing = time.process_time() - began
    tokens, elsewhere, limit = 0, 0.0, 0.0  # `elsewhere`: CPU seconds that are not the search's

    def documents() -> Iterator[np.ndarray]:
        nonlocal tokens, elsewhere, limit
        for _ in range(max(1, round(options.gigabytes * 1e9 / TOKEN_BYTES / DOCUMENT / PART))):
            began = time.process_time()
            part = list(make_documents(generator, likely, samples, planted))
            made = time.process_time()
            tokens += added_up(part)
            limit += time.process_time() - made
            elsewhere += time.process_time() - began
            yield from part

    began = time.process_time()
    longest = longest_matches(index, documents())
    searching = time.process_time() - began - elsewhere
    check(longest, planted)
    return {
        "tokens": tokens,
        "tokens of samples": len(index.tokens),
        "matches planted, and found": int(planted.sum()),
        "index of the samples, CPU s": indexing,
        "search, million tokens/s": tokens / searching / 1e6,
        "joining and addition, million tokens/s": tokens / limit / 1e6,
        "search / joining and addition": limit / searching,
        "memory before, MB": before,
        "memory at most, MB": memory(),
    }


def make_documents(
    generator: np.random.Generator, likely: np.ndarray, samples: list[np.ndarray], planted: np.ndarray
) -> Iterator[np.ndarray]:
    """Gives documents, and notes in `planted` where the stretches in them begin in the samples."""
    tokens = likely[generator.integers(len(likely), size=PART * DOCUMENT)]
    cuts = np.sort(generator.choice(len(tokens), PART - 1, replace=False))
    for number, document in enumerate(np.split(tokens, cuts)):
        if number % 100 == 0 and len(document) > 2 * PLANTED:
            sample, first = generator.integers(len(samples)), generator.integers(SAMPLE - PLANTED)
            document[PLANTED - 1] = VOCABULARY  # which no sample holds, so that no match begins earlier by chance
            document[PLANTED : 2 * PLANTED] = samples[sample][first : first + PLANTED]
            document[PLANTED:][WRONG] = VOCABULARY
            planted[sample * SAMPLE + first] = True
        yield document


def added_up(documents: list[np.ndarray]) -> int:
    """Joins documents as the search does, and adds to each token; gives how many there are."""
    tokens = np.concatenate(documents).astype(np.uint32)
    for first in range(0, len(tokens), 1 << 15):
        np.add(tokens[first : first + (1 << 15)], 1, dtype=np.uint64)
    return len(tokens)


def check(longest: np.ndarray, planted: np.ndarray) -> None:
    """Every planted match is there in its length, and every match begins within a planted one."""
    starts = np.flatnonzero(planted)
    inside = np.zeros(len(longest), bool)
    inside[(starts[:, None] + np.arange(PLANTED)).ravel()] = True
    missing, others = np.count_nonzero(longest[starts] < PLANTED), np.count_nonzero(longest[~inside])
    if missing or others:
        raise SystemExit(f"of {len(starts)} planted matches {missing} were not found; {others} were that are none")


def memory() -> float:
    """The most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
