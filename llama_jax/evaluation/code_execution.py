"""Runs generated Python programs against their tests, contained: the code benchmarks of paper 2.3 and A.2.2.

A generated program may do anything, so each runs in a process of its own (`code_child`) that another one starts and ends
(`code_keeper`). Two lines hold it. The kernel's holds whatever the program does, and depends on the machine. The guard,
Python's audit hooks, refuses files outside the work folder, sockets, processes, signals and native calls inside the program's
own process: it is the same everywhere, so that scores are, but a program that looks for a way around it finds one.

                                        namespaces   filters             neither             macOS
clock, processor, size of a file        kernel       kernel              kernel              kernel
memory of a process                     kernel       kernel              kernel              -
processes                               16, kernel   one, kernel         one, guard          one, guard
threads                                 16, kernel   as memory allows    as memory allows    -
nothing runs on after its end           kernel       kernel              kernel              but its own group
signals to others                       kernel       kernel              guard               guard
writing outside its folder              kernel       kernel              guard               guard
reading but for /usr and Python         kernel       kernel              guard               guard
network                                 kernel       kernel              guard               guard

Namespaces: the program has a file system, processes and a network of its own. They are tried first, as root and as any
user where the kernel lets users make them. Filters: Landlock (Linux 6.2) and seccomp (x86_64, aarch64), which need no
rights and so work in most containers. Neither: a warning says so. Where root starts it, the program runs as a user that
owns nothing, in every column; where that cannot be, nothing runs. Memory is limited for each process, so that in namespaces
a program that gets around the guard may have 16 times as much; the sum of its files is limited in namespaces alone.
Everywhere input is empty, output is thrown away, and the environment is six fixed variables. The column of macOS is what
the code should do there; it was not tried.

What nothing here can do: tests that share a process with the program believe its objects (one that equals everything
passes), and a program that digs its own process for the token may report what it likes. Leaving early, printing what a
checker might print and replacing builtins do not pass.
"""

import json
import marshal
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_jax.errors import UserError

_KEEPER, _CHILD = (Path(__file__).with_name(f"code_{name}.py") for name in ("keeper", "child"))
_LONGEST_WHY = 400  # letters
_GRACE = 30.0  # seconds that a keeper has beside the program's, on a machine that does much else


@dataclass(frozen=True)
class Program:
    """A generated program and what it is tested with."""

    candidate: str
    """Python that defines something."""
    tests: str
    """Python that runs after it, on its names, and raises unless it is right."""


@dataclass(frozen=True)
class Outcome:
    """How a program went."""

    passed: bool
    why: str
    """"passed", or what happened: "failed: AssertionError", "timed out after 3 s", "out of memory", ..."""


@dataclass(frozen=True)
class Containment:
    """What holds a program beside the limits; see the module."""

    namespaces: bool
    """It sees file systems, processes and network of its own alone."""
    filters: bool
    """The kernel refuses it files (Landlock) and sockets, processes and signals (seccomp)."""
    own_user: bool
    """It runs as a user that owns nothing."""
    guard: bool = True
    """Python itself refuses what the program should not do."""

    def warning(self) -> str:
        """What the user should know before programs run; empty where the kernel holds all."""
        if self.namespaces or self.filters:
            return ""
        return (
            "warning: generated programs are kept from the network, processes and "
            + ("what all users may read and write" if self.own_user else "your files")
            + " by Python's audit hooks alone, which a malicious program gets around. Better: Linux that lets users make "
            "namespaces or has Landlock (6.2 and later), or a machine that holds nothing of value."
        )


class _Broken(Exception):
    """A containment that could not be built, and why."""


def run_programs(
    programs: Sequence[Program],
    *,
    run_code: bool,
    timeout: float = 3.0,
    memory: int = 2**30,
    workers: int | None = None,
    containment: Containment | None = None,
) -> Iterator[Outcome]:
    """Runs programs side by side, and gives how each went, in their order and as soon as it is known.

    Args:
      programs: what to run.
      run_code: whether the user allowed it: generated programs run only where that was asked for.
      timeout: seconds of the clock for one program with its tests. Our choice: 3, as HumanEval's own checker has it.
      memory: bytes of address space of one process. Python starts with 64 MiB, and imports NumPy with 96.
      workers: programs at a time; the machine's processors if none.
      containment: how they are held; the strongest that this machine has if none.

    Raises:
      UserError: the user did not allow it, or this machine cannot hold a program.
    """
    if not run_code:
        raise UserError(
            "This evaluation runs programs that a model wrote, which may do anything that they are not kept from. It is "
            "off unless you ask for it: --run-code. They run contained, without network, and with limits."
        )
    if timeout <= 0 or memory < 2**26:
        raise UserError(f"A program gets {timeout:g} s and {memory:,} bytes; give it more than 0 s and at least 64 MiB")
    if containment is None:
        containment = find_containment()
        if warning := containment.warning():
            print(warning, file=sys.stderr)
    return _outcomes(programs, containment, timeout, memory, workers or os.cpu_count() or 1)


