"""The README tells the truth: its bash blocks run as they stand, and what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from llama_jax import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A folder with a corpus.txt, and the environment of a user for whom llama-jax is installed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus.txt").write_text("\n".join(topics.values()))
    command = folder / "bin" / "llama-jax"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m llama_jax.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # the suite's eight fake devices are nobody's machine
    return folder, environment


def test_bash_and_python_blocks_run(machine):
    """In the order of the text, in one folder: a block may use what an earlier one made."""
    folder, environment = machine
    for block in re.findall(r"^```(?:bash|python)\n.*?^```$", README, re.M | re.S):
        language, code = block.strip("`").split("\n", 1)
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        result = subprocess.run(
            [*shell, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{block}\n{result.stderr[-2000:]}"


def test_there_are_bash_blocks_for_the_first_steps():
    commands = " ".join(blocks("bash"))
    for step in ("llama-jax doctor", "llama-jax tokenizer train", "llama-jax pretrain"):
        assert step in commands


def test_verbs_and_targets_in_the_text_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = " ".join([*blocks("bash"), *blocks("console")])
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    verbs = set(re.findall(r"llama-jax ([a-z][a-z-]*)", text))
    assert {"doctor", "pretrain", "generate"} <= verbs <= set(cli.VERBS)


def test_folders_and_links_exist():
    named = re.findall(r"^\| `([^`]+)` \|", README, re.M) + re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
