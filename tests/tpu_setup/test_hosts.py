"""One run on many hosts: set up, started on all or none, followed, stopped, and kept going over preemptions."""

import json
import os
import re
import signal
import sys

import pytest

from tests.tpu_setup.conftest import PYTHON, eventually

TWO = ("l7", "--tpu", "v5p-16", "--zone", "us-east5-a", "--poll", "0.02")
NAMES = ("l7-w-0", "l7-w-1")
SSH = ("l7", "--backend", "ssh", "--hosts", "one,me@two", "--poll", "0.02")

# A training in small: the first host counts steps in the world's file, as into a bucket; when told to stop, it ends with 42.
# It goes to a last step, and within one life by so many steps at most.
TRAINS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
step = pathlib.Path(os.environ["FAKE_CLOUD"]) / "step"
last, life = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10**9
first = os.environ.get("JAX_PROCESS_ID", "0") == "0"
at = int(step.read_text() or 0) if step.exists() else 0
with open(step.with_name("starts"), "a") as starts:
    starts.write(f"{os.environ['HOST_NAME']} {at}\\n")
begun = at
while at < last and not step.with_name("enough").exists():
    time.sleep(0.05)
    at = min(at + 1, begun + life) if first else int(step.read_text() or 0) if step.exists() else 0
    if first:
        step.with_name("new").write_text(str(at))
        step.with_name("new").rename(step)
    print(f"step {at}/{last}", flush=True)
