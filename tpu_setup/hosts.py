"""One run on many hosts that are reached over SSH: set up, start, follow, stop. A failure names its host."""

import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llama_jax.errors import UserError
from tpu_setup.shell import Refused, Shell

ROOT = Path(__file__).resolve().parent.parent
SUPERVISE = ["bash", "llama_jax/tpu_setup/supervise.sh"]
COORDINATOR_PORT = 8476
SSH_FAILED = 255
"""Exit code of ssh, and of gcloud's, where the connection and not the command failed."""
AT_ONCE = 16
"""Hosts spoken to at the same time: each takes a process of its own on the user's machine."""


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    address: str
    """Where the other hosts reach it."""
    at: tuple[str, ...]
    """What its back-end needs to find it."""


class Reachable(Protocol):
    """A back-end whose hosts are open to SSH."""

    def hosts(self) -> list[Host]:
        """All hosts, in the order of jax's processes."""

    def ssh(self, host: Host, command: str) -> list[str]:
        """What runs a shell command on a host."""

    def copy(self, host: Host, source: str, target: str) -> list[str]:
        """What copies a file to a host's home."""


@dataclass(frozen=True)
class Run:
    """What is to run on every host, and when it is started again."""

    name: str
    words: Sequence[str]
    environment: dict[str, str]
    max_restarts: int = 50
    restart_on: str = "42,134"


@dataclass(frozen=True)
class Progress:
    """Where a run is on one host; see supervise.sh."""

    state: str
    restarts: int
    code: int | None
    line: str


def attempt(shell: Shell, hosts: Sequence[Host], command: Callable[[Host], list[str]]) -> list[str | Refused]:
    """Runs a command for every host at the same time, and returns what each printed, or how it failed."""

    def one(host: Host) -> str | Refused:
        try:
            return shell.read(command(host), "")
        except Refused as refused:
            return refused

    with ThreadPoolExecutor(1 if shell.dry_run else AT_ONCE) as pool:
        return list(pool.map(one, hosts))


def on_all(shell: Shell, hosts: Sequence[Host], command: Callable[[Host], list[str]]) -> list[str]:
    """As `attempt`, where nothing may fail.

    Raises:
      UserError: with every host that failed and what it said.
    """
    results = attempt(shell, hosts, command)
    _refuse(hosts, results)
    return results


def _refuse(hosts: Sequence[Host], results: Sequence[str | Refused]) -> None:
    bad = {host.name: result for host, result in zip(hosts, results, strict=True) if isinstance(result, Refused)}
    if bad:
        lines = [f"  {name}: ended with {refused.code}: {refused.said[-1000:]}" for name, refused in bad.items()]
        if any("supervise.sh: No such file" in refused.said for refused in bad.values()):
            lines.append("  -> bootstrap brings the project there")
        raise UserError("\n".join([f"{len(bad)} of {len(hosts)} hosts failed:", *lines]))


def bootstrap(shell: Shell, back: Reachable, name: str, *, extra: str, bucket: str | None, mount: str) -> None:
    """Brings the last commit of this checkout to every host, and makes its environment there."""
    hosts, archive = back.hosts(), str(Path(tempfile.gettempdir()) / f"llama_jax-{name}.tar.gz")
    if not shell.dry_run and (changed := Shell().read(["git", "-C", str(ROOT), "status", "--porcelain"], "")):
        shell.say(
            f"note: {len(changed.splitlines())} changes are not committed and do not travel; the hosts get the last commit"
        )
    shell.run(["git", "-C", str(ROOT), "archive", "--prefix=llama_jax/", "-o", archive, "HEAD"])
    shell.say(f"copying it to {len(hosts)} hosts")
    on_all(shell, hosts, lambda host: back.copy(host, archive, "llama_jax.tar.gz"))
    # A run reads its files for as long as it lives, so they are not taken from under it.
    unpack = "{ [ ! -e llama_jax ] || bash llama_jax/tpu_setup/supervise.sh idle; } && rm -rf llama_jax && tar xzf llama_jax.tar.gz"
    words = ["bash", "llama_jax/tpu_setup/bootstrap.sh", extra, *([bucket, mount] if bucket else [])]
    shell.say("setting up their environments: some minutes the first time")
    for host, out in zip(
        hosts, on_all(shell, hosts, lambda host: back.ssh(host, f"{unpack} && {shlex.join(words)}")), strict=True
    ):
        shell.say("\n".join(f"{host.name}: {line}" for line in out.splitlines()))


def start(shell: Shell, back: Reachable, run: Run, expected: int) -> list[Host]:
    """Starts a run on all hosts, or on none: where one fails, the others are stopped again."""
    hosts = back.hosts()
    if len(hosts) != expected:
        raise UserError(
            f"{run.name} has {len(hosts)} hosts ({', '.join(h.name for h in hosts)}), not {expected}; see status"
        )
    try:
        said = on_all(shell, hosts, lambda host: back.ssh(host, _start_command(run, hosts, hosts.index(host))))
    except UserError as error:
        shell.say("stopping it on the hosts that did start")
        for host in hosts:
            try:
                shell.read(back.ssh(host, shlex.join([*SUPERVISE, "stop", run.name, "30"])), "")
            except Refused:
                pass  # the host that failed may well fail again; the error names it
        raise error
    if not shell.dry_run:
        shell.say(f"{run.name}: {', '.join(sorted({text.strip() for text in said}))} on {len(hosts)} hosts")
    return hosts


def processes(hosts: Sequence[Host], number: int) -> dict[str, str]:
    """What jax must know to find the other hosts' processes."""
    if len(hosts) == 1:
        return {}
    return {
        "JAX_COORDINATOR_ADDRESS": f"{hosts[0].address}:{COORDINATOR_PORT}",
        "JAX_NUM_PROCESSES": str(len(hosts)),
        "JAX_PROCESS_ID": str(number),
    }


