"""A corpus larger than memory, searched for evaluation samples in shards (paper A.6), by one process, by many, or on Apache Beam.

A shard is a stretch of a source's documents. What one gives is small and does not depend on the others, so that shards may be
searched in any order, anywhere and again, and are joined by the maximum.
"""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from llama_jax.data.sources import Documents, open_source
from llama_jax.errors import UserError
from llama_jax.evaluation.contamination_matches import index_samples, longest_matches
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shard:
    """Some documents of the corpus."""

    number: int
    """Of the shard."""
    source: int
    """Number of the source."""
    first: int
    """Number of the first document in the source."""
    last: int
    """That of the last, exclusive."""


@dataclass(frozen=True)
class Found:
    """What some shards hold of the samples."""

    shards: tuple[int, ...]
    """Their numbers."""
    documents: int
    tokens: int
    places: np.ndarray
    """int64, ascending: tokens, of all samples, at which a match begins."""
    lengths: np.ndarray
    """int32: of the longest match that begins there."""


class Search:
    """Searches a shard. Pickles, documents and all, for other processes."""

    def __init__(self, samples: Sequence[np.ndarray], sources: Sequence[str], tokenizer: Tokenizer):
        """Indexes the samples' ids and opens the sources; raises UserError for one that cannot be opened."""
        self.index, self._tokenizer = index_samples(samples), tokenizer
        self.documents = [open_source(spec, tokenizer) for spec in sources]

    def __call__(self, shard: Shard) -> Found:
        """Raises UserError for a document that cannot be read."""
        tokens = 0

        def ids() -> Iterator[np.ndarray]:
            nonlocal tokens
            for number in range(shard.first, shard.last):
                one = self._ids(self.documents[shard.source], number)
                tokens += len(one)
                yield one

        longest = longest_matches(self.index, ids())
        places = np.flatnonzero(longest)
        return Found((shard.number,), shard.last - shard.first, tokens, places, longest[places])

    def _ids(self, documents: Documents, number: int) -> np.ndarray:
        document = documents[number]
        if isinstance(document, np.ndarray):
            return document
        return np.array(self._tokenizer.encode(document, bos=False), np.uint32)


def join(found: Iterable[Found]) -> Found:
    """What several shards, or none, hold together."""
    parts = [Found((), 0, 0, np.zeros(0, np.int64), np.zeros(0, np.int32)), *found]
    places, which = np.unique(np.concatenate([part.places for part in parts]), return_inverse=True)
    lengths = np.zeros(len(places), np.int32)
    np.maximum.at(lengths, which, np.concatenate([part.lengths for part in parts]))
    return Found(
        tuple(sorted({number for part in parts for number in part.shards})),
        sum(part.documents for part in parts),
        sum(part.tokens for part in parts),
        places,
        lengths,
    )


def search_here(search: Search, shards: Sequence[Shard]) -> Iterator[Found]:
    """Searches shards in this process, one after another."""
    return map(search, shards)


def search_in_processes(search: Search, shards: Sequence[Shard], workers: int) -> Iterator[Found]:
    """Searches shards in so many processes of this machine, and gives each shard's as it comes.

    Raises:
      UserError: a document cannot be read, or a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    processes = {}
    try:
        for worker in range(min(workers, len(shards))):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(search, shards[worker::workers], writer), daemon=True)
            process.start()
            writer.close()  # so that the reader sees the end when the process, the only one that writes, is gone
            processes[reader] = process
        yield from _received(dict(processes))
    finally:
        for process in processes.values():
            process.terminate()


def _received(processes: dict[Connection, multiprocessing.Process]) -> Iterator[Found]:
    while processes:
        for reader in wait(list(processes)):
            try:
                message = reader.recv()
            except EOFError:
                process = processes.pop(reader)
                process.join()
                if process.exitcode:
                    raise UserError(
                        f"a process that searches the corpus ended with {process.exitcode}; if nothing is said above, it was "
                        "killed, perhaps for want of memory. What is done is kept: start the same command with fewer --workers"
                    ) from None
                continue
            if isinstance(message, UserError):
                raise message
            yield message


def _work(search: Search, shards: Sequence[Shard], writer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is told too, and ends it
    try:
        for shard in shards:
            writer.send(search(shard))
    except UserError as error:
        writer.send(error)
    except BrokenPipeError:
        pass  # the process that wanted to know is gone


def search_on_beam(
    make_search: Callable[[], Search], shards: Sequence[Shard], path: Path, options: Sequence[str]
) -> Iterator[Found]:
    """Searches shards in an Apache Beam pipeline, and gives what they hold together.

    Args:
      make_search: makes the search on each worker, from files that it can read; it has to pickle small.
      shards: of the corpus.
      path: of a file that workers can write and this process can read; it does not stay.
      options: of the pipeline, such as --runner=DirectRunner.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--beam needs a package: pip install apache-beam") from None

    class SearchShard(beam.DoFn):
        def setup(self):
            self.search = make_search()

        def process(self, shard):
            yield self.search(shard)

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        found = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.ParDo(SearchShard())
        found | beam.CombineGlobally(join) | beam.Map(lambda together: path.write_bytes(pickle.dumps(together)))
    yield pickle.loads(path.read_bytes())
    path.unlink()
