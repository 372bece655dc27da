"""Evaluation samples as they are verbalised, with the scores that models have on them (paper A.6), from JSON lines."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.data.files import Lines, whole_characters
from llama_jax.errors import UserError


@dataclass(frozen=True)
class Samples:
    """Evaluation samples of one benchmark or several, in the order of their file."""

    names: tuple[str, ...]
    """Their ids in the file."""
    benchmarks: tuple[str, ...]
    texts: tuple[str, ...]
    """As they are verbalised."""
    scores: dict[str, dict[str, float]]
    """By model, by id, 0 to 1, for all samples of a benchmark or none; the file's own are those of the model ""."""


def read_samples(path: str, scores: Sequence[str] = ()) -> Samples:
    """Reads the samples, and the files of scores for them.

    Raises:
      UserError: a file, a field or some of a benchmark's scores are missing, an id is there twice or not among the samples,
        or a score is none.
    """
    names, benchmarks, texts, own = [], [], [], {}
    for place, row in _rows(path, ("id", "text")):
        name, text, benchmark = str(row["id"]), row["text"], row.get("benchmark", _stem(path))
        if not isinstance(text, str) or not text.strip() or not isinstance(benchmark, str):
            raise UserError(f"{place()}: expected text that is not blank, and a benchmark's name if any; found {row}")
        names.append(name)
        texts.append(whole_characters(text))
        benchmarks.append(benchmark)
        if row.get("score") is not None:
            own[name] = _score(row["score"], place)
    if len(known := set(names)) < len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise UserError(f"{path}: the id {twice} is there twice; write the benchmark before it, as in mmlu-{twice}")
    by_model = {"": own} if own else {}
    for file in scores:
        model = _stem(file)
        if model in by_model:
            raise UserError(f"--scores: two files are called {model}, as which their model is reported; rename one")
        by_model[model] = {}
        for place, row in _rows(file, ("id", "score")):
            if (name := str(row["id"])) not in known:
                raise UserError(f"{place()}: the id {name} is not in {path}; expected scores of its samples")
            by_model[model][name] = _score(row["score"], place)
    for model, by_name in by_model.items():
        _check_whole(names, benchmarks, model, by_name)
    return Samples(tuple(names), tuple(benchmarks), tuple(texts), by_model)


def _check_whole(names: Sequence[str], benchmarks: Sequence[str], model: str, scores: dict[str, float]) -> None:
    """Raises UserError if a benchmark has scores for some of its samples and not for others."""
    begun = {benchmark for name, benchmark in zip(names, benchmarks, strict=True) if name in scores}
    for name, benchmark in zip(names, benchmarks, strict=True):
        if benchmark in begun and name not in scores:
            raise UserError(
                f"the sample {name} of {benchmark} has no score of {model or 'its own'}, and others have; a benchmark has "
                "scores for all its samples or for none"
            )


def _rows(path: str, fields: Sequence[str]) -> Iterator[tuple[Callable[[], str], dict[str, Any]]]:
    if not Path(path).is_file():
        raise UserError(f"{path} is no file; expected JSON lines with {' and '.join(fields)}")
    lines = Lines(str(path))
    for number in range(len(lines)):
        place = functools.partial(lines.place, number)
        try:
            row = json.loads(lines[number])
        except ValueError as error:
            raise UserError(f"{place()} is not JSON ({error}); repair or remove the line") from None
        if not isinstance(row, dict) or not all(field in row for field in fields):
            found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{place()} holds {found or 'nothing'}; expected the fields {' and '.join(fields)}")
        yield place, row


def _stem(path: str) -> str:
    return re.sub(r"(\.jsonl?)?(\.gz|\.zst)?$", "", Path(path).name)


def _score(value: Any, place: Callable[[], str]) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise UserError(f"{place()}: the score is {value!r}; expected a number from 0 to 1 (percentages over 100)")
    return float(value)
