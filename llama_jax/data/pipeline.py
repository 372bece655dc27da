"""From sources to batches (paper section 2.1 and 2.2): the same global rows on any number of processes.

Every process walks one and the same stream of documents and keeps its own rows of each batch. Our choice: this costs
each host the tokenising of the whole stream (nothing, where token shards are read) and buys that a run's data do not
depend on the number of processes or workers, and that a cursor of two integers says where it stands.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama_jax.data.documents import EveryNth, Tokenise, in_order, mixed_in_order, tokens_per_document
from llama_jax.data.packing import Batch, Cursor, pack
from llama_jax.data.sources import SCHEMES, Documents, open_source
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Cursor",
    "DataConfig",
    "held_out_batches",
    "held_out_bytes",
    "held_out_documents",
    "make_batches",
    "own_rows",
    "training_documents",
]


@dataclass(frozen=True)
class DataConfig:
    """What to train on and what to keep for evaluation."""

    sources: tuple[str, ...] = ()
    """Where documents come from: text:GLOB, jsonl:GLOB, tfds:NAME[:SPLIT], hf:NAME[:SPLIT] or tokens:FOLDER."""
    weights: tuple[float, ...] = ()
    """Each source's share of the tokens, in any unit; empty: every document once an epoch."""
    held_out: float = 0.01
    """Fraction of each source's documents kept for evaluation, evenly spaced; 0 for none."""
    eval_sources: tuple[str, ...] = ()
    """Evaluate on these whole sources instead, and train on all documents of the others."""
    eval_documents: int = 1000
    """Evaluate on at most so many held-out documents, evenly spaced; 0 for all."""
    shuffle: bool = True
    """Give the documents in a random order, another one in each epoch."""
    workers: int = 0
    """Processes that tokenise; 0 to do it in the training process. The batches are the same."""
    prefetch: int = 2
    """Batches prepared ahead by a thread; 0 for none. The batches are the same."""


def make_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int,
    cursor: Cursor | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, Cursor]]:
    """Gives training batches without end, each with the cursor from which the batch after it can be made again.

    `rows` counts the global batch, of which this process gets its equal, contiguous share of rows, `length` tokens
    each. Raises UserError for bad sources, weights, or rows that the processes do not divide. Close the iterator
    (`.close()`) to stop its thread and workers.
    """
    own = own_rows(rows, process_index, process_count)
    period = _held_out_period(config)
    sources = _open(config.sources, tokenizer)
    if period and not config.eval_sources:
        sources = [_part(source, spec, period, held_out=False) for source, spec in _named(sources, config.sources)]
    shares = _document_shares(config.weights, sources, Tokenise(tokenizer))
    order = mixed_in_order(sources, shares, shuffle=config.shuffle, seed=seed)
    cursor = cursor or Cursor()
    documents = in_order(order, Tokenise(tokenizer), cursor.document, config.workers)
    some_text = _refuse_emptiness(documents, sum(map(len, sources)))
    batches = pack(some_text, rows=rows, length=length, own_rows=own, cursor=cursor)
    return _prefetched(batches, config.prefetch)


def training_documents(config: DataConfig) -> Iterator[str]:
    """Gives the texts of the documents that are trained on, once, source by source: what a tokenizer may learn from.

    Raises UserError for bad sources, and for token shards, which hold no text.
    """
    period = _held_out_period(config)
    for spec in config.sources:
        source = open_source(spec)
        if period and not config.eval_sources:
            source = _part(source, spec, period, held_out=False)
        yield from (source[i] for i in range(len(source)))


def held_out_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Gives the held-out documents once, in order, as batches like those of `make_batches`; the last one is padded.

    Every token but the BOS of each document is a target once. Each process gets equally many batches.
    """
    own = own_rows(rows, process_index, process_count)
    documents = map(Tokenise(tokenizer), _held_out(config, tokenizer))
    batches = pack(documents, rows=rows, length=length, own_rows=own)
    return (batch for batch, _ in batches)


def held_out_documents(config: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Gives the texts of the documents that `held_out_batches` packs, in the same order."""
    documents = _held_out(config, tokenizer)
    return (document if isinstance(document, str) else tokenizer.decode(document) for document in documents)


