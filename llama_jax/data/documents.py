"""Which document comes when (paper section 2.1): held out or not, shuffled, mixed by weight, tokenised in order.

The order is one global sequence, numbered from 0 and without end. It does not know of processes or workers, so a
document's number is all there is to remember. Grain shuffles, repeats, mixes and runs the workers.
"""

import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from llama_jax.data.sources import Documents, open_source
from llama_jax.data.token_shards import DEFAULT_SHARD_TOKENS, write_token_shards
from llama_jax.text.tokenizer import Tokenizer

_SAMPLE, _SAMPLE_LENGTH = 256, 4096  # documents, and characters or ids of each
_BLOCK = 32  # documents that a worker sends at once: one by one, sending costs as much as tokenising


class EveryNth:
    """One document in every `period`, or all the others: the held-out part and the training part of a source.

    Our choice: evenly spaced by number, so that both parts run through the whole source, whatever its order, and
    depend on nothing else. Every source of two documents or more holds out at least one.
    """

    def __init__(self, documents: Documents, period: int, *, held_out: bool):
        self._documents, self._held_out = documents, held_out
        self._period = min(period, len(documents))
        self._first = self._period // 2

    def __len__(self) -> int:
        held_out = (len(self._documents) - 1 - self._first) // self._period + 1
        return held_out if self._held_out else len(self._documents) - held_out

    def __getitem__(self, index: int) -> str | np.ndarray:
        if self._held_out:
            return self._documents[self._first + index * self._period]
        skipped = max(0, (index - self._first) // (self._period - 1) + 1)
        return self._documents[index + skipped]


class Tokenise:
    """Turns a document into its ids with BOS and EOS (int32); token shards stay as they are, empty texts give none."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, document: str | np.ndarray) -> np.ndarray:
        if isinstance(document, np.ndarray):
            return document
        if not document:
            return np.zeros(0, np.int32)
        return np.array(self._tokenizer.encode(document, bos=True, eos=True), np.int32)


def tokens_per_document(documents: Documents, tokenise: Tokenise) -> float:
    """Estimates the mean length of a source's documents in tokens, from 256 evenly spaced ones, the same every time."""
    chosen = (
        (np.arange(_SAMPLE) * len(documents) // _SAMPLE).tolist() if len(documents) > _SAMPLE else range(len(documents))
    )
    total = 0.0
    for document in map(documents.__getitem__, chosen):
        head = document[:_SAMPLE_LENGTH]  # enough to see how many characters make a token
        total += len(tokenise(head)) * len(document) / max(1, len(head))
    return max(1.0, total / len(chosen))


def mixed_in_order(
    sources: Sequence[Documents], weights: Sequence[float], *, shuffle: bool, seed: int
) -> grain.MapDataset:
    """Gives the endless sequence of documents, readable at any number.

    With weights, each source repeats for itself and gives its share of the documents. Without, the sources are one
    collection, every document once an epoch. Each epoch has an order of its own.
    """
    parts = [grain.MapDataset.source(source) for source in sources]
    if not weights:
        parts = [grain.MapDataset.concatenate(parts)] if len(parts) > 1 else parts
    if shuffle:
        # Hashed: Grain adds the epoch to the seed, so that neighbouring seeds would share most of their epochs.
        seeds = np.random.SeedSequence(seed).generate_state(len(parts)).tolist()
        parts = [part.shuffle(seed=part_seed) for part, part_seed in zip(parts, seeds, strict=True)]
    parts = [part.repeat() for part in parts]
    return grain.MapDataset.mix(parts, weights) if weights else parts[0]


def in_order(documents: grain.MapDataset, tokenise: Tokenise, start: int = 0, workers: int = 0) -> Iterator[np.ndarray]:
    """Gives the ids of every document from number `start`, in order, computed by worker processes if there are any."""
    dataset = documents.slice(slice(start, None)).map(tokenise)
    # Threads would cost more than they bring: reading is a small part, tokenising does not run beside itself.
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if not workers:
        yield from dataset.to_iter_dataset(one_by_one)
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, and this is no absl program
    blocks = dataset.batch(_BLOCK, batch_fn=_joined).to_iter_dataset(one_by_one)
    for tokens, ends in blocks.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)):
        yield from np.split(tokens, ends[:-1])


def _joined(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(documents), np.cumsum([len(document) for document in documents])


def tokenize(
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Tokenises all documents of the sources into token shards in the folder `out`, and gives the shards' index.

    Started again after an interruption it goes on with the next shard. Raises UserError for bad sources, or if `out`
    holds shards of another recipe.
    """
    parts = [grain.MapDataset.source(open_source(spec, tokenizer)) for spec in sources]
    documents = grain.MapDataset.concatenate(parts)
    return write_token_shards(
        sources,
        tokenizer,
        out,
        documents_from=lambda start: in_order(documents, Tokenise(tokenizer), start, workers),
        total=len(documents),
        shard_tokens=shard_tokens,
        say=say,
    )
