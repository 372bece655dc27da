"""The pretraining stage as the command line runs it: what a run leaves, how it goes on, and how it refuses."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.conversion.load import load_model
from llama_jax.stages import pretrain
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics
from tests.stages.runs import STEPS, assert_same_run, learned, newest, write_recipe

LOG_LINE = re.compile(
    r"step (\d+)/20 [\d.]+% loss \d+\.\d{3} lr \d\.\de-\d\d gnorm \d+\.\d\d [\d.]+[kMG]? tok/s"
    r"( MFU \d+%)?( HBM [\d.]+/[\d.]+)? data-wait [\d.]+% eta (\d+d\d\dh|\d+h\d\d|\d+m\d\d|\d+s)"
)


def main(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `llama-jax pretrain`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["pretrain", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, corpus, tokenizer_file):
    return write_recipe(tmp_path_factory.mktemp("recipe"), corpus, tokenizer_file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe):
    """A run that nothing interrupted: its folder and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    code, out, err = main(recipe, "--out", folder)
    assert (code, out) == (0, ""), err
    return folder, err


def back_to_step_10(finished, tmp_path) -> Path:
    """A copy of the finished run in which nothing beyond step 10 was saved."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for step in (15, 20):
        shutil.rmtree(folder / f"checkpoints/{step}")
    return folder


def test_a_run_leaves_a_complete_folder(finished, tokenizer_file, recipe):
    folder, _ = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        *("checkpoints", "config.json", "metrics.jsonl", "samples", "tensorboard", "tokenizer.model")
    ]
    assert (folder / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [10, 15, 20]
    resolved = json.loads((folder / "config.json").read_text())
    assert resolved["stage"] == "pretrain" and resolved["config"]["optimizer"]["peak_lr"] == 1e-3
    assert {"llama_jax", "jax", "flax", "optax"} <= resolved["versions"].keys()
    assert [(start["device"], start["devices"]) for start in resolved["starts"]] == [("cpu", 8)]


def test_every_step_is_logged_once_and_the_loss_falls(finished):
    records = learned(finished[0])
    train = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "eval/loss" in record] == [10, 20]
    assert train[0]["train/loss"] == pytest.approx(math.log(304), abs=0.1)
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.3
    assert train[0]["train/lr"] == pytest.approx(1e-3 / 4) and train[-1]["train/lr"] == pytest.approx(1e-4)
    evaluated = [record for record in records if "eval/loss" in record]
    assert evaluated[1]["eval/loss"] < evaluated[0]["eval/loss"]
    # Bits per byte and nats per token describe one sum: their ratio is a property of the documents.
    ratios = [record["eval/bits_per_byte"] / record["eval/loss"] for record in evaluated]
    assert ratios[0] == pytest.approx(ratios[1])


def test_the_log_speaks_in_the_agreed_form(finished):
    _, err = finished
    lines = err.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "eval" not in line]
    assert [int(LOG_LINE.fullmatch(line)[1]) for line in steps] == list(range(1, STEPS + 1))
    for part in ("devices     8 x cpu, mesh fsdp=8, 1 process(es)", "batch       128 tokens: 8 sequences of 16"):
        assert part in err
    assert re.search(r"memory      \d+\.\d\d GB a device predicted", err)
    assert lines[-1].startswith(f"done: {finished[0]}; try: llama-jax generate")


def test_a_finished_run_that_is_started_again_changes_nothing(finished, recipe, tmp_path):
    again = shutil.copytree(finished[0], tmp_path / "run")
    code, _, err = main(recipe, "--out", again)
    assert code == 0 and "resumed at step 20" in err
    assert_same_run(again, finished[0])


@pytest.mark.parametrize("flags", [(), ("--compute.offload",)], ids=["as it was", "its moments on the host"])
def test_a_run_goes_on_to_the_bit(finished, recipe, tmp_path, flags):
    folder = back_to_step_10(finished, tmp_path)
    code, _, err = main(recipe, "--out", folder, "--resume", "must", *flags)
    assert code == 0 and "resumed at step 10" in err
    assert_same_run(folder, finished[0])


def test_a_run_goes_on_on_another_mesh(finished, recipe, tmp_path):
    folder = back_to_step_10(finished, tmp_path)
    code, _, err = main(recipe, "--out", folder, "--mesh", "data=2,fsdp=4")
    assert code == 0 and "resumed at step 10" in err, err
    ours, theirs = learned(folder), learned(finished[0])
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert newest(folder)["cursor"] == newest(finished[0])["cursor"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_42_and_the_run_goes_on_to_the_bit(
    finished, recipe, tmp_path, monkeypatch, number
):
    feed, fed = loop.to_devices, []

    def kill_at_step_7(*arguments):
        fed.append(1)
        if len(fed) == 7:
            os.kill(os.getpid(), number)
        return feed(*arguments)

    folder = tmp_path / "run"
    before = signal.signal(number, signal.default_int_handler)  # a shell in the background has SIGINT ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "to_devices", kill_at_step_7)
            code, _, err = main(recipe, "--out", folder)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert code == 42
    assert f"preempted: {number.name} received: step 7 is saved; start the same command again" in err
    assert newest(folder)["step"] == 7
    assert main(recipe, "--out", folder)[0] == 0
    assert_same_run(folder, finished[0])


def poison(monkeypatch, bad_steps) -> None:
    """Makes the head NaN during these steps, and what it was after them."""
    real = pretrain.compile_step

    def with_head(state, head):
        model = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(head, leaf.sharding) if "head_DV" in str(path[-1]) else leaf, state.model
        )
        return dataclasses.replace(state, model=model)

    def compile_step(*arguments):
        train_step, plan = real(*arguments)

        def step(state, batch):
            if int(state.step) + 1 not in bad_steps:
                return train_step(state, batch)
            head = np.array(state.model.head_DV)
            state, metrics = train_step(with_head(state, np.full_like(head, np.nan)), batch)
            return with_head(state, head), metrics

        return step, plan

    monkeypatch.setattr(pretrain, "compile_step", compile_step)


def test_a_step_that_is_not_finite_is_skipped_and_counted(finished, recipe, tmp_path, monkeypatch):
    poison(monkeypatch, {6, 9, 10})
    code, _, err = main(recipe, "--out", tmp_path / "run")
    assert code == 0
    assert [line.split()[1] for line in err.splitlines() if "SKIPPED" in line] == ["6/20", "9/20", "10/20"]
    assert "SKIPPED 3 steps so far, not finite" in err
    train = {r["step"]: r for r in learned(tmp_path / "run") if "train/skipped" in r}
    assert [train[step]["train/skipped"] for step in (5, 6, 8, 9, 10, 20)] == [0, 1, 1, 2, 3, 3]
    assert "train/loss" not in train[6] and math.isfinite(train[20]["train/loss"])
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    undisturbed = {r["step"]: r for r in learned(finished[0]) if "train/lr" in r}
    assert train[20]["train/lr"] == undisturbed[17]["train/lr"], "three steps were not taken"


def test_three_steps_in_a_row_end_the_run_with_3_and_the_last_good_checkpoint(finished, recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, {12, 13, 14})
        code, _, err = main(recipe, "--out", folder)
    assert code == 3 and "Traceback" not in err
    assert "not finite in 3 steps in a row, up to step 14" in err and "--optimizer.peak-lr" in err
    assert newest(folder)["step"] == 10
    assert main(recipe, "--out", folder)[0] == 0
    assert_same_run(folder, finished[0])


def test_an_absurd_learning_rate_ends_with_3(recipe, tmp_path):
    code, _, err = main(recipe, "--out", tmp_path / "run", "--optimizer.peak-lr", "1e30", "--loop.save-every", "1")
    assert code == 3 and "diverged: loss or gradient was not finite in 3 steps in a row" in err
    model, _ = load_model(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(model)))


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (("--optimizer.peak-lr", "2e-3"), "optimizer.peak_lr: 0.001 there, 0.002 here"),
        (("--seed", "1"), "seed: 0 there, 1 here"),
        (("--data.held-out", "0.2"), "data.held_out: 0.1 there, 0.2 here"),
        (("--train-tokens", "4096"), "train_tokens: 2560 there, 4096 here"),
    ],
)
def test_going_on_with_another_recipe_is_refused(finished, recipe, flags, change):
    code, _, err = main(recipe, "--out", finished[0], *flags)
    assert code == 2 and "Traceback" not in err
    assert f"the run in {finished[0]} was begun with another recipe:\n  {change}\nrestore these values" in err


def test_resume_never_and_must(finished, recipe, tmp_path):
    code, _, err = main(recipe, "--out", finished[0], "--resume", "never")
    assert code == 2 and f"{finished[0]} holds a run at step 20; name another --out" in err
    code, _, err = main(recipe, "--out", tmp_path / "new", "--resume", "must")
    assert code == 2 and "holds no checkpoint; --resume auto begins one" in err


def test_parameters_of_a_checkpoint_begin_a_run_with_a_longer_context(finished, recipe, tmp_path):
    flags = ("--model.context-length", 32, "--batch-tokens", 256, "--train-tokens", 5 * 256, "--model.rope-theta", 1e5)
    code, _, err = main(recipe, "--out", tmp_path / "run", "--init-from", finished[0], *flags)
    assert code == 0, err
    last, first = learned(finished[0])[-2], learned(tmp_path / "run")[0]
    assert first["step"] == 1 and first["train/loss"] == pytest.approx(last["train/loss"], abs=0.15)


def files_in(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_a_dry_run_touches_nothing(finished, recipe, tmp_path):
    before = files_in(tmp_path), files_in(finished[0]), files_in(Path(recipe).parent)
    for out in (tmp_path / "new", finished[0]):
        code, stdout, _ = main(recipe, "--out", out, "--dry-run", "--json", "--optimizer.peak-lr", "2e-3")
        plan = json.loads(stdout)
        assert code == 0 and plan["recipe"]["optimizer"]["peak_lr"] == 2e-3
        assert plan["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
        assert (plan["steps"], plan["sequences_per_batch"]) == (STEPS, 8)
        assert plan["bytes_per_device"]["state_and_batch"] > 3 * 4 * plan["parameters"] / 8
    code, stdout, _ = main(recipe, "--out", tmp_path / "new", "--dry-run", "--optimizer.peak-lr", "2e-3")
    assert code == 0 and "parameters  " in stdout and "memory      " in stdout
    assert json.loads(stdout.split("\nrecipe ")[1]) == plan["recipe"] | {"out": str(tmp_path / "new"), "json": False}
    assert (files_in(tmp_path), files_in(finished[0]), files_in(Path(recipe).parent)) == before


def test_logging_every_zero_steps_logs_no_step_and_trains_the_same(finished, recipe, tmp_path):
    assert main(recipe, "--out", tmp_path / "run", "--loop.log-every", 0)[0] == 0
    assert not [record for record in read_metrics(tmp_path / "run") if "train/loss" in record]
    assert newest(tmp_path / "run")["fingerprints"] == newest(finished[0])["fingerprints"]


# Flags, and what the message must say: what was found, what was expected, and what to do.
BAD_INPUT = {
    "missing data file": (("--data.sources", "text:{tmp}/nowhere.txt"), r"nowhere\.txt.*"),
    "empty corpus": (("--data.sources", "text:{tmp}/empty.txt"), r"empty\.txt.*"),
    "no data": (("--data.sources",), r"No data. Set --data.sources to SCHEME:NAME"),
    "unknown scheme": (("--data.sources", "texd:a.txt"), r"texd.*text"),
    "one document to split": (("--data.sources", "text:{tmp}/one.txt"), r"single document.*--data.held-out 0"),
    "tokenizer of another size": (
        ("--model.vocab-size", "320"),
        r"has 304 pieces, the model has 320; use --model.vocab-size 304",
    ),
    "missing tokenizer": (("--tokenizer", "{tmp}/no.model"), r"No tokenizer at .*no\.model.*llama-jax tokenizer"),
    "no tokenizer": (("--tokenizer", "{tmp}/one.txt"), r"one\.txt is not a SentencePiece model.*Expected"),
    "vocabulary too large to train": (
        ("--tokenizer", "", "--model.vocab-size", "20000"),
        r"too small for a vocabulary of 20000: it gives at most \d+ pieces",
    ),
    "mesh of too few devices": (("--mesh", "fsdp=3"), r"asks for 3 devices, but 8 are present; try --mesh auto"),
    "mesh that does not divide": (
        ("--mesh", "tensor=8"),
        r"n_heads 4 does not divide over tensor = 8.*one of \[1, 2, 4\]",
    ),
    "mesh that cannot be read": (("--mesh", "model=8"), r"cannot read 'model=8'; expected 'auto' or AXIS=SIZE"),
    "batch that does not divide": (
        ("--batch-tokens", "64", "--train-tokens", "6400"),
        r"sequences in a micro-batch 4 does not divide over data\*fsdp = 8 devices",
    ),
    "batch of broken sequences": (("--batch-tokens", "100"), r"100 is not a multiple .* 16; try --batch-tokens 96"),
    "micro-batches": (("--micro-batches", "3"), r"--micro-batches 3 does not divide the 8 sequences"),
    "warm-up as long as the run": (("--optimizer.warmup-steps", "20"), r"warmup_steps is 20.*--optimizer.warmup-steps"),
    "out below a file": (("--out", "{tmp}/one.txt/run"), r"--out .* cannot be written to.*name another with --out"),
    "beginning that is none": (("--init-from", "{tmp}/none"), r"none is not a checkpoint: it does not exist"),
    "beginning of another shape": (
        ("--init-from", "{finished}", "--model.n-layers", "1"),
        r"is a checkpoint of another model: n_layers 2 there and 1 here",
    ),
    "beginning of another tokenizer": (
        ("--init-from", "{finished}", "--tokenizer", ""),
        r"is a checkpoint of another model: tokenizer \w+ there and \w+ here",
    ),
    "unknown flag": (("--optimizer.peek-lr", "1e-3"), r"--optimizer\.peek-lr(.|\n)*--optimizer\.peak-lr"),
    "value of the wrong type": (("--seed", "many"), r"--seed(.|\n)*many"),
    "value that is no choice": (("--resume", "perhaps"), r"--resume(.|\n)*auto"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_a_message_and_exit_code_2(request, recipe, tmp_path, flags, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("one short document\n")
    names = {"tmp": tmp_path}
    if any("{finished}" in flag for flag in flags):
        names["finished"] = request.getfixturevalue("finished")[0]
    flags = [flag.format(**names) for flag in flags]
    code, out, err = main(recipe, *(() if "--out" in flags else ("--out", tmp_path / "run")), *flags)
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    assert re.search(message, err), err
