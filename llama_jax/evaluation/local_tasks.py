"""Benchmarks in files: jsonl in the shapes that benchmarks are published in, and MMLU's csv, as tasks for lm-eval.

A row is recognised by its columns. Without a file of examples, the first rows are the examples and are not asked: an example
that is asked would hold its own answer.
"""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llama_jax.data.dialogues import open_rows
from llama_jax.errors import UserError
from llama_jax.evaluation.local_grading import KINDS
from llama_jax.text.chat import BadDialogue

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One way to write a question down."""

    columns: tuple[str, ...]
    """That a row has, whatever else it has."""
    to_row: Callable[[Row], Row | list[Row]]
    """Gives the row as lm-eval shall see it: of a choice query, choices and gold; of an answer query, answers and target.
    A row that holds several questions gives one for each."""
    kind: str
    """choice, beginnings, answer, words, number, boxed, last word or text."""
    mark: str = ""
    """What the answer's text holds besides."""

    def fits(self, row: Row) -> bool:
        """Whether a row has its columns."""
        return all(column in row for column in self.columns) and self.mark in str(row.get("answer", ""))


def _choice(row: Row) -> Row:
    return {"query": row["query"], "choices": row["choices"], "gold": int(row["gold"])}


def _truthful(row: Row) -> Row:
    texts, marks = zip(*row["mc1_targets"].items(), strict=True)
    return {"query": f"Q: {row['question']}\nA:", "choices": list(texts), "gold": marks.index(1)}


def _lettered(row: Row) -> Row:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, row["choices"], strict=False))
    letters = list(ascii_uppercase[: len(row["choices"])])
    gold = row["answer"] if isinstance(row["answer"], int) else letters.index(row["answer"])
    return {"query": f"{row['question'].strip()}\n{listed}\nAnswer:", "choices": letters, "gold": gold}


def _beginnings(row: Row) -> Row:
    return {"beginnings": row["context_options"], "ending": " " + row["continuation"], "gold": int(row["gold"])}


def _aliased(row: Row) -> Row:
    return {"query": row["context"], "answers": [row["answer"], *row["aliases"]], "target": row["answer"]}


def _question(row: Row) -> Row:
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return {"query": f"Q: {row['question']}\nA:", "answers": answers, "target": answers[0]}


def _reasoned(row: Row) -> Row:
    steps, number = row["answer"].rsplit("####", 1)
    steps, number = re.sub(r"<<.*?>>", "", steps).strip(), number.strip()
    return {
        "query": f"Q: {row['question']}\nA:",
        "answers": [number],
        "target": f"{' '.join(steps.split())} The answer is {number}.",
    }


def _mathematics(row: Row) -> Row:
    return {
        "query": f"Problem:\n{row['context']}\n\nSolution:",
        "answers": [row["answer"]],
        "target": row["chain_of_thought"],
    }


def _written(number: Any) -> str:
    """A number as people write it: every digit, and none behind the point where it is whole."""
    return str(int(number)) if float(number).is_integer() else str(float(number))


def _word_problem(row: Row) -> Row:
    number = _written(row["Answer"])
    return {
        "query": f"Q: {row['Body']} {row['Question']}\nA:",
        "answers": [number],
        "target": f"The answer is {number}.",
    }


def _solved(row: Row) -> Row:
    number = _written(row["lSolutions"][0])
    return {"query": f"Q: {row['sQuestion']}\nA:", "answers": [number], "target": f"The answer is {number}."}


def _conversation(row: Row) -> list[Row]:
    """QuAC: questions about a text, one after another, each behind those before it with their answers.

    Our choice, as the paper does not show its prompt.
    """
    shown = f"{row['background']}\n\n{row['section_title']}\n{row['context']}\n\n"
    asked = []
    for question, answers in zip(row["questions"], row["answers"]["texts"], strict=True):
        shown += f"Q: {question}\nA:"
        asked.append({"query": shown, "answers": list(answers), "target": answers[0]})
        shown += f" {answers[0]}\n\n"
    return asked


def _target(row: Row) -> Row:
    return {"query": f"Q: {row['input']}\nA:", "answers": [row["target"]], "target": row["target"]}


def _last_word(row: Row) -> Row:
    return {"query": row["context"], "ending": " " + row["continuation"]}


def _text(row: Row) -> Row:
    return {"text": row["text"]}


# The first whose columns a row has is taken, so those with more columns stand before those with fewer.
SHAPES = (
    Shape(("query", "choices", "gold"), _choice, "choice"),
    Shape(("question", "mc1_targets"), _truthful, "choice"),
    Shape(("question", "choices", "answer"), _lettered, "choice"),
    Shape(("context_options", "continuation", "gold"), _beginnings, "beginnings"),
    Shape(("background", "section_title", "context", "questions", "answers"), _conversation, "words"),
    Shape(("context", "answer", "chain_of_thought"), _mathematics, "boxed"),
    Shape(("context", "answer", "aliases"), _aliased, "answer"),
    Shape(("Body", "Question", "Answer"), _word_problem, "number"),
    Shape(("question", "answer"), _reasoned, "number", "####"),
    Shape(("question", "answer"), _question, "answer"),
    Shape(("input", "target"), _target, "answer"),
    Shape(("sQuestion", "lSolutions"), _solved, "number"),
    Shape(("context", "continuation"), _last_word, "last word"),
    Shape(("text",), _text, "text"),
)


