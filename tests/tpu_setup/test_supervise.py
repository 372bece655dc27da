"""The supervisor on a host: starts again after 42 and after nothing else, hands SIGTERM on, keeps words as they are."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_setup.conftest import eventually

SCRIPT = Path(__file__).resolve().parents[2] / "tpu_setup" / "supervise.sh"

# Ends with the codes in the file `codes`, one at each start.
ENDS = """
import pathlib, sys
file = pathlib.Path(sys.argv[1])
code, *rest = file.read_text().split()
file.write_text(" ".join(rest) or code)
sys.exit(int(code))
"""
# Saves when it is told to stop, and ends with 42.
SAVES = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


class Host:
    def __init__(self, home: Path):
        self.home = home
        self.run = home / "llama_jax-runs" / "l7"

    def __call__(self, *words: str, pause: str = "0.02") -> subprocess.CompletedProcess:
        environment = {**os.environ, "HOME": str(self.home), "RESTART_PAUSE": pause}
        return subprocess.run(
            ["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=120
        )

    def start(self, *words: str, restarts: int = 50, codes: str = "42", pause: str = "0.02"):
        return self("start", "l7", str(restarts), codes, *words, pause=pause)

    def status(self) -> list[str]:
        return self("status", "l7").stdout.split(" ", 3)

    def ended(self) -> list[str]:
        eventually((self.run / "ended").exists)
        return self.status()[:3]


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    for pid in host.home.glob("llama_jax-runs/*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("42 42 0", ["ended", "2", "0"]),
        ("2", ["ended", "0", "2"]),
        ("42 1", ["ended", "1", "1"]),
        ("3 0", ["ended", "0", "3"]),
        ("0 42", ["ended", "0", "0"]),
    ],
)
def test_it_starts_again_after_42_and_after_nothing_else(host, tmp_path, codes, expected):
    (tmp_path / "codes").write_text(codes)
    assert host.start(sys.executable, "-c", ENDS, str(tmp_path / "codes")).stdout == "started\n"
    assert host.ended() == expected


def test_which_codes_start_it_again_can_be_said(host, tmp_path):
    (tmp_path / "codes").write_text("143 42 14 0")
    host.start(sys.executable, "-c", ENDS, str(tmp_path / "codes"), codes="42,143")
    assert host.ended() == ["ended", "2", "14"]


def test_it_gives_up_after_the_most_restarts_with_the_code_that_asked_for_one_more(host, tmp_path):
    (tmp_path / "codes").write_text("42")
    host.start(sys.executable, "-c", ENDS, str(tmp_path / "codes"), restarts=3)
    assert host.ended() == ["ended", "3", "42"]
    assert "3 restarts are the most allowed" in (host.run / "log").read_text()


def test_stop_lets_it_save_and_does_not_start_it_again(host, tmp_path):
    host.start(sys.executable, "-c", SAVES, str(tmp_path / "saved"))
    eventually(lambda: "ready" in (host.run / "log").read_text().splitlines())
    result = host("stop", "l7", "10")
    assert (result.returncode, result.stdout) == (0, "ended with 42\n")
    assert (tmp_path / "saved").read_text() == "saved" and host.status()[:3] == ["ended", "0", "42"]


def test_a_stop_between_two_starts_holds(host, tmp_path):
    (tmp_path / "codes").write_text("42")
    host.start(sys.executable, "-c", ENDS, str(tmp_path / "codes"), pause="30")
    eventually(lambda: host.status()[1] == "1")
    assert host("stop", "l7", "10").stdout == "ended with 42\n"
    assert host.status()[:3] == ["ended", "1", "42"]


def test_one_that_does_not_end_is_killed_and_that_is_a_failure(host):
    host.start(sys.executable, "-c", DEAF)
    eventually(lambda: "ready" in (host.run / "log").read_text().splitlines())
    result = host("stop", "l7", "1")
    assert result.returncode == 2 and "did not end within 1 s" in result.stderr and "last checkpoint" in result.stderr
    eventually(lambda: host("idle").returncode == 0)


def test_words_arrive_unchanged(host, tmp_path):
    words = ["two words", "it's", 'a "quote"', "$HOME `id` $(id)", "*", "", "back\\slash", "a\nline", "-n", "é"]
    show = f"import json, sys, pathlib; pathlib.Path({str(tmp_path / 'words')!r}).write_text(json.dumps(sys.argv[1:]))"
    host.start(sys.executable, "-c", show, *words)
    host.ended()
    assert json.loads((tmp_path / "words").read_text()) == words


def test_one_run_at_a_time(host):
    assert host.start("sleep", "60").stdout == "started\n"
    assert host.start("sleep", "60").stdout == "runs already\n"
    for name, words in {"l7": ("sleep", "61"), "other": ("sleep", "60")}.items():
        result = host("start", name, "1", "42", *words)
        assert result.returncode == 2 and "the run l7 is active on this host; stop it first" in result.stderr
    assert host("idle").returncode == 2
    assert host("stop", "l7", "10").stdout == "ended with 143\n"
    assert host("idle").returncode == 0
    assert host.start("sleep", "61").stdout == "started\n"


def test_a_host_that_began_anew_is_lost_not_running(host):
    assert host.status() == ["none", "0", "-\n"]
    host.start("sleep", "60")
    os.killpg(int((host.run / "pid").read_text()), signal.SIGKILL)
    eventually(lambda: host.status()[0] == "lost")


def test_the_log_goes_on_from_a_byte_and_ends_with_the_run(host, tmp_path):
    gate = tmp_path / "gate"
    host.start("bash", "-c", f"echo one; until [ -e {gate} ]; do sleep 0.05; done; echo two")
    eventually(lambda: "one\n" in (host.run / "log").read_text())
    follow = ["bash", str(SCRIPT), "log", "l7", "-1"]
    with subprocess.Popen(follow, env=os.environ | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True) as log:
        first, one = log.stdout.readline(), log.stdout.readline()
        gate.touch()
        rest = log.stdout.read().splitlines()
    assert one == "one\n" and rest[0] == "two" and "ended with 0" in rest[-1]
    at = int(first.removeprefix("@")) + len("one\n")
    assert host("log", "l7", str(at)).stdout.splitlines()[:2] == [f"@{at}", "two"]
    assert host("log", "l7", "1000000").stdout.startswith("@1\n---"), "a new host's log begins anew"
    assert host("log", "other", "1").returncode == 2


def test_an_unknown_word_is_refused(host):
    result = host("begin")
    assert result.returncode == 2 and "start, status, stop, log or idle" in result.stderr
