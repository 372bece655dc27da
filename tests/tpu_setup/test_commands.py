"""What is printed is what is run, what the guide shows is accepted, and nothing but the standard library is needed."""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.tpu_setup.conftest import PLAYED

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "tpu_setup"
TWO = ("l7", "--tpu", "v5p-16", "--zone", "us-east5-a")
COMPUTE = ("l7", "--backend", "compute", "--tpu", "v6e-16", "--zone", "us-east5-a", "--project", "p")
GKE = (
    "l7",
    "--backend",
    "gke",
    "--tpu",
    "v7x:2x2x2",
    "--zone",
    "us-east5-a",
    "--project",
    "p",
    "--cluster",
    "c",
    "--image",
    "i",
)
SSH = ("l7", "--backend", "ssh", "--hosts", "one,two")
SLURM = ("l7", "--backend", "slurm", "--nodes", "2")
GUIDES = [SETUP / "README.md", ROOT / "docs" / "tpu.md"]
BLOCKS, OTHERS = (re.findall(r"^```console\n(.*?)^```$", path.read_text(), re.M | re.S) for path in GUIDES)


def test_every_shell_file_passes_shellcheck():
    found = [path for path in SETUP.iterdir() if path.read_text().startswith("#!/usr/bin/env bash")]
    assert len(found) == 3 and {path.name for path in SETUP.glob("*.sh")} <= {path.name for path in found}
    shellcheck = Path(sys.executable).with_name("shellcheck")
    words = [str(shellcheck if shellcheck.exists() else shutil.which("shellcheck")), "--shell=bash", *map(str, found)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("flags", [TWO, COMPUTE, GKE, SSH, SLURM], ids=["queued", "compute", "gke", "ssh", "slurm"])
def test_a_dry_run_prints_what_the_real_run_does_and_does_nothing(cloud, flags):
    """Verb by verb, in the order of a life: the lines of --dry-run are the words that the cloud is then given."""
    rents = flags not in (SSH, SLURM)
    queued = flags is TWO
    cloud.installed("one", "two") if flags is SSH else None
    cloud.fates([["ACTIVE" if queued else "RUNNING"], ["Completed"]])
    verbs = [*(["create", "wait"] if rents else []), *(["bootstrap"] if flags not in (SSH, SLURM) else [])]
    for verb in (*verbs, "run", *(["stop"] if flags is not SLURM else []), *(["delete"] if rents else [])):
        command = ("--", "sleep", "it's 60") if verb == "run" else ()
        before = cloud.calls(), cloud.things(), sorted(cloud.folder.glob("hosts/*"))
        dry = cloud(verb, *flags, "--dry-run", *command)
        assert (dry.code, dry.err) == (0, "")
        assert (cloud.calls(), cloud.things(), sorted(cloud.folder.glob("hosts/*"))) == before, verb
        real = cloud(verb, *flags, *command)
        assert real.code == 0, real.err
        assert sorted(words_of(dry.out)) == sorted(
            known(call) for call in cloud.calls()[len(before[0]) :] if call[0] in PLAYED[:8]
        ), verb


def words_of(printed: str) -> list[list[str]]:
    """The commands of a dry run that the fake plays, without what they are given on stdin, and git's and bash's own."""
    text = re.sub(r" <<'EOF'\n.*?\nEOF$", "", printed, flags=re.M | re.S)
    lines = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    return [known(words) for words in lines if words[0] in PLAYED]


def known(words: list[str]) -> list[str]:
    """With what only the cloud knows, addresses and names of instances, as a dry run puts it."""
    text = [re.sub(r"10\.0\.0\.(\d)", lambda found: f"ADDRESS-OF-l7-W-{int(found[1]) - 2}", word) for word in words]
    return [re.sub(r"\bl7-(\d)x", r"l7-000\1", word) for word in text if not word.startswith("/") or "sbatch" in word]


def test_a_dry_run_of_the_rest_does_nothing_either(cloud):
    for flags in (TWO, COMPUTE, GKE, SSH, SLURM):
        for verb in ("logs", "status", "doctor", *(["cost"] if flags not in (SSH, SLURM) else [])):
            result = cloud(verb, *flags, "--dry-run", "--price", "1")
            assert result.code == 0 and result.out, result.err
    assert not cloud.calls()


def test_it_runs_where_nothing_is_installed(cloud):
    """Without site-packages, and with nothing of jax or numpy."""
    with cloud.command("create", *TWO, "--dry-run") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "queued-resources create l7" in out, err


def commands(blocks: list[str]) -> list[list[str]]:
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if line.startswith("$ python3 -m tpu_setup")
    ]


@pytest.mark.parametrize(
    ("blocks", "words"),
    [(blocks, words) for blocks in (BLOCKS, OTHERS) for words in commands(blocks)],
    ids=lambda found: " ".join(found[3:6]) if found[0] == "python3" else "",
)
def test_every_command_of_the_guides_is_accepted(cloud, blocks, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in slice_files(blocks).items():
        (tmp_path / name).write_text(text)
    cut = words.index("--") if "--" in words else len(words)
    result = cloud(*words[3:cut], *([] if "--help" in words else ["--dry-run"]), *words[cut:])
    assert result.code == 0, result.err


def slice_files(blocks: list[str]) -> dict[str, str]:
    """The files of flags that a guide shows with `cat`."""
    found = re.findall(r"^\$ cat (\S+)\n(.*?)(?=^\$ |\Z)", "\n".join(blocks), re.M | re.S)
    return {name: text.strip() + "\n" for name, text in found}


def test_the_guide_shows_every_verb_and_its_printed_commands_are_those_printed(cloud, tmp_path, monkeypatch):
    from tpu_setup.__main__ import VERBS

    assert {words[3] for words in commands(BLOCKS)} >= set(VERBS)
    monkeypatch.chdir(tmp_path)
    for name, text in slice_files(BLOCKS).items():
        (tmp_path / name).write_text(text)
    shown = [block.split("\n", 1) for block in BLOCKS if "--dry-run" in block.split("\n", 1)[0]]
    assert len(shown) == 4
    for line, printed in shown:
        out = cloud(*shlex.split(line)[4:]).out
        out = out.replace(str(cloud.checkout), ".").replace(str(cloud.folder), tempfile.gettempdir())
        assert out.strip() == printed.strip()
