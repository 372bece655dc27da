"""Four processes of a run, of which one is killed or fails: the others end in time, and started again all goes on as if nothing was."""

import random
import re
import signal
import time

import pytest

from tests.multi_process.test_pretrain import assert_same_trace
from tests.stages.runs import finish, free_address, start, write_recipe

LOST_AFTER = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, corpus, tokenizer_file):
    return write_recipe(tmp_path_factory.mktemp("recipe"), corpus, tokenizer_file, 30)


def start_four(arguments, of_the_last=()):
    joined = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "4"}
    words = [*arguments, "--loop.lost-after", str(LOST_AFTER)]
    own = [words, words, words, [*words, *of_the_last]]
    return [start(one, 1, **joined, JAX_PROCESS_ID=str(index)) for index, one in enumerate(own)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    endings = [finish(one) for one in start_four(["pretrain", recipe, "--out", str(folder)])]
    assert {code for code, _, _ in endings} == {0}, endings
    return folder


def test_four_processes_train_what_one_trains(uninterrupted, recipe, tmp_path):
    code, _, err = finish(start(["pretrain", recipe, "--out", str(tmp_path / "run")], 4))
    assert code == 0, err
    assert_same_trace(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("number", [0, 2])
def test_a_host_that_dies_ends_the_others_and_the_run_goes_on(uninterrupted, recipe, tmp_path, number):
    """Killed at a random step behind the first checkpoint: 0, which runs the coordination service, and another."""
    arguments = ["pretrain", recipe, "--out", str(tmp_path / "run")]
    processes, last = start_four(arguments), random.randint(12, 25)
    for line in processes[0].stderr:
        if line.startswith(f"step {last}/"):
            break
    processes[number].kill()
    processes[number].wait()
    killed = time.monotonic()
    others = [one for index, one in enumerate(processes) if index != number]
    endings = [finish(one, 3 * LOST_AFTER) for one in others]
    # Where process 0 is lost jax may end the others itself, before the watch can.
    assert {code for code, _, _ in endings} <= ({42} if number else {42, -signal.SIGABRT}), endings
    assert time.monotonic() - killed < 3 * LOST_AFTER
    if number:
        for _, _, err in endings:
            assert re.search(
                rf"process {number} on \S+ is lost: not heard of for \d+ s, its last step was \d+; ending with 42", err
            )
    endings = [finish(one) for one in start_four([*arguments, "--resume", "must"])]
    assert {code for code, _, _ in endings} == {0}, endings
    assert "resumed at step" in endings[0][2]
    assert_same_trace(tmp_path / "run", uninterrupted)


def test_what_fails_on_one_host_ends_all_with_its_code_and_its_name(recipe, tmp_path):
    """The disk of one host holds no corpus: the others would wait for it in their first collective."""
    words = ["pretrain", recipe, "--out", str(tmp_path / "run")]
    endings = [finish(one, 60) for one in start_four(words, ("--data.sources", "text:nowhere.txt"))]
    assert [code for code, _, _ in endings] == [2, 2, 2, 2], endings
    assert "nowhere.txt" in endings[3][2]
    for _, _, err in endings[:3]:
        assert re.search(r"process 3 on \S+ failed: error: .*nowhere.txt", err), err