def find_containment() -> Containment:
    """The strongest way to hold a program that works here, found by holding one.

    Raises:
      UserError: none does, or those that do would leave a program root's rights.
    """
    if os.name != "posix":
        raise UserError("Generated programs can be contained on Linux and macOS alone; run this evaluation there")
    is_root = os.geteuid() == 0
    kernels = [(True, False), (False, True)] if sys.platform == "linux" else []
    ways = [Containment(namespaces, filters, own_user=is_root) for namespaces, filters in [*kernels, (False, False)]]
    reasons = []
    for way in ways:
        try:
            outcome = _run(Program("", ""), way, timeout=30.0, memory=2**30)
        except _Broken as broken:
            reasons.append(str(broken))
        else:
            if outcome.passed:
                return way
            reasons.append(outcome.why)
    raise UserError(
        f"Generated programs cannot be contained here ({'; '.join(reasons)}), and are not run. As root, Python "
        f"({_python()}) must be readable for other users; or run as another user."
    )


def _outcomes(programs, containment: Containment, timeout: float, memory: int, workers: int) -> Iterator[Outcome]:
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_run, program, containment, timeout, memory) for program in programs]
        try:
            for one in running:
                yield one.result()
        except _Broken as broken:
            raise UserError(f"A program could not be contained any more ({broken}), and was not run") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # what the caller does not wait for does not begin


def _run(program: Program, containment: Containment, timeout: float, memory: int) -> Outcome:
    token = secrets.token_hex(16)
    task = asdict(program) | {
        "guard": containment.guard,
        "packages": _packages(),
        "readable": _readable(),
        "token": token,
    }
    job = asdict(containment) | {"timeout": timeout, "memory": memory, "python": _python(), "readable": _readable()}
    with tempfile.TemporaryDirectory(prefix="llama_jax-program-", ignore_cleanup_errors=True) as folder:
        job |= {"folder": os.path.realpath(folder), "child": _CHILD.read_text(), "parent": os.getpid()}
        command = [sys.executable, "-IS", str(_KEEPER), json.dumps(job)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # In a session of its own, as the terminal's interrupt is for us, and without our environment.
        with subprocess.Popen(command, **pipes, start_new_session=True, env={}) as keeper:
            try:
                answer, complaint = keeper.communicate(marshal.dumps(task), timeout + _GRACE)
            except subprocess.TimeoutExpired:
                answer = complaint = b""
            finally:
                keeper.kill()
    if answer:
        return _outcome(json.loads(answer), token, timeout)
    if complaint:
        raise _Broken(complaint.decode(errors="replace").strip().splitlines()[-1])
    return Outcome(False, "ended the process that kept it")


def _outcome(answer: dict, token: str, timeout: float) -> Outcome:
    if "broken" in answer:
        raise _Broken(answer["broken"])
    ended_by = os.WTERMSIG(answer["status"]) if os.WIFSIGNALED(answer["status"]) else 0
    if answer["late"] or ended_by == signal.SIGXCPU:
        return Outcome(False, f"timed out after {timeout:g} s")
    if ended_by:
        return Outcome(False, f"killed by signal {ended_by} ({signal.strsignal(ended_by)})")
    if answer["said"] == token:
        return Outcome(True, "passed")
    why = answer["said"] or "exited before its tests were done"
    return Outcome(False, "".join(letter if letter.isprintable() else " " for letter in why[:_LONGEST_WHY]))


def _python() -> str:
    """The interpreter itself: the one of a virtual environment is a link to it."""
    return os.path.realpath(sys.executable)


def _packages() -> list[str]:
    """The folders of installed packages, as programs may use NumPy and others."""
    return sorted({os.path.realpath(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})


def _readable() -> list[str]:
    """What Python needs of the file system; none lies inside another."""
    system = [path for path in ("/usr", "/lib", "/lib64", "/nix/store", "/gnu/store") if os.path.isdir(path)]
    own = [os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix, *_packages())]
    every = sorted({*system, *own})
    return [path for path in every if not any(path.startswith(other + "/") for other in every)]