@dataclass(frozen=True)
class LocalRows:
    """A benchmark in files: what is asked and what the examples are taken from, as the files have it."""

    path: str
    asked: list[Row]
    shown: list[Row]
    is_split: bool
    """Whether the examples are the first rows of the asked file, held out."""

    def whole(self) -> "LocalRows":
        """With nothing held out, for a task that brings examples of its own."""
        return LocalRows(self.path, self.shown + self.asked if self.is_split else self.asked, [], False)


def read_local(name: str, path: str, examples: str | None, shots: int) -> LocalRows:
    """Reads a benchmark.

    Args:
      name: of the benchmark.
      path: the file that is asked.
      examples: the file that examples are taken from; the asked file's first rows if none.
      shots: examples before each question.

    Raises:
      UserError: a file is missing or empty, or has too few rows for the examples.
    """
    asked = read_rows(path)
    shown = read_rows(examples) if examples is not None else asked[:shots]
    asked = asked if examples is not None else asked[shots:]
    if len(shown) < shots or not asked:
        raise UserError(
            f"{examples or path} has {len(shown)} rows for {shots} examples and {path} {len(asked)} to ask; "
            f"give fewer --shots, or a file of examples: --files {name}={path},EXAMPLES"
        )
    return LocalRows(path, asked, shown, examples is None and shots > 0)


def published_task(rows: LocalRows, name: str, yaml_path: Path, folder: Path) -> Path:
    """A task of lm-eval that reads these rows instead of the hub's, as a YAML file; rows have the hub's columns.

    Args:
      rows: of the benchmark.
      name: of the new task.
      yaml_path: the task's own definition.
      folder: where the file, and the rows beside it, are written.
    """
    files = {}
    for split, of_split in (("asked", rows.asked), ("examples", rows.shown)):
        files[split] = str(folder / f"{name}.{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in of_split or rows.asked[:1]))
    config = {
        "include": str(yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": "examples",
        "validation_split": None,
        "test_split": "asked",
        "fewshot_split": "examples",
    }
    written = folder / f"{name}.yaml"
    written.write_text(json.dumps(config))  # which is YAML too
    return written


def shaped_task(rows: LocalRows, name: str, shots: int) -> dict[str, Any]:
    """Rows of one of the `SHAPES` as the config of a task of lm-eval.

    Raises:
      UserError: a row is of no shape, or of another than the first.
    """
    shape = shape_of(rows.asked[0], rows.path)
    asked, shown = (
        [one for number, row in enumerate(part, 1) for one in _converted(shape, row, rows.path, number)]
        for part in (rows.asked, rows.shown)
    )
    return task_of(name, shape.kind, asked, shown, shots)


def task_of(name: str, kind: str, asked: list[Row], shown: list[Row], shots: int) -> dict[str, Any]:
    """The config of a task of lm-eval over rows of a kind; see `Shape`."""
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"asked": as_dataset(asked), "examples": as_dataset(shown)},
        "test_split": "asked",
        "num_fewshot": shots,
        "metadata": {"version": 1},
    }
    if shots:
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    return config | KINDS[kind]


def read_rows(source: str) -> list[Row]:
    """The rows of JSON lines (.gz and .zst too), of hf:NAME or tfds:NAME, or of MMLU's csv: question, four choices, letter; no header.

    Raises:
      UserError: there is no such source, or it is not of these kinds, or empty.
    """
    if source.endswith(".csv"):
        if not Path(source).is_file():
            raise UserError(f"no file {source}; expected a benchmark: --files NAME=FILE")
        with Path(source).open(newline="") as file:
            lines = list(csv.reader(file))
        if any(len(line) < 3 for line in lines):
            raise UserError(f"{source} is not MMLU's csv: question, choices, letter, and no header")
        rows = [{"question": line[0], "choices": line[1:-1], "answer": line[-1]} for line in lines]
    else:
        try:
            opened = open_rows(source)
            rows = [opened[index] for index in range(len(opened))]
        except (UserError, BadDialogue) as error:
            reason = str(error).removesuffix(" Check --data.sources.").rstrip(".")
            raise UserError(
                f"--files {source}: {reason}; expected a benchmark as FILE.jsonl, FILE.csv, hf:NAME or tfds:NAME"
            ) from None
    if not rows:
        raise UserError(f"{source} holds no rows")
    return rows


def shape_of(row: Row, path: str) -> Shape:
    """The shape of a file's rows, by the columns of the first.

    Raises:
      UserError: no shape has such columns.
    """
    for shape in SHAPES:
        if shape.fits(row):
            return shape
    known = "; ".join(", ".join(shape.columns) for shape in SHAPES)
    raise UserError(f"{path} has the columns {', '.join(row)}; expected those of one of these: {known}")


def as_dataset(rows: Sequence[Row]) -> Any:
    """Rows as lm-eval reads them."""
    import datasets

    return datasets.Dataset.from_list(list(rows))


def _converted(shape: Shape, row: Row, path: str, number: int) -> list[Row]:
    if missing := [column for column in shape.columns if column not in row]:
        raise UserError(f"row {number} of {path} has no {', '.join(missing)}; its rows began with them")
    try:
        converted = shape.to_row(row)
        return converted if isinstance(converted, list) else [converted]
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"row {number} of {path} is not as its columns promise ({error})") from None
