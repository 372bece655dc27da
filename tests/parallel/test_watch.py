"""Processes that watch over each other, with a store and a clock of the test's own: who is lost, who failed, who hangs."""

import json

import pytest

from llama_jax.errors import UserError
from llama_jax.parallel import distributed
from llama_jax.parallel.watch import PREFIX, Watch


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch):
    """Where a test does not say what happens while a process waits, nothing does."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


class Store(dict):
    """The key-value store of the coordination service, while process 0 lives."""

    alive = True

    def key_value_set(self, key, value, allow_overwrite):
        assert self.alive and allow_overwrite
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]


class Waits(Exception):
    """A process waits for its own end."""


class Pod:
    """Three processes, of which some beat at each tick of two seconds."""

    def __init__(self, **settings):
        self.store, self.ended, self.now = Store(), {}, 1000.0
        self.watches = [
            Watch(
                self.store,
                index,
                f"host-{index}",
                **{"lost_after": 10, "hang_after": 1e9, **settings},
                end=lambda code, index=index: self.ended.setdefault(index, code),
            )
            for index in range(3)
        ]

    def run(self, seconds, beating=(0, 1, 2)):
        for _ in range(int(seconds / 2)):
            self.now += 2
            for index in beating:
                if index not in self.ended and not self.watches[index]._leaving.is_set():
                    self.watches[index].beat(self.now)


def test_nobody_ends_while_all_are_alive(capsys):
    pod = Pod()
    pod.run(1000)
    assert pod.ended == {} and capsys.readouterr().err == ""


def test_a_silent_process_is_lost_and_the_others_end_to_be_started_again(capsys):
    pod = Pod()
    pod.watches[1].note(7)
    pod.run(20)
    pod.run(10, beating=(0, 2))
    assert pod.ended == {}, "10 s are allowed"
    pod.run(4, beating=(0, 2))
    said = capsys.readouterr().err.splitlines()
    assert pod.ended == {0: 42, 2: 42} and len(said) == 2
    for line in said:
        assert "process 1 on host-1 is lost: not heard of for 12 s, its last step was 7; ending with 42" in line
        assert "start the run again" in line


def test_one_that_is_done_may_be_silent():
    pod = Pod()
    pod.run(4)
    pod.watches[1].close()
    pod.run(100, beating=(0, 2))
    assert pod.ended == {}


def test_a_failure_ends_all_with_its_code_and_its_words(capsys, monkeypatch):
    pod = Pod()
    monkeypatch.setattr("time.sleep", lambda seconds: pod.run(seconds, beating=(0, 1)))
    pod.run(4)
    pod.watches[2].fail(2, "error: no file at corpus.txt", foreseen=True)
    assert pod.ended == {0: 2, 1: 2, 2: 2}
    assert capsys.readouterr().err.count("process 2 on host-2 failed: error: no file at corpus.txt") == 2


def test_process_0_goes_last_because_the_store_goes_with_it(monkeypatch):
    pod, waited = Pod(), []
    monkeypatch.setattr("time.sleep", lambda seconds: (waited.append(seconds), pod.run(seconds)))
    pod.run(4)
    pod.run(14, beating=(0, 2))
    assert list(pod.ended) == [2, 0] and waited == [10]


def test_an_error_that_is_but_the_loss_of_another_ends_as_a_loss(capsys, monkeypatch):
    """A collective raises in process 0 when process 1 dies, before anybody can know why."""

    def waits(self):
        raise Waits

    monkeypatch.setattr("threading.Event.wait", waits)
    pod = Pod()
    pod.run(4)
    monkeypatch.setattr("time.sleep", lambda seconds: pod.run(seconds, beating=(0, 2)))
    with pytest.raises(Waits):
        pod.watches[0].fail(1, "ValueError: connection closed by peer", foreseen=False)
    assert pod.ended == {0: 42, 2: 42} and f"{PREFIX}failed/0" not in pod.store
    assert "process 1 on host-1 is lost" in capsys.readouterr().err


def test_a_bug_of_ones_own_is_told_when_nobody_turned_out_to_be_lost(monkeypatch):
    pod = Pod()
    pod.run(4)
    monkeypatch.setattr("time.sleep", lambda seconds: pod.run(seconds))
    pod.watches[0].fail(1, "Traceback\nKeyError: 'x'", foreseen=False)
    assert pod.ended == {0: 1, 1: 1, 2: 1}
    assert json.loads(pod.store[f"{PREFIX}failed/0"])["message"] == "KeyError: 'x'"


def test_a_hang_is_reported_with_the_last_step_of_each_host(capsys, monkeypatch):
    pod = Pod(hang_after=60)
    monkeypatch.setattr("time.monotonic", lambda: pod.now)
    for watch, step in zip(pod.watches, (5, 5, 4), strict=True):
        watch.note(step)
    pod.run(62)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("process 0")]
    steps = "process 0 on host-0 5, process 1 on host-1 5, process 2 on host-2 4"
    assert said == [f"process 0 on host-0: no step for 60 s; the last steps begun: {steps}"] and pod.ended == {}
    pod.run(58)
    assert capsys.readouterr().err == ""
    pod.run(4)
    assert len(capsys.readouterr().err.splitlines()) == 3, "once in every 60 s"


def test_the_loss_of_the_store_is_the_loss_of_process_0(capsys):
    pod = Pod()
    pod.store.alive = False
    watch = pod.watches[1]
    watch._stopped.wait = lambda seconds: bool(pod.ended)
    watch._run()
    assert pod.ended == {1: 42}
    assert "process 0 cannot be reached any more" in capsys.readouterr().err


def test_what_is_told_is_the_last_line():
    pod = Pod()
    pod.watches[1].fail(2, "error: a\nerror: b", foreseen=True)
    assert json.loads(pod.store[f"{PREFIX}failed/1"]) == {"host": "host-1", "code": 2, "message": "error: b"}


def test_a_silence_shorter_than_a_few_beats_is_refused():
    with pytest.raises(UserError, match="--loop.lost-after is 5 s; .* give 6 or more"):
        distributed.initialize(lost_after=5)
