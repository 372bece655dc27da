"""HumanEval (0-shot) and MBPP (3-shot), the paper's code benchmarks (2.3, A.2.2), in their public files: prompts and programs.

What a model writes after a prompt is cut where the benchmark stops it, and becomes a program with tests for `code_execution`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.data.files import Lines
from llama_jax.errors import UserError
from llama_jax.evaluation.code_execution import Program

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # arXiv 2107.03374: where the function is over
MBPP_STOPS = ("[DONE]",)
MBPP_SHOTS, MBPP_QUESTIONS = (2, 3, 4), range(11, 511)  # task_ids of the prompt's examples, and of what is tested


@dataclass(frozen=True)
class HumanEvalProblem:
    """A line of HumanEval.jsonl."""

    task_id: str
    prompt: str
    """A function's head with its docstring: what the model continues."""
    entry_point: str
    """The function's name."""
    canonical_solution: str
    test: str
    """Defines check(candidate)."""


@dataclass(frozen=True)
class MbppProblem:
    """A line of mbpp.jsonl."""

    task_id: int
    text: str
    code: str
    test_setup_code: str
    test_list: tuple[str, ...]


def read_humaneval(path: str) -> tuple[HumanEvalProblem, ...]:
    """Reads problems in the form of HumanEval.jsonl; plain, .gz or .zst.

    Raises:
      UserError: no such file, or a line of another form.
    """
    return tuple(HumanEvalProblem(**fields) for fields in _read(path, HumanEvalProblem))


def read_mbpp(path: str) -> tuple[MbppProblem, ...]:
    """Reads problems in the form of mbpp.jsonl; plain, .gz or .zst.

    Raises:
      UserError: no such file, or a line of another form.
    """
    return tuple(
        MbppProblem(**fields | {"test_list": tuple(fields["test_list"])}) for fields in _read(path, MbppProblem)
    )


def humaneval_program(problem: HumanEvalProblem, completion: str) -> Program:
    """The program that a completion of the prompt makes, with the problem's tests."""
    function = problem.prompt + cut(completion, HUMANEVAL_STOPS)
    return Program(function, f"{problem.test}\ncheck({problem.entry_point})\n")


def mbpp_shots(problems: Sequence[MbppProblem]) -> tuple[MbppProblem, ...]:
    """The three problems that the benchmark's authors show with their solutions.

    Raises:
      UserError: they are not among the problems.
    """
    by_id = {problem.task_id: problem for problem in problems}
    if missing := [one for one in MBPP_SHOTS if one not in by_id]:
        raise UserError(
            f"MBPP's prompt shows its tasks 2, 3 and 4, and {', '.join(map(str, missing))} of them are not among the "
            f"{len(problems)} tasks given; give the whole mbpp.jsonl, which begins with task 1"
        )
    return tuple(by_id[one] for one in MBPP_SHOTS)


def mbpp_questions(problems: Sequence[MbppProblem]) -> tuple[MbppProblem, ...]:
    """The problems that are tested on: the 500 of task_ids 11 to 510, as far as they are there."""
    return tuple(problem for problem in problems if problem.task_id in MBPP_QUESTIONS)


def mbpp_prompt(problem: MbppProblem, shots: Sequence[MbppProblem]) -> str:
    """The examples with their solutions, then the problem, to be solved after [BEGIN] (the form of MBPP's authors).

    Our choice, where they are silent: an empty line between problems; solutions as they are, Windows line ends included.
    """
    shown = [f"{_mbpp_question(shot)}{shot.code}\n[DONE]\n\n" for shot in shots]
    return "".join([*shown, _mbpp_question(problem)])


def mbpp_program(problem: MbppProblem, completion: str) -> Program:
    """The program that an answer to the prompt is, with the problem's tests."""
    return Program(cut(completion, MBPP_STOPS), "\n".join([problem.test_setup_code, *problem.test_list]))


def cut(completion: str, stops: Sequence[str]) -> str:
    """What stands before the first stop, whichever it is."""
    return completion[: min((place for stop in stops if (place := completion.find(stop)) >= 0), default=None)]


def _mbpp_question(problem: MbppProblem) -> str:
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text} Your code should pass these tests:"
        "\n\n" + "\n".join(problem.test_list) + "\n[BEGIN]\n"
    )


def _read(path: str, kind: type) -> list[dict]:
    """The fields that a kind of problem has, of each line."""
    lines, found = Lines(path), []
    names = kind.__annotations__
    for number in range(len(lines)):
        try:
            record = json.loads(lines[number])
        except ValueError as error:
            raise UserError(f"{lines.place(number)} is not JSON ({error})") from None
        record = record if isinstance(record, dict) else {}
        for name, type_ in names.items():
            expected = list if type_ == tuple[str, ...] else type_
            if not isinstance(record.get(name), expected):
                raise UserError(
                    f"{lines.place(number)} has no {expected.__name__} in field {name!r}; its fields are "
                    f"{', '.join(sorted(record)) or 'none'}. Expected a line of the public file with {', '.join(names)}."
                )
        found.append({name: record[name] for name in names})
    return found
