"""Two processes train what one trains: the same batches, the same losses, and each goes on where the other stopped."""

import re
import shutil
import signal
import time

import pytest

from tests.stages.runs import finish, free_address, learned, newest, start, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, corpus, tokenizer_file):
    return write_recipe(tmp_path_factory.mktemp("recipe"), corpus, tokenizer_file, 20)


def start_two(arguments):
    """Two processes with two devices each."""
    joined = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    return [start(arguments, 2, **joined, JAX_PROCESS_ID=str(index)) for index in range(2)]


def run_two(arguments):
    return [finish(process) for process in start_two(arguments)]


def run_one(arguments):
    return finish(start(arguments, devices=4))


@pytest.fixture(scope="module")
def one(tmp_path_factory, recipe):
    """The run of a single process with four devices."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    code, _, err = run_one(["pretrain", recipe, "--out", str(folder)])
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, recipe):
    """The run of two processes, and what each said."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    endings = run_two(["pretrain", recipe, "--out", str(folder)])
    assert [code for code, _, _ in endings] == [0, 0], endings
    return folder, [err for _, _, err in endings]


def assert_same_trace(ours, theirs):
    assert [(record["step"], *record) for record in learned(ours)] == [
        (record["step"], *record) for record in learned(theirs)
    ]
    for mine, other in zip(learned(ours), learned(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
        assert mine.get("train/targets") == other.get("train/targets"), "the batches are the same"
    assert newest(ours)["cursor"] == newest(theirs)["cursor"]


def test_two_processes_train_what_one_trains(one, two):
    assert_same_trace(two[0], one)


def test_only_process_0_speaks(two):
    said, silent = two[1]
    assert "devices     4 x cpu, mesh fsdp=4, 2 process(es)" in said and "step 20/20" in said
    assert not re.search(r"step \d|devices|done", silent)


@pytest.mark.parametrize("runner", [run_one, run_two])
def test_a_run_goes_on_with_another_number_of_processes(one, two, recipe, tmp_path, runner):
    begun = two[0] if runner is run_one else one
    folder = shutil.copytree(begun, tmp_path / "run")
    for step in (15, 20):
        shutil.rmtree(folder / f"checkpoints/{step}")
    endings = runner(["pretrain", recipe, "--out", str(folder), "--resume", "must"])
    endings = [endings] if runner is run_one else endings
    assert {code for code, _, _ in endings} == {0}, endings
    assert "resumed at step 10" in endings[0][2]
    assert_same_trace(folder, one)


def test_sigterm_to_both_saves_once_and_ends_both_with_42(recipe, one, two, tmp_path):
    arguments = ["pretrain", recipe, "--out", str(tmp_path / "run")]
    processes = start_two(arguments)
    heard = ""
    for line in processes[0].stderr:
        heard += line
        if line.startswith("step 4/"):
            break
    for process in processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    endings = [finish(process) for process in processes]
    assert [code for code, _, _ in endings] == [42, 42], (heard, endings)
    saved = newest(tmp_path / "run")["step"]
    assert f"SIGTERM received: step {saved} is saved" in endings[0][2]