def held_out_bytes(config: DataConfig, tokenizer: Tokenizer) -> int:
    """Counts the UTF-8 bytes of the held-out documents.

    Bits per byte are the summed nats of all targets of `held_out_batches` / ln 2 / this; so they pay for every EOS.
    """
    return sum(len(text.encode()) for text in held_out_documents(config, tokenizer))


def _held_out(config: DataConfig, tokenizer: Tokenizer) -> Iterator[str | np.ndarray]:
    period = _held_out_period(config)
    if config.eval_sources:
        parts = _open(config.eval_sources, tokenizer)
    elif period:
        sources = _open(config.sources, tokenizer)
        parts = [_part(source, spec, period, held_out=True) for source, spec in _named(sources, config.sources)]
    else:
        raise UserError("No document is held out. Set --data.held-out above 0, or name --data.eval-sources.")
    total = sum(map(len, parts))
    chosen = min(total, config.eval_documents or total)
    ends = np.cumsum([len(part) for part in parts])

    def document(number: int) -> str | np.ndarray:
        part = int(np.searchsorted(ends, number, side="right"))
        return parts[part][number - int(ends[part]) + len(parts[part])]

    return map(document, (np.arange(chosen) * total // chosen).tolist())


def _open(specs: tuple[str, ...], tokenizer: Tokenizer) -> list[Documents]:
    if not specs:
        raise UserError(f"No data. Set --data.sources to SCHEME:NAME, with one of {', '.join(SCHEMES)}.")
    return [open_source(spec, tokenizer) for spec in specs]


def _named(sources: list[Documents], specs: tuple[str, ...]) -> Iterator[tuple[Documents, str]]:
    return zip(sources, specs, strict=True)


def _held_out_period(config: DataConfig) -> int:
    if not 0 <= config.held_out <= 0.5:
        raise UserError(f"--data.held-out {config.held_out} is no fraction of documents between 0 and 0.5.")
    return round(1 / config.held_out) if config.held_out else 0


def _part(source: Documents, spec: str, period: int, *, held_out: bool) -> EveryNth:
    if len(source) < 2:
        raise UserError(
            f"{spec} is a single document, which cannot be split into training and held-out ones. "
            "Set --data.held-out 0, or name --data.eval-sources."
        )
    return EveryNth(source, period, held_out=held_out)


def own_rows(rows: int, process_index: int, process_count: int) -> range:
    """This process's equal, contiguous share of a batch's rows; raises UserError if they cannot be shared equally."""
    if rows < 1 or rows % process_count:
        raise UserError(
            f"A batch of {rows} rows cannot be shared equally by {process_count} processes. "
            f"Use a multiple of {process_count}."
        )
    share = rows // process_count
    return range(process_index * share, (process_index + 1) * share)


def _document_shares(weights: tuple[float, ...], sources: list[Documents], tokenise: Tokenise) -> list[float]:
    """Turns shares of the tokens into shares of the documents: books are few and long, answers many and short."""
    if weights and len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} sources. Give --data.weights one number for each.")
    if any(not weight > 0 for weight in weights):
        raise UserError(f"Weights must be above 0, found {', '.join(map(str, weights))}. Leave out sources not wanted.")
    return [
        weight / tokens_per_document(source, tokenise) for weight, source in zip(weights, sources, strict=bool(weights))
    ]


def _refuse_emptiness(documents: Iterator[np.ndarray], epoch: int) -> Iterator[np.ndarray]:
    """Passes documents on; raises UserError after a whole epoch of empty ones, which would never fill a batch."""
    empty = 0
    for tokens in documents:
        empty = 0 if len(tokens) else empty + 1
        if empty > epoch:
            raise UserError(
                f"All {epoch} documents of the sources are empty. Check --data.sources and the field names."
            )
        yield tokens


def _prefetched(items: Iterator, ahead: int) -> Iterator:
    """Gives the items of an iterator that a thread keeps `ahead` of the reader; closing stops the thread."""
    if not ahead:
        yield from items
        return
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(entry: tuple) -> None:
        # Also ends with the program: a daemon thread instead would be killed inside C++ code, which aborts the process.
        while not stop.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Full):
                return ready.put(entry, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set() or not threading.main_thread().is_alive():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # to be raised where the reader stands
            put((None, error))

    thread = threading.Thread(target=work, name="llama_jax batches")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
