"""What was measured beside what the paper prints: shares and means with their 95% intervals, as tables."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.evaluation.intervals import Z, wilson
from llama_jax.evaluation.report import table
from llama_jax.evaluation.safety_paper_values import PaperModel


@dataclass(frozen=True)
class Line:
    """One number with its interval."""

    name: str
    n: int
    """On how many answers it rests."""
    value: float | None
    """None where there are none."""
    low: float | None = None
    high: float | None = None
    """The 95% interval; None where it cannot be told."""
    paper: float | None = None
    """None where the paper has none."""


@dataclass(frozen=True)
class Comparison:
    """Lines of one unit, beside those of one of the paper's models."""

    title: str
    unit: str
    digits: int
    """Behind the point, as the paper prints them."""
    paper_model: PaperModel
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    """What must be known to read it."""

    def markdown(self) -> str:
        """The table under its title, with its notes."""
        header = ("", "n", self.unit, "95% interval", f"paper, {self.paper_model}", "difference")
        rows = [self._cells(line) for line in self.lines]
        notes = [f"- {note}" for note in self.notes]
        return "\n\n".join([f"## {self.title}", table(header, rows), *(["\n".join(notes)] if notes else [])])

    def as_json(self) -> dict[str, Any]:
        """The same, unrounded, for a program."""
        return dataclasses.asdict(self) | {"paper_model": str(self.paper_model)}

    def _cells(self, line: Line) -> tuple[str, ...]:
        def shown(number: float | None, sign: str = "") -> str:
            return "" if number is None else f"{number:{sign}.{self.digits}f}"

        interval = "" if line.low is None else f"{shown(line.low)} to {shown(line.high)}"
        both = line.value is not None and line.paper is not None
        difference = shown(line.value - line.paper, "+") if both else ""
        return line.name, f"{line.n:,}", shown(line.value), interval, shown(line.paper), difference


def percent_line(name: str, hits: Sequence[bool], paper: float | None = None) -> Line:
    """Which percentage of answers is what they are asked about."""
    n, count = len(hits), sum(map(bool, hits))
    if not n:
        return Line(name, 0, None, paper=paper)
    low, high = wilson(count, n)
    return Line(name, n, 100 * count / n, 100 * low, 100 * high, paper)


def mean_line(name: str, values: Sequence[float], paper: float | None = None) -> Line:
    """The mean of numbers, with 1.96 standard errors to either side."""
    n = len(values)
    if n < 2:
        return Line(name, n, values[0] if n else None, paper=paper)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Line(name, n, mean, mean - Z * error, mean + Z * error, paper)


def mean_over(name: str, groups: Sequence[Line], paper: float | None = None) -> Line:
    """The mean of lines that have a value, each with the same weight whatever its n.

    Its interval is put together from theirs: the distances from value to limit add up as independent errors do, each side
    by itself (Zou and Donner 2008), so that it has a width where all shares are 0 too.
    """
    known = [line for line in groups if line.value is not None]
    n = sum(line.n for line in known)
    if not known:
        return Line(name, 0, None, paper=paper)
    mean = math.fsum(line.value for line in known) / len(known)
    if any(line.low is None for line in known):
        return Line(name, n, mean, paper=paper)
    below = math.sqrt(math.fsum((line.value - line.low) ** 2 for line in known)) / len(known)
    above = math.sqrt(math.fsum((line.high - line.value) ** 2 for line in known)) / len(known)
    return Line(name, n, mean, mean - below, mean + above, paper)
