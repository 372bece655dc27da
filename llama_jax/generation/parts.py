"""Sampling for many prompts, part by part: a part is saved when it is whole, so that a run that was stopped goes on."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.samples import as_line
from llama_jax.errors import Preempted
from llama_jax.training.metrics import format_duration, say
from llama_jax.training.preemption import StopSignal
from llama_jax.training.run_folder import write_whole

_SECONDS_BETWEEN_LINES = 10


def parts_of(count: int, answers: int, batch: int) -> list[range]:
    """The numbers of `count` prompts that are saved together, so that a part's answers about fill a batch.

    Args:
      count: of prompts.
      answers: to each prompt.
      batch: answers that are drawn side by side.
    """
    fitting = max(1, batch // answers)
    size = 1 << (fitting.bit_length() - 1)  # what `reply_to` fills a batch up to
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def part_file(folder: str | Path, part: range) -> Path:
    """Where a part of a run is saved."""
    return Path(folder) / "samples" / f"{part.start:08}.jsonl"


def make_parts(
    folder: str | Path,
    missing: Sequence[range],
    count: int,
    make: Callable[[range], Iterable[dict[str, Any]]],
    answers_in: Callable[[range], int],
) -> None:
    """Makes and saves parts, a row for each prompt, and says how far it is.

    Args:
      folder: of the run.
      missing: the parts.
      count: of prompts in all, with those that are saved already.
      make: gives the rows of a part.
      answers_in: how many answers are drawn for a part.

    Raises:
      Preempted: told to stop; the parts that are whole are saved.
    """
    saved, done, began = count - sum(map(len, missing)), 0, time.monotonic()
    later, said = sum(map(answers_in, missing)), began
    with StopSignal() as stop:
        for part in missing:
            write_whole(part_file(folder, part), "".join(map(as_line, make(part))).encode())
            saved, done = saved + len(part), done + answers_in(part)
            now = time.monotonic()
            if now - said > _SECONDS_BETWEEN_LINES:
                said, rate = now, max(done, 1) / (now - began)
                say(
                    f"{saved}/{count} prompts saved, {rate:.1f} samples/s, eta {format_duration((later - done) / rate)}"
                )
            if name := stop.received(saved):
                raise Preempted(f"{name} received: {saved} of {count} prompts are saved; start it again to go on")
    say(f"{done} samples in {format_duration(time.monotonic() - began)}")


def complete(
    folder: str | Path, parts: Sequence[range], name: str, make_missing: Callable[[list[range]], None]
) -> None:
    """Writes all parts into one file, unless it is there, and first makes those that are missing.

    Args:
      folder: of the run.
      parts: all of them.
      name: of the file.
      make_missing: makes and saves parts, as `make_parts` does; called if there are any to make.
    """
    if (path := Path(folder) / name).exists():
        return
    files = [part_file(folder, part) for part in parts]
    if missing := [part for part, file in zip(parts, files, strict=True) if not file.exists()]:
        make_missing(missing)
    write_whole(path, b"".join(file.read_bytes() for file in files))


def remove_parts(folder: str | Path, parts: Sequence[range]) -> None:
    """Removes the parts' own files, where they are still there."""
    for part in parts:
        part_file(folder, part).unlink(missing_ok=True)
