"""`llama-jax generate` from a checkpoint on disk: the continuation alone on stdout, and every way it can end."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from llama_jax import cli
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.step import new_state

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ids(tokenizer) -> list[int]:
    return tokenizer.encode("who sat \N{LLAMA}", bos=False)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, speller, tokenizer, ids) -> Path:
    """A run whose newest checkpoint says `ids` and EOS, the one before it EOS at once, and the first one `ids` again and again."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step, said in ((10, ids * 12), (20, [tokenizer.eos_id]), (30, [*ids, tokenizer.eos_id])):
        model = speller(said)
        state = new_state(model, make_optimizer(OptimizerConfig(warmup_steps=1), model.config, 100))
        checkpoints.save(replace(state, step=jnp.int32(step)), {}, tokenizer)
    checkpoints.close()
    return folder


def outcome(capfd, *words) -> tuple[int, str, str]:
    code = cli.main(["generate", *map(str, words)])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("prompt", [[], [""]])
def test_an_empty_prompt_starts_from_bos(capfd, run_folder, prompt):
    assert outcome(capfd, run_folder, *prompt) == (0, "who sat \N{LLAMA}", "")


def test_the_prompt_is_continued_and_not_repeated(capfd, run_folder):
    assert outcome(capfd, run_folder, "who", "--temperature", "0") == (0, " sat \N{LLAMA}", "")


def test_the_number_of_tokens_is_a_limit(capfd, run_folder, ids, tokenizer):
    words = (run_folder / "checkpoints" / "10", "", "--max-new-tokens", 70)
    assert outcome(capfd, *words) == (0, tokenizer.decode((ids * 12)[:70]), "")


def test_the_context_is_a_limit(capfd, run_folder, ids, tokenizer):
    """Of 96 positions BOS takes one; the default of 200 tokens does not fit."""
    assert outcome(capfd, run_folder / "checkpoints" / "10") == (0, tokenizer.decode((ids * 12)[:95]), "")


def test_one_checkpoint_of_a_run_can_be_named(capfd, run_folder):
    assert outcome(capfd, run_folder / "checkpoints" / "20") == (0, "", "")


def test_a_missing_checkpoint_is_bad_input(capfd, tmp_path):
    for path, found in ((tmp_path / "none", "none"), (tmp_path, str(tmp_path))):
        code, out, err = outcome(capfd, path, "who")
        assert (code, out) == (2, "") and err.startswith("error: ") and found in err and "Traceback" not in err


def test_a_setting_out_of_range_is_bad_input(capfd, run_folder):
    code, out, err = outcome(capfd, run_folder, "who", "--temperature", "-1")
    assert (code, out) == (2, "") and "--temperature is -1.0" in err


def test_a_prompt_beyond_the_context_is_bad_input(capfd, run_folder):
    code, out, err = outcome(capfd, run_folder, "\N{SNOWMAN}" * 40)  # three byte pieces each, and 96 positions
    assert (code, out) == (2, "") and "96" in err


def test_a_reader_that_leaves_ends_it_quietly(run_folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f'"{sys.executable}" -m llama_jax.cli generate "{run_folder}/checkpoints/10" | head -c 5'
    done = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=run_folder, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("who s", "")
