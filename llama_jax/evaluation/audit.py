"""Audits a corpus (paper 4.1): counts all its documents on several processes, goes on where it stopped, writes the tables.

What is kept are counts. Memory does not grow with the corpus but for its index, 16 bytes for a document of a file.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from llama_jax.data.audit import AuditConfig, Auditor, Counts, count_part, part_counter, start_worker
from llama_jax.data.sources import Documents, open_source
from llama_jax.errors import UserError
from llama_jax.evaluation.audit_tables import as_page, as_results
from llama_jax.training.metrics import format_duration
from llama_jax.training.run_folder import differences, write_whole

COUNTS, RESULTS, PAGE = "counts.json", "audit.json", "audit.md"
PART = 256
"""Documents that are counted together."""
_SECONDS_BETWEEN_SAVES = 10
_WAITING_PER_WORKER = 4

Part = tuple[int, int, int]
"""The number of a source, and of its first and last document (exclusive)."""


def audit(
    sources: Sequence[str],
    out: str | Path,
    config: AuditConfig,
    *,
    limit: int | None = None,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Counts the documents of sources, and writes audit.json and audit.md with the paper's values beside ours.

    Started again it goes on where it was stopped. The results depend neither on that nor on the number of workers.

    Args:
      sources: as `open_source` takes them, of text.
      out: the folder to write; counts.json in it holds how far the audit is.
      config: what is counted.
      limit: the number of documents, from the first on; all if none.
      workers: processes that count; none, and this one does.
      say: what is done with lines about the progress.

    Returns:
      What audit.json holds.

    Raises:
      UserError: a source, model or setting cannot be used, a document cannot be read, or `out` holds another audit.
    """
    _check(sources, config, limit, workers)
    opened = [open_source(spec) for spec in sources]
    lengths = [len(source) for source in opened]
    total = min(sum(lengths), limit or sum(lengths))
    auditor = Auditor(config)  # also where workers load their own, to find here what cannot be loaded
    recipe = json.loads(json.dumps({"sources": sources, "documents": total, **dataclasses.asdict(config)}))
    folder = Path(out)
    counts = _earlier(folder / COUNTS, recipe)
    _save(folder / COUNTS, recipe, counts)  # also to find here that it cannot be written
    parts = list_parts(lengths, counts.documents, total)
    counted = _on_workers(opened, config, parts, workers) if workers else _here(opened, auditor, parts)
    counts = _add_up(counted, counts, recipe, folder / COUNTS, say)
    results = as_results(counts, recipe)
    _write(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _write(folder / PAGE, as_page(results))
    return results


def list_parts(lengths: Sequence[int], start: int, stop: int) -> Iterator[Part]:
    """Gives the parts that hold the documents from number `start` to `stop` (exclusive), in order.

    Args:
      lengths: the documents of each source; they are numbered through all sources.
      start: the first.
      stop: the last, exclusive.
    """
    before = 0
    for source, length in enumerate(lengths):
        last = min(stop - before, length)
        for first in range(max(start - before, 0), last, PART):
            yield source, first, min(first + PART, last)
        before += length


def _check(sources: Sequence[str], config: AuditConfig, limit: int | None, workers: int) -> None:
    if not sources:
        raise UserError("no source given; name at least one, such as text:corpus.txt")
    if shards := [spec for spec in sources if spec.startswith("tokens:")]:
        raise UserError(f"{shards[0]} holds ids, and an audit reads text; name the text they were made from")
    if not 0 < config.sample <= 1:
        raise UserError(f"--sample {config.sample} is no share of documents; expected one above 0 and up to 1")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} is no number of documents; expected 1 or more")
    if workers < 0:
        raise UserError(f"--workers {workers} is no number of processes; expected 0 or more")


def _earlier(path: Path, recipe: dict[str, Any]) -> Counts:
    """What an earlier audit with this recipe counted."""
    try:
        found = json.loads(path.read_bytes())
        was, counts = found["recipe"], Counts.from_json(found["counts"])
    except (FileNotFoundError, NotADirectoryError):
        return Counts()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it or name another --out") from None
    if counts.documents and (changes := differences(was, recipe)):
        raise UserError(
            f"{path.parent} holds an audit with other settings:\n"
            + "\n".join(f"  {name}: {old!r:.100} there, {new!r:.100} here" for name, old, new in changes)
            + "\nrestore these to go on with it, or name another --out"
        )
    return counts


def _here(sources: Sequence[Documents], auditor: Auditor, parts: Iterator[Part]) -> Iterator[Counts]:
    counter = part_counter(sources, auditor)
    return (counter(*part) for part in parts)


def _on_workers(
    sources: Sequence[Documents], config: AuditConfig, parts: Iterator[Part], workers: int
) -> Iterator[Counts]:
    """Gives the counts of all parts in their order, a few of them counted ahead."""
    # Spawned: a fork would carry over half of what the threads of libraries hold.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(sources, config)
    )
    waiting: deque = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(count_part, *part))
            if len(waiting) == workers * _WAITING_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended, perhaps for want of memory; start the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _add_up(
    counted: Iterator[Counts], counts: Counts, recipe: dict[str, Any], path: Path, say: Callable[[str], None]
) -> Counts:
    """Adds the counts of parts to earlier ones, saves the sum now and then and however this ends, and says how far it is."""
    total, before, began = recipe["documents"], counts.documents, time.monotonic()
    saved = began
    try:
        with contextlib.closing(counted):
            for part in counted:
                counts += part
                now = time.monotonic()
                if now - saved >= _SECONDS_BETWEEN_SAVES:
                    saved = now
                    _save(path, recipe, counts)
                    rate = (counts.documents - before) / (now - began)
                    eta = format_duration((total - counts.documents) / rate)
                    done = f"{counts.documents}/{total} documents {counts.documents / total:.1%}"
                    say(f"{done} {rate:.0f} documents/s eta {eta}")
    finally:
        _save(path, recipe, counts)
    if done := counts.documents - before:
        seconds = time.monotonic() - began
        say(f"{done} documents in {format_duration(seconds)}, {done / seconds:.0f} documents/s")
    return counts


def _save(path: Path, recipe: dict[str, Any], counts: Counts) -> None:
    _write(path, json.dumps({"recipe": recipe, "counts": counts.as_json()}))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(
            f"--out {path.parent} cannot be written to ({error.strerror}); name another with --out"
        ) from error