def _start_command(run: Run, hosts: Sequence[Host], number: int) -> str:
    environment = {**processes(hosts, number), **run.environment}
    words = ["env", *(f"{key}={value}" for key, value in environment.items()), *run.words]
    return shlex.join([*SUPERVISE, "start", run.name, str(run.max_restarts), run.restart_on, *words])


def progress(shell: Shell, back: Reachable, name: str, hosts: Sequence[Host]) -> list[Progress]:
    """Where the run is on each host; with --dry-run, ended well."""
    return [_parsed(text) for text in on_all(shell, hosts, lambda host: back.ssh(host, _status(name)))]


def show(shell: Shell, back: Reachable, name: str) -> None:
    """Prints where the run is, a line a host; fails in the end if a host did not answer."""
    hosts = back.hosts()
    results = attempt(shell, hosts, lambda host: back.ssh(host, _status(name)))
    for host, result in zip(hosts, results, strict=True):
        if isinstance(result, str) and not shell.dry_run:
            one = _parsed(result)
            ended = "" if one.code is None else f" with {one.code}"
            print(f"{host.name}: {one.state}{ended}, {one.restarts} restarts | {one.line}")
    _refuse(hosts, results)


def _status(name: str) -> str:
    return shlex.join([*SUPERVISE, "status", name])


def _parsed(text: str) -> Progress:
    state, restarts, code, *line = (text.strip() or "ended 0 0 (assumed)").split(" ", 3)
    return Progress(state, int(restarts), None if code == "-" else int(code), line[0] if line else "")


def stop(shell: Shell, back: Reachable, name: str, grace: int) -> None:
    """Has the run save and end on every host."""
    hosts = back.hosts()
    said = on_all(shell, hosts, lambda host: back.ssh(host, shlex.join([*SUPERVISE, "stop", name, str(grace)])))
    for host, text in zip(hosts, said, strict=True):
        shell.say(f"{host.name}: {text.strip()}")


def logs(shell: Shell, back: Reachable, name: str, lines: int, poll: float) -> None:
    """Every host's log as it grows, each line behind its host's name, until the run ends there.

    A connection that breaks is made again, and goes on at the byte where it broke.
    """
    hosts, lock = back.hosts(), threading.Lock()

    def follow(host: Host) -> str | None:
        at, failures = f"-{lines}", 0
        while True:
            log = _Log(host.name, at, lock)
            code = shell.stream(back.ssh(host, shlex.join([*SUPERVISE, "log", name, at])), log.take)
            at, failures = log.at, failures + 1 if log.at == at else 0
            if code != SSH_FAILED:
                log.flush()
                return f"  {host.name}: ended with {code}" if code else None
            if failures > 5:
                return f"  {host.name}: ended with {code}"
            time.sleep(poll)

    with ThreadPoolExecutor(1 if shell.dry_run else len(hosts)) as pool:
        lost = list(filter(None, pool.map(follow, hosts)))
    if lost:
        raise UserError("\n".join([f"the log of {len(lost)} of {len(hosts)} hosts cannot be followed:", *lost]))


class _Log:
    """One connection's part of a host's log: shows whole lines, and knows at which byte the next one begins."""

    def __init__(self, host: str, at: str, lock: threading.Lock):
        self.host, self.at, self.lock = host, at, lock
        self.begun, self.rest = False, ""

    def take(self, line: str) -> None:
        """A line as it comes; the first one says at which byte the log begins."""
        if not line.endswith("\n"):
            self.rest = line
        elif self.begun:
            self._show(line)
            self.at = str(int(self.at) + len(line.encode()))
        elif line.startswith("@"):
            self.at, self.begun = line[1:].strip(), True

    def flush(self) -> None:
        """Shows the last line where it has no end."""
        if self.rest:
            self._show(f"{self.rest}\n")

    def _show(self, line: str) -> None:
        with self.lock:
            print(f"{self.host}| {line}", end="", flush=True)


def verdict(shell: Shell, hosts: Sequence[Host], found: Sequence[Progress]) -> tuple[str, int]:
    """What the run as a whole is, and its exit code: running | ended | lost (to be started again).

    A host that ended badly decides for all: the others would wait for it for ever.
    """
    bad = [(host.name, one.code) for host, one in zip(hosts, found, strict=True) if one.state == "ended" and one.code]
    if bad:
        shell.say("\n".join(f"{host} ended with {code}" for host, code in bad))
        return "ended", bad[0][1]
    if any(one.state in ("lost", "none") for one in found):
        return "lost", 0
    return ("ended", 0) if all(one.state == "ended" for one in found) else ("running", 0)


def doctor(shell: Shell, back: Reachable, devices: int, here: int, megabytes: int) -> None:
    """Counts the devices of all hosts and times a collective over them, in one program on all hosts."""
    hosts = back.hosts()

    def command(host: Host) -> list[str]:
        environment = [f"{key}={value}" for key, value in processes(hosts, hosts.index(host)).items()]
        check = ["-m", "tpu_setup.check_devices", f"--devices={devices}", f"--here={here}", f"--megabytes={megabytes}"]
        words = f'{shlex.join(["timeout", "600", "env", *environment])} "$HOME"/llama_jax-venv/bin/python {shlex.join(check)}'
        return back.ssh(host, f"{shlex.join([*SUPERVISE, 'idle'])} && cd llama_jax && {words}")

    for host, text in zip(hosts, on_all(shell, hosts, command), strict=True):
        sys.stdout.write("".join(f"{host.name}: {line}\n" for line in text.splitlines()))