"""
TRAIN = (sys.executable, "-S", "-c", TRAINS)


@pytest.fixture
def two(cloud):
    """Two hosts that are there, with the project on them."""
    assert cloud("create", *TWO).code == 0
    cloud.installed(*NAMES)
    return cloud


def status(cloud, *flags: str) -> str:
    return cloud("status", *(flags or TWO)).out


def test_bootstrap_brings_the_commit_and_makes_the_environment_once(cloud):
    cloud("create", *TWO)
    flags = (*TWO, "--bucket", "gs://ours", "--mount", str(cloud.folder / "mnt"))
    (cloud.folder / "libtpu_lockfile").touch()
    assert cloud("bootstrap", *flags).code == 0
    for name in NAMES:
        home = cloud.host(name)
        assert (home / "llama_jax" / "tpu_setup" / "supervise.sh").is_file()
        assert (
            home / "pip"
        ).read_text() == "-m pip install -q --disable-pip-version-check -c requirements.lock -e .[tpu]\n"
        assert re.search(r"tpu Python 3\.\d+", (home / "llama_jax-venv" / ".wanted").read_text())
    mounted = next(call for call in cloud.calls() if call[0] == "gcsfuse")
    assert mounted == ["gcsfuse", "--implicit-dirs", "ours", str(cloud.folder / "mnt")]
    sudo = [call[1:] for call in cloud.calls() if call[0] == "sudo"]
    assert any(words[:2] == ["tee", "/etc/security/limits.d/90-llama_jax.conf"] for words in sudo)
    again = cloud("bootstrap", *flags)
    assert again.code == 0 and "l7-w-1: bootstrap: the environment is up to date" in again.err
    assert (cloud.host("l7-w-0") / "environments").read_text() == "made\n"


def test_bootstrap_does_not_take_the_files_from_under_a_run(two):
    two("run", *TWO, "--", "sleep", "60")
    result = two("bootstrap", *TWO)
    assert (
        result.code == 2 and "l7-w-0" in result.err and "the run l7 is active on this host; stop it first" in result.err
    )


def test_a_host_that_fails_in_bootstrap_is_named(cloud):
    cloud("create", *TWO)
    cloud.stub("python3.11", PYTHON.replace("\n", "\n[ $HOST_NAME = l7-w-0 ] || exit 1\n", 1))
    result = cloud("bootstrap", *TWO)
    assert result.code == 2 and "1 of 2 hosts failed" in result.err
    assert "l7-w-1: ended with 2" in result.err and "no Python 3.11 to 3.13 with venv is to be had" in result.err
    assert "l7-w-0: ended" not in result.err


def test_every_process_is_told_where_the_others_are_and_which_flags_to_use(two):
    show = "import json, os, pathlib, sys; pathlib.Path.home().joinpath('seen').write_text(json.dumps([dict(os.environ), sys.argv]))"
    words = ["it's", 'a "b"', "$HOME", "two words", "--dry-run", "@file"]
    flags = ("--libtpu", "0.0.50.1", "--bucket", "gs://b", "--env", "A=b c", "--env", "JAX_PROCESS_COUNT=x=y")
    assert two("run", *TWO, *flags, "--", sys.executable, "-S", "-c", show, *words).code == 0
    eventually(lambda: status(two).count("ended with 0,") == 2)
    for number, name in enumerate(NAMES):
        environment, argv = json.loads((two.host(name) / "seen").read_text())
        assert argv[1:] == words
        assert environment["JAX_COORDINATOR_ADDRESS"] == "10.0.0.2:8476"
        assert (environment["JAX_NUM_PROCESSES"], environment["JAX_PROCESS_ID"]) == ("2", str(number))
        assert "megacore_fusion_allow_ags" in environment["LIBTPU_INIT_ARGS"]
        assert "async_collective_fusion" not in environment["LIBTPU_INIT_ARGS"]
        assert environment["JAX_COMPILATION_CACHE_DIR"] == "/mnt/bucket/jax-cache"
        assert (environment["A"], environment["JAX_PROCESS_COUNT"]) == ("b c", "x=y")


def test_flags_of_libtpu_can_be_said_and_left_out(two):
    show = "import os, pathlib; pathlib.Path.home().joinpath('seen').write_text(os.environ.get('LIBTPU_INIT_ARGS', 'none'))"
    for given, seen in {"--mine=1": "--mine=1", "": "none"}.items():
        assert two("run", *TWO, f"--libtpu-args={given}", "--", sys.executable, "-S", "-c", show).code == 0
        eventually(lambda: status(two).count("ended with 0,") == 2)
        assert (two.host("l7-w-1") / "seen").read_text() == seen


def test_a_run_that_cannot_start_everywhere_runs_nowhere(two):
    (two.folder / "down").write_text("l7-w-1")
    result = two("run", *TWO, "--", "sleep", "60")
    assert result.code == 2 and "1 of 2 hosts failed" in result.err
    assert "l7-w-1: ended with 255: ssh: connect to host l7-w-1 port 22: Connection timed out" in result.err
    (two.folder / "down").unlink()
    assert "l7-w-0: ended with 143" in status(two) and "l7-w-1: none" in status(two)


def test_status_shows_the_hosts_that_answer_and_fails_for_the_others(two):
    two("run", *TWO, "--", "sleep", "60")
    (two.folder / "down").write_text("l7-w-0")
    result = two("status", *TWO)
    assert result.code == 2 and "l7-w-1: running, 0 restarts" in result.out and "l7-w-0: ended with 255" in result.err


def test_run_before_bootstrap_and_before_the_slice_says_what_to_do(cloud):
    cloud.fates([["PROVISIONING", "ACTIVE"]])
    early = cloud("run", *TWO, "--", "true")
    assert early.code == 2 and "create asks for it, wait follows it" in early.err
    cloud("create", *TWO)
    assert "is not there (PROVISIONING)" in cloud("run", *TWO, "--", "true").err
    result = cloud("run", *TWO, "--", "true")
    assert result.code == 2 and "bootstrap brings the project there" in result.err


def test_stop_ends_it_everywhere_and_says_that_the_slice_stays(two):
    two("run", *TWO, "--", *TRAIN, "100000")
    eventually(lambda: status(two).count("| step ") == 2)
    result = two("stop", *TWO)
    assert result.code == 0 and "l7-w-0: ended with 42" in result.err and "l7-w-1: ended with 42" in result.err
    assert "is there and paid for until it is deleted" in result.err


def test_logs_follow_every_host_to_the_end_of_the_run(two):
    """The run ends when the follower has shown a line of each host."""
    waits = 'echo begun; while [ ! -e "$HOME/go" ]; do sleep 0.05; done; echo all of it'
    two("run", *TWO, "--", "bash", "-c", waits)
    following, out = two.command("logs", *TWO), ""
    while not all(f"{name}| begun" in out for name in NAMES):
        line = following.stdout.readline()
        assert line, (out, following.stderr.read())
        out += line
    for name in NAMES:
        (two.host(name) / "go").touch()
    rest, err = following.communicate(timeout=120)
    assert following.returncode == 0, err
    for name in NAMES:
        lines = [line for line in (out + rest).splitlines() if line.startswith(f"{name}| ")]
        assert f"{name}| all of it" in lines and "ended with 0" in lines[-1]


def test_logs_go_on_where_a_connection_broke(two):
    """The first connection breaks after 400 bytes; nothing is shown twice, and nothing is left out."""
    two("run", *TWO, "--", *TRAIN, "40")
    eventually(lambda: status(two).count("ended with 0,") == 2)
    real = (two.bin / "gcloud").read_text().splitlines()[1].removeprefix("exec ")
    mark = f"{two.folder}/broke$3$5$6"
    once = f"[ -e {mark} ] || {{ touch {mark}; {real} | head -c 400; exit 255; }}"
    breaks = f'case "$*" in *" log "*) {once} ;; esac'
    two.stub("gcloud", f"#!/bin/bash\n{breaks}\nexec {real}\n")
    result = two("logs", *TWO, "--lines", "1000")
    assert result.code == 0 and len(list(two.folder.glob("broke*"))) == 2
    for name in NAMES:
        log = (two.host(name) / "llama_jax-runs" / "l7" / "log").read_text().splitlines()
        shown = [line.removeprefix(f"{name}| ") for line in result.out.splitlines() if line.startswith(name)]
        assert "".join(shown) == "".join(log)


def test_watching_ends_with_the_runs_own_code_and_restarts_on_42(two):
    ends = "\n".join(
        [
            "import pathlib, sys",
            "file = pathlib.Path.home() / 'n'",
            "before = file.read_text() if file.exists() else ''",
            "file.write_text(before + 'x')",
            "sys.exit([42, 42, CODE][len(before)])",
        ]
    )
    for code in (0, 3):
        for name in NAMES:
            (two.host(name) / "n").unlink(missing_ok=True)
        result = two("run", *TWO, "--watch", "--", sys.executable, "-S", "-c", ends.replace("CODE", str(code)))
        assert result.code == code, result.err
        assert "2 restarts" in result.err and (two.host("l7-w-1") / "n").read_text() == "xxx"


def test_one_host_that_ends_badly_ends_the_others_and_is_named(two):
    words = "if [ $HOST_NAME = l7-w-1 ]; then sleep 0.2; exit 2; fi; exec sleep 60"
    result = two("run", *TWO, "--watch", "--", "bash", "-c", words)
    assert result.code == 2 and "l7-w-1 ended with 2" in result.err and "l7-w-0: ended with 143" in result.err
    assert "restarts" in result.err and "1 restarts" not in result.err


def test_a_spot_slice_that_is_preempted_twice_is_made_again_and_the_run_goes_on(cloud):
    """It is lost once the bucket holds step 6, and step 12; how much further the run comes meanwhile is its own affair."""
    cloud.fates(
        [["WAITING_FOR_RESOURCES", "ACTIVE@6", "SUSPENDED"], ["ACTIVE@12", "FAILED"], ["PROVISIONING", "ACTIVE"]]
    )
    result = cloud("run", *TWO, "--spot", "--watch", "--", *TRAIN, "18", "6")
    assert result.code == 0, result.err
    verbs = [call[4] for call in cloud.calls() if "queued-resources" in call and call[4] != "describe"]
    assert verbs == ["create", "delete", "create", "delete", "create"]
    starts = [line.split() for line in (cloud.folder / "starts").read_text().splitlines()]
    assert "l7-w-1" in {name for name, _ in starts}
    at = sorted(int(at) for name, at in starts if name == "l7-w-0")
    assert at[0] == 0 and at[-2] >= 6 and at[-1] >= 12, "each start went on where the bucket was"
    assert (cloud.folder / "step").read_text() == "18" and "is there and paid for" in result.err


def test_a_new_slice_whose_hosts_do_not_answer_yet_is_tried_again(cloud):
    (cloud.folder / "down").write_text("l7-w-1")
    process = cloud.command("run", *TWO, "--spot", "--watch", "--poll", "0.5", "--", "true")
    said = ""
    while "looking again (2 of 10)" not in said:
        said += process.stderr.readline()
    (cloud.folder / "down").unlink()
    said += process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "l7-w-1: ended with 255" in said


def test_a_host_that_begins_anew_has_all_started_again(two):
    starts = two.folder / "starts"
    process = two.command("run", *TWO, "--watch", "--", *TRAIN, "1000000")
    eventually(lambda: starts.exists() and len(starts.read_text().splitlines()) == 2)
    os.killpg(int((two.host("l7-w-1") / "llama_jax-runs" / "l7" / "pid").read_text()), signal.SIGKILL)
    eventually(lambda: len(starts.read_text().splitlines()) == 4)
    (two.folder / "enough").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "a host began anew" in err


def test_plain_hosts_over_ssh(cloud):
    cloud.installed("one", "me@two")
    assert (
        cloud(
            "run", *SSH, "--", "sh", "-c", "echo $JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID ${LIBTPU_INIT_ARGS-none}"
        ).code
        == 0
    )
    eventually(lambda: status(cloud, *SSH).count("ended with 0,") == 2)
    logs = cloud("logs", *SSH).out
    assert "one| one:8476 0 none" in logs and "me@two| one:8476 1 none" in logs
    assert "paid" not in cloud("stop", *SSH).err


def test_doctor_finds_every_device_over_two_processes_and_says_when_one_is_missing(cloud):
    """For real: two processes with two CPU devices each find each other by what the launcher tells them."""
    cloud.installed("one", "me@two")
    for name in ("one", "me@two"):
        (cloud.host(name) / "llama_jax-venv" / "bin").mkdir(parents=True)
        (cloud.host(name) / "llama_jax-venv" / "bin" / "python").symlink_to(cloud.bin / "python3.11")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    # The hosts are this machine, under a name of it.
    flags = ("--backend", "ssh", "--hosts", "one,me@two", "--megabytes", "1")
    cloud.stub("env", '#!/bin/sh\nexec /usr/bin/env "$@"\n'.replace('"$@"', '$(echo "$@" | sed s/=one:/=127.0.0.1:/)'))
    result = cloud("doctor", "l7", *flags, "--devices-per-host", "2", **devices)
    assert result.code == 0, result.err
    for name in ("one", "me@two"):
        assert f"{name}: 2 of 2 devices here, 4 of 4 in all: cpu" in result.out
    assert re.search(r"one: all-reduce of 1 MB a device: [\d.]+ ms, [\d.]+ GB/s through each device", result.out)
    cloud("run", *SSH, "--", "sleep", "60")
    busy = cloud("doctor", "l7", *flags)
    assert busy.code == 2 and "the run l7 is active on this host" in busy.err
