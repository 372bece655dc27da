"""The public files of the safety benchmarks, read row by row with their places, so that a bad row can be named."""

import csv
import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.data.files import whole_characters
from llama_jax.errors import UserError


class Row(NamedTuple):
    """The fields of a row, and where it stands."""

    fields: dict[str, Any]
    place: str

    def text(self, *names: str) -> str:
        """The text in the first of these fields that the row has.

        Raises:
          UserError: it has none of them, or there is no text in it.
        """
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            found = ", ".join(map(str, self.fields)) or "(none)"
            raise UserError(f"{self.place} has the fields {found}; expected {' or '.join(names)}")
        return text_at(self.place, name, self.fields[name])


def text_at(place: str, name: str, value: Any) -> str:
    """A value that must be text with something in it. Raises UserError."""
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{place}: {name} is {found}, expected text")
    return whole_characters(value)


def files_of(patterns: Sequence[str], flag: str) -> list[Path]:
    """The files of these names and globs, in order; those of one glob by name.

    Raises:
      UserError: one matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            hint = f"; it is a folder: name {pattern.rstrip('/')}/*" if Path(pattern).is_dir() else ""
            raise UserError(f"{flag} {pattern}: no such file{hint}")
        found |= dict.fromkeys(paths)
    return list(found)


def read_text(path: Path) -> str:
    """A whole UTF-8 file. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from error


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .csv file with a header, a .json file that is one list, or JSON lines.

    Raises:
      UserError: the file cannot be read, or a row is no object.
    """
    content = read_text(path)
    if path.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(content, newline="")), start=1):
            yield Row(row, f"{path}, row {number}")
        return
    if path.suffix == ".json":
        rows = _json(content, str(path))
        if not isinstance(rows, list):
            raise UserError(f"{path} holds a JSON {type(rows).__name__}, expected a list of rows")
        places = [(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    else:
        lines = [(line, f"{path}, line {number}") for number, line in enumerate(content.split("\n"), start=1)]
        places = [(_json(line, place), place) for line, place in lines if line.strip()]
    for row, place in places:
        if not isinstance(row, dict):
            raise UserError(f"{place} is a JSON {type(row).__name__}, expected an object")
        yield Row(row, place)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error})") from error
