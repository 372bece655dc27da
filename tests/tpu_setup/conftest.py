"""A cloud that is not there: stubs of its commands on PATH, and a small checkout to bring to its hosts."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from tests.tpu_setup import fake_cloud
from tpu_setup import hosts
from tpu_setup.__main__ import main
from tpu_setup.shell import Refused, Shell

ROOT = Path(__file__).resolve().parents[2]
PLAYED = ("gcloud", "kubectl", "ssh", "scp", "sbatch", "squeue", "scancel", "srun", "sudo", "gcsfuse")
NEEDED = ("tpu_setup", "pyproject.toml", "requirements.lock", "llama_jax/__init__.py", "llama_jax/cli.py")
NEEDED += ("llama_jax/errors.py", "llama_jax/planning", "llama_jax/parallel")
# Imported rather than run, so that it is compiled once and not at every call.
PLAY = f'import sys; sys.path.insert(0, "{Path(__file__).parent}"); import fake_cloud; sys.exit(fake_cloud.called())'
# `python -m tpu_setup` that hears Ctrl-C behind nohup too, where it is ignored, which a process inherits.
HEARS = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("tpu_setup", run_name="__main__", alter_sys=True)
"""
# An environment in no time: what `python -m venv` and pip leave behind, as far as a run needs it.
PYTHON = f"""#!/bin/sh
case "$*" in
"-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo made >> "$HOME/environments" ;;
"-m pip "*) echo "$*" >> "$HOME/pip" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """This project as far as it matters to a host, committed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "for the hosts"]):
        subprocess.run([*git, *words], check=True, stdin=subprocess.DEVNULL)
    return folder


CALL = Shell._call


@dataclass
class Outcome:
    """How a command line ended."""

    code: int
    out: str
    err: str


class Cloud:
    """The fake, and the program in front of it."""

    def __init__(self, folder: Path, checkout: Path):
        self.folder, self.checkout, self.bin = folder, checkout, folder / "bin"
        self.outside = False
        self.bin.mkdir(parents=True)
        (folder / "hosts").mkdir()
        for name in PLAYED:
            self.stub(name, f"#!/bin/sh\nexec {sys.executable} -S -c '{PLAY}' {name} \"$@\"\n")
        for name in ("python3.12", "python3.13", "python3", "curl", "apt-get"):
            self.stub(name, "#!/bin/sh\nexit 1\n")  # or a test that goes astray would install for real
        self.stub("python3.11", PYTHON)
        self.stub("mountpoint", "#!/bin/sh\nexit 1\n")
        self.fates([["ACTIVE"]])
        self.environment = {
            **os.environ,
            "FAKE_CLOUD": str(folder),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RESTART_PAUSE": "0.05",
            "TMPDIR": str(folder),
            "LIBTPU_LOCKFILE": str(folder / "libtpu_lockfile"),
        }

    def stub(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def fates(self, fates: list) -> None:
        (self.folder / "fates.json").write_text(json.dumps(fates))

    def command(self, *words: str, **environment: str) -> subprocess.Popen:
        """A command line as a process of its own, which sees the standard library and nothing else."""
        return subprocess.Popen(
            [sys.executable, "-S", "-c", HEARS, *words],
            cwd=self.checkout,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, **environment: str) -> Outcome:
        """Runs a command line inside this process, which saves the time of starting one.

        So are the calls of the cloud, other than those of a host, which come several at a time, unless `outside` is set.
        """
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.environment, **environment}),
            mock.patch.object(hosts, "ROOT", self.checkout),
            mock.patch("tempfile.tempdir", str(self.folder)),
            mock.patch.object(fake_cloud, "WORLD", str(self.folder)),
            mock.patch.object(Shell, "_call", CALL if self.outside else _inside),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main(words)
        return Outcome(code, out.getvalue(), err.getvalue())

    def calls(self) -> list[list[str]]:
        """Every command that the cloud was given, as words."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [[call[0], *call[1]] for call in map(json.loads, lines)]

    def things(self) -> set[str]:
        """What is there, and may cost money."""
        path = self.folder / "world.json"
        return set(json.loads(path.read_text())["things"]) if path.exists() else set()

    def host(self, name: str) -> Path:
        return self.folder / "hosts" / name

    def installed(self, *names: str) -> None:
        """Hosts as a bootstrap leaves them, without the time that it takes."""
        for name in names:
            self.host(name).mkdir(parents=True, exist_ok=True)
            (self.host(name) / "llama_jax").symlink_to(self.checkout)

    def end(self) -> None:
        """Ends what still runs on the hosts."""
        for path in self.folder.glob("hosts/*/llama_jax-runs/*/pid"):
            try:
                os.killpg(int(path.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


def _inside(shell: Shell, argv: list[str], stdin: str | None = None) -> str:
    """As `Shell._call`, with the fake called as a function."""
    if argv[0] not in PLAYED or {"ssh", "scp"} & set(argv[:5]):
        return CALL(shell, argv, stdin)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = fake_cloud.main(argv[0], list(argv[1:]), stdin or "")
        except SystemExit as fail:
            code = fail.code
    if code:
        raise Refused(argv, code, err.getvalue() or out.getvalue())
    return out.getvalue()


@pytest.fixture
def cloud(tmp_path, checkout):
    cloud = Cloud(tmp_path / "cloud", checkout)
    yield cloud
    cloud.end()


def eventually(true, seconds: float = 90) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
