"""README and guides tell the truth: their bash and Python blocks run as they stand, and what they name exists."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from llama_jax import cli
from llama_jax.data.instruction_world import textbook
from llama_jax.training.metrics import read_metrics
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README, FINETUNING, RLHF, TPU = "README.md", "docs/finetuning.md", "docs/rlhf.md", "docs/tpu.md"
EVALUATION, GPU = "docs/evaluation.md", "docs/gpu.md"
DOCUMENTS = (README, FINETUNING, RLHF, TPU, EVALUATION, GPU)
RECIPES = ("domain_qa", "style", "classification", "summarisation", "code")


def blocks(document: str, *languages: str) -> Iterator[tuple[str, str]]:
    """Language and code of a document's blocks in these languages, in their order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)
    return ((language, code) for language, code in found if language in languages)


def commands(document: str, *languages: str) -> str:
    return " ".join(code for _, code in blocks(document, *languages))


def run_blocks(document: str, folder: Path, **more: str) -> None:
    """Runs a document's bash and Python blocks in one folder, as a user for whom llama-jax is installed.

    In the order of the text: a block may use what an earlier one made.
    """
    (folder / "bin").mkdir()
    for name, words in {"llama-jax": "-m llama_jax.cli", "python": ""}.items():
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **more}
    # The suite's eight fake devices are nobody's machine, and a user's programs are optimised.
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        environment.pop(name, None)
    for language, code in blocks(document, "bash", "python"):
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        result = subprocess.run(
            [*shell, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{code}\n{result.stderr[-2000:]}"


def test_the_blocks_of_the_readme_run(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(topics.values()))
    run_blocks(README, tmp_path)


def test_the_blocks_on_finetuning_run_and_every_recipe_lowers_its_loss(tmp_path):
    """With a tiny model, and with the flags that the guide gives for one."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    texts = [path.read_text() for path in sorted((ROOT / "experiments" / "data").glob("*.jsonl"))]
    write_tiny_checkpoint(tmp_path / "tiny" / "hf", texts)
    (flags,) = re.findall(r'FLAGS="([^"]+)"', commands(FINETUNING, "console"))
    run_blocks(FINETUNING, tmp_path, MODEL="tiny/hf", FLAGS=f"{flags} --loop.log-every 1")
    for name in RECIPES:
        losses = [record["train/loss"] for record in read_metrics(tmp_path / "runs" / name) if "train/loss" in record]
        assert losses[-1] < losses[0] - 1, f"{name}: {losses}"


def test_the_blocks_on_preferences_run_and_what_they_leave_is_there(tmp_path):
    """With a tiny model, and with the settings that the guide gives for a laptop."""
    write_tiny_checkpoint(tmp_path / "tiny" / "hf", [textbook(0, number) for number in range(40)], vocab_size=500)
    (small,) = re.findall(r'SMALL="([^"]+)"', commands(RLHF, "console"))
    run_blocks(RLHF, tmp_path, MODEL="tiny/hf", SMALL=small)
    for name in ("helpful", "best", "ppo", "dpo", "distilled"):
        assert (tmp_path / "runs" / name / "report.md").stat().st_size > 500, name
    assert len([one for one in read_metrics(tmp_path / "runs" / "ppo") if "reward/mean" in one]) == 2


def test_the_blocks_on_evaluation_run_and_find_what_the_corpus_held(tmp_path):
    write_tiny_checkpoint(tmp_path / "tiny" / "hf", [textbook(0, number) for number in range(40)], vocab_size=500)
    run_blocks(EVALUATION, tmp_path, MODEL="tiny/hf")
    results = json.loads((tmp_path / "runs/animals/results.json").read_text())
    first = results["tasks"][0]
    assert (first["task"], first["shots"], first["n"]) == ("animals", 1, 2)
    seen = [json.loads(line) for line in (tmp_path / "runs/seen/samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in seen] == ["animals-0", "animals-1"]
    flies, swims = (row["shares"][0] for row in seen)
    assert flies == 1 and swims < 1  # the corpus holds the first, whose beginning the second shares
    assert len(list((tmp_path / "study/sheets").glob("*.html"))) == 2
    assert "animals" in (tmp_path / "reports/animals/report.html").read_text()


def test_there_are_bash_blocks_for_the_first_steps():
    for step in ("llama-jax doctor", "llama-jax tokenizer train", "llama-jax pretrain", "llama-jax sft"):
        assert step in commands(README, "bash")
    for name in RECIPES:
        assert f"llama-jax sft sft_{name} " in commands(FINETUNING, "bash")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_and_targets_in_the_text_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = commands(document, "bash", "console")
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    verbs = set(re.findall(r"llama-jax ([a-z][a-z-]*)", text))
    assert verbs and verbs <= set(cli.VERBS)


@pytest.mark.parametrize(
    "document", sorted(str(path.relative_to(ROOT)) for path in [ROOT / README, *ROOT.glob("docs/*.md")])
)
def test_links_and_paths_exist(document):
    text = (ROOT / document).read_text()
    links = [(ROOT / document).parent / link for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    paths = [ROOT / path for path in re.findall(r"`((?:bench|docs|experiments|llama_jax|tests)/[\w./-]*)`", text)]
    missing = [path for path in (*links, *paths) if not path.exists()]
    assert not missing


def test_the_table_of_folders_names_what_is_there():
    named = re.findall(r"^\| `([^`]+)` \|", (ROOT / README).read_text(), re.M)
    assert len(named) > 10 and all((ROOT / name).exists() for name in named)


def test_every_test_that_the_guide_on_preferences_names_is_there():
    text = (ROOT / RLHF).read_text().partition("| property | test |")[2]
    named = set(re.findall(r"`(\w+/test_\w+\.py)`", text))
    assert len(named) > 12 and all((ROOT / "tests" / name).is_file() for name in named)
    places = set(re.findall(r"`(\w+/\w+\.py)`", (ROOT / RLHF).read_text())) - named
    assert places and all((ROOT / "llama_jax" / name).is_file() for name in places)
