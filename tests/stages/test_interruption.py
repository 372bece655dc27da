"""A process that is killed at any moment, and started again, is a process that was never killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.training.metrics import read_metrics
from tests.stages.runs import assert_same_run, finish, start, write_recipe

STEPS = 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, corpus, tokenizer_file):
    return write_recipe(tmp_path_factory.mktemp("recipe"), corpus, tokenizer_file, STEPS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, out, err = finish(start(["pretrain", recipe, "--out", str(folder)]))
    assert (code, out) == (0, ""), err
    return folder


def interrupt(process, number: int, after_step: int, delay: float) -> tuple[int, int, str]:
    """Sends a signal so many seconds after this step was logged; gives exit code, first step of the process, stderr."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if (step := re.match(r"step (\d+)/", line)) and int(step[1]) >= after_step:
            break
    time.sleep(delay)
    process.send_signal(number)
    code, _, rest = finish(process)
    text = "".join(lines) + rest
    resumed = re.search(r"resumed at step (\d+)", text)
    return code, int(resumed[1]) if resumed else 0, text


def test_kill_9_at_any_moment_changes_nothing(tmp_path, uninterrupted, recipe):
    folder, generator = tmp_path / "run", random.Random(3)
    begun = []
    # A save takes about as long as the five steps between two: half of these moments fall into one.
    for after in (generator.randrange(1, 10), generator.randrange(11, 25), generator.randrange(26, 50)):
        process = start(["pretrain", recipe, "--out", str(folder)])
        code, first, err = interrupt(process, signal.SIGKILL, after, generator.uniform(0, 0.2))
        assert code == -signal.SIGKILL, err
        begun.append(first)
    assert begun == sorted(begun) and begun[-1] > 0, f"no process goes back behind what was saved before it: {begun}"
    code, _, err = finish(start(["pretrain", recipe, "--out", str(folder), "--resume", "must"]))
    assert code == 0, err
    steps = [record["step"] for record in read_metrics(folder) if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert_same_run(folder, uninterrupted)


def test_sigterm_exits_with_42_and_nothing_is_lost(tmp_path, uninterrupted, recipe):
    folder = tmp_path / "run"
    process = start(["pretrain", recipe, "--out", str(folder)])
    code, _, err = interrupt(process, signal.SIGTERM, 8, 0.0)
    assert code == 42, err
    saved = int(re.search(r"SIGTERM received: step (\d+) is saved", err)[1])
    assert "Traceback" not in err and 8 <= saved < STEPS
    code, _, err = finish(start(["pretrain", recipe, "--out", str(folder)]))
    assert code == 0 and f"resumed at step {saved}" in err
    assert_same_run(folder, uninterrupted)


LIMITED = """
import resource, sys
from llama_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_ends_with_2_and_with_space_again_the_run_goes_on(tmp_path, uninterrupted, recipe):
    """A limit on the size of files stands in for the disk: a checkpoint's are larger, all others smaller."""
    folder = tmp_path / "run"
    words = ["pretrain", recipe, "--out", str(folder)]
    # Without the tests' folder of compiled programs, in which it would leave halves.
    alone = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    alone["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    full = subprocess.run([sys.executable, "-c", LIMITED, *words], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert full.returncode == 2 and "llama_jax/" not in full.stderr, full.stderr
    (said,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert (
        "a checkpoint could not be written" in said
        and "File too large" in said
        and "goes on from the checkpoint before" in said
    )
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()], "what is not whole is none"
    code, _, err = finish(start(words))
    assert code == 0, err
    assert_same_run(folder, uninterrupted)


def test_a_source_that_is_damaged_half_way_ends_with_2_and_names_the_line(tmp_path, tokenizer_file):
    rows = [json.dumps({"text": f"{number} plain words in spain"}) for number in range(400)]
    rows[333] = rows[333][:12]
    damaged = tmp_path / "corpus.jsonl"
    damaged.write_text("\n".join(rows))
    words = ["pretrain", write_recipe(tmp_path, damaged, tokenizer_file), "--data.sources", f"jsonl:{damaged}"]
    code, _, err = finish(start([*words, "--out", str(tmp_path / "run")]))
    assert code == 2 and f"{damaged}" in err and "334" in err and "Traceback" not in err, err
