"""Answers that are written down as they come, so that an evaluation which was stopped goes on where it was.

The file's first line says what decides the answers; each further line is one question with its answer, in the order in which
they were asked: {"number": 3, "question": ..., "answer": ...}.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import Preempted, UserError
from llama_jax.training.metrics import format_duration, say
from llama_jax.training.preemption import StopSignal
from llama_jax.training.run_folder import differences, digest_of, write_whole

_SECONDS_BETWEEN_LINES = 10


def ask_all(
    path: Path,
    recipe: dict[str, Any],
    questions: Sequence[Any],
    ask: Callable[[list[Any]], Sequence[Any]],
    *,
    batch: int,
) -> list[Any]:
    """The answers to all questions, in their order; those that the file has already are not asked for again.

    The longest questions are asked first: those of a batch are of like length, and what does not fit the memory is known
    at once.

    Args:
      path: of the file; it is created if it is not there.
      recipe: what decides the answers beside the questions: the model, its settings.
      questions: of any kind that JSON can hold.
      ask: answers a batch of them; an answer depends on its own question alone, and is of a kind that JSON can hold.
      batch: questions that are asked together.

    Raises:
      UserError: the file was begun with other questions or another recipe, or is none of these.
      Preempted: told to stop; what was answered is kept.
    """
    recipe = json.loads(json.dumps(recipe | {"questions": digest_of(questions)}))
    answers = _read(path, recipe)
    missing = sorted(set(range(len(questions))) - answers.keys(), key=lambda i: (-len(json.dumps(questions[i])), i))
    if answers and missing:
        say(f"{path.stem}: {len(answers)} of {len(questions)} were answered before; going on with {path}")
    began = said = time.monotonic()
    with StopSignal() as stop, path.open("a", encoding="utf-8") as file:
        for first in range(0, len(missing), batch):
            numbers = missing[first : first + batch]
            for i, answer in zip(numbers, ask([questions[i] for i in numbers]), strict=True):
                answers[i] = answer
                file.write(_line({"number": i, "question": questions[i], "answer": answer}))
            file.flush()
            now, done = time.monotonic(), first + len(numbers)
            if now - said > _SECONDS_BETWEEN_LINES:
                said, eta = now, (now - began) / done * (len(missing) - done)
                say(f"{path.stem}: {len(answers)}/{len(questions)} answered, eta {format_duration(eta)}")
            if (name := stop.received(len(answers))) and done < len(missing):
                raise Preempted(f"{name} received: {len(answers)} answers are in {path}; start it again to go on")
    return [answers[i] for i in range(len(questions))]


def _read(path: Path, recipe: dict[str, Any]) -> dict[int, Any]:
    """The answers in a file, by number; it is begun where it is missing, and loses a last line that was cut off."""
    if not path.exists():
        write_whole(path, _line({"recipe": recipe}).encode())
        return {}
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    try:
        begun, *rows = map(json.loads, whole.split("\n")[:-1])  # a text may hold other line ends
        was, answers = begun["recipe"], {row["number"]: row["answer"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no answers ({error}); remove it, or name another --out") from error
    if changes := differences(was, recipe):
        raise UserError(
            f"the answers in {path} were begun with another recipe:\n"
            + "\n".join(f"  {name}: {before} there, {now} here" for name, before, now in changes)
            + "\nrestore these values to go on with them, or name another --out"
        )
    if whole != content:
        write_whole(path, whole.encode())
    return answers


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
