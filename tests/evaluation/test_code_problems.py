"""HumanEval and MBPP: their own solutions pass and nothing else does; prompts and cuts are the public ones."""

import dataclasses
import json
import re

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.code_execution import find_containment, run_programs
from llama_jax.evaluation.code_problems import (
    HUMANEVAL_STOPS,
    MBPP_STOPS,
    cut,
    humaneval_program,
    mbpp_program,
    mbpp_prompt,
    mbpp_questions,
    mbpp_shots,
    read_humaneval,
    read_mbpp,
)


def whys(programs) -> list[str]:
    outcomes = run_programs(programs, run_code=True, timeout=20, containment=find_containment())
    return [one.why for one in outcomes]


def test_humaneval_solutions_pass_and_mutants_fail(shared):
    """A model would go on after the function; what follows is cut."""
    problems = read_humaneval(str(shared / "samples/humaneval_20.jsonl"))
    after = "\n\nprint('and so on')\n\ndef other(:"
    good = [humaneval_program(one, one.canonical_solution + after) for one in problems]
    bad = [humaneval_program(one, "    return None" + after) for one in problems]
    results = whys(good + bad)
    assert len(problems) == 20 and results[:20] == ["passed"] * 20
    assert all(why.startswith("failed: ") for why in results[20:])


def test_mbpp_solutions_pass_and_mutants_fail(shared):
    problems = read_mbpp(str(shared / "samples/mbpp_20.jsonl"))
    good = [mbpp_program(one, one.code + "\n[DONE]\n\nYou are") for one in problems]
    # A function of the same name that gives nothing.
    names = [re.search(r"assert .*?(\w+)\(", one.test_list[0].replace("math.isclose(", ""))[1] for one in problems]
    bad = [mbpp_program(one, f"def {name}(*_): return\n[DONE]") for one, name in zip(problems, names, strict=True)]
    results = whys(good + bad)
    assert len(problems) == 20 and results[:20] == ["passed"] * 20
    assert all(why.startswith("failed: ") for why in results[20:])


def test_mbpp_setup_comes_before_the_tests(shared):
    problem = dataclasses.replace(
        read_mbpp(str(shared / "samples/mbpp_20.jsonl"))[0],
        test_setup_code="class Node:\n    value = 3",
        test_list=("assert value_of(Node()) == 3", "assert value_of(Node) == 3"),
    )
    right = "def value_of(node):\n    return node.value"
    assert whys([mbpp_program(problem, right)]) == ["passed"]


@pytest.mark.parametrize("stop", ["\nclass", "\ndef", "\n#", "\nif", "\nprint"])
def test_a_completion_ends_at_the_first_stop(stop):
    function = "    x = '# def class if print'\n    if x:\n        print(x)\n    return x\n"
    assert cut(function + stop + " more" + "".join(HUMANEVAL_STOPS), HUMANEVAL_STOPS) == function
    assert cut(function, HUMANEVAL_STOPS) == function


def line(task_id: int) -> dict:
    return {
        "task_id": task_id,
        "text": f"Write task {task_id}.",
        "code": f"def f(x):\r\n  return x + {task_id}",
        "test_setup_code": "",
        "test_list": [f"assert f({n}) == {n + task_id}" for n in range(3)],
        "challenge_test_list": [],
    }


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_mbpp_prompt_is_that_of_its_authors(tmp_path):
    """Checked against the form as its README prints it, filled in by hand."""
    problems = read_mbpp(write(tmp_path / "mbpp.jsonl", [line(n) for n in (511, 4, 12, 2, 1, 3, 11, 510, 5)]))
    shots = mbpp_shots(problems)
    assert [one.task_id for one in shots] == [2, 3, 4]
    assert [one.task_id for one in mbpp_questions(problems)] == [12, 11, 510]
    question = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"
    parts = []
    for n in (2, 3, 4, 12):
        tests = f"assert f(0) == {n}\nassert f(1) == {n + 1}\nassert f(2) == {n + 2}"
        parts.append(question.format(f"Write task {n}.", tests) + f"def f(x):\r\n  return x + {n}\n[DONE]")
    whole = "\n\n".join(parts)
    prompt = mbpp_prompt(problems[2], shots)
    assert whole.startswith(prompt) and whole[len(prompt) :] == "def f(x):\r\n  return x + 12\n[DONE]"
    assert cut(whole[len(prompt) :], MBPP_STOPS) == problems[2].code + "\n"


def test_missing_shots_lines_and_fields_are_named(tmp_path, shared):
    with pytest.raises(
        UserError, match="shows its tasks 2, 3 and 4, and 2, 3, 4 .* 20 tasks given; give the whole mbpp.jsonl"
    ):
        mbpp_shots(read_mbpp(str(shared / "samples/mbpp_20.jsonl")))
    with pytest.raises(
        UserError, match="humaneval_20.jsonl, line 1 has no int in field 'task_id'.*its fields are canonical_sol"
    ):
        read_mbpp(str(shared / "samples/humaneval_20.jsonl"))
    with pytest.raises(UserError, match="line 2 is not JSON"):
        (tmp_path / "broken.jsonl").write_text(json.dumps(line(2)) + "\n{")
        read_mbpp(str(tmp_path / "broken.jsonl"))
    with pytest.raises(UserError, match="line 1 has no str in field 'task_id'.*its fields are none"):
        read_humaneval(write(tmp_path / "list.jsonl", [[1, 2]]))
