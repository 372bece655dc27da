"""The dpo stage: rewards that rank answers by grade, measured on what was saved, and a run that goes on after a stop."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from llama_jax import cli
from llama_jax.config import Compute
from llama_jax.conversion.load import load_model
from llama_jax.data.pairs import PreferenceConfig, load_pairs
from llama_jax.data.preferences import Strength
from llama_jax.errors import UserError
from llama_jax.evaluation.rewards import read_scores, write_dpo_report
from llama_jax.generation.scoring import score_tokens
from llama_jax.model.lora import LoraConfig
from llama_jax.stages import dpo
from llama_jax.stages.dpo import DPOConfig
from llama_jax.text.chat import Llama2Chat
from llama_jax.training.checkpoint import find_checkpoints, read_metadata
from llama_jax.training.held_out_pairs import accuracy_of
from llama_jax.training.loop import LoopConfig
from llama_jax.training.metrics import read_metrics
from llama_jax.training.optimizer import OptimizerConfig
from tests.stages.graded_pairs import rows, write, write_base
from tests.stages.runs import assert_same_run, on_one_device, stopped_at

one_device = on_one_device(dpo)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory) -> DPOConfig:
    """About 480 pairs, in 15 steps."""
    folder = tmp_path_factory.mktemp("pairs")
    tests = write(folder / "test.jsonl", rows(2, 200))
    return DPOConfig(
        checkpoint=str(base),
        data=PreferenceConfig((write(folder / "pairs.jsonl", rows(1, 600)),), tests=(tests,), held_out=0.2),
        pairs=32,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, final_lr_ratio=1.0, weight_decay=0.0),
        compute=Compute(dtype="float32", remat="none"),
        loop=LoopConfig(log_every=1, eval_every=100, save_every=5),
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    dpo.run(dataclasses.replace(recipe, out=str(folder)))
    return folder


def rewards(folder: Path, kind: str, level: Strength | None = None) -> np.ndarray:
    """Of chosen and rejected answers (pairs, 2), of one strength if given."""
    known = [row for row in read_scores(folder) if row["set"] == kind]
    return np.array([row["scores"] for row in known if level is None or row["strength"] == level])


def evaluations(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder) if "eval/loss" in record]


def test_it_learns_what_is_preferred_and_the_more_so_the_stronger(trained):
    first, last = evaluations(trained)
    assert first["eval/loss"] == pytest.approx(math.log(2), rel=1e-5) and abs(first["eval/margin"]) < 1e-5
    assert last["eval/loss"] < 0.6 and last["eval/accuracy"] > 0.7
    by_strength = {
        level: accuracy_of(np.concatenate([rewards(trained, kind, level) for kind in ("held out", "test")]))
        for level in Strength
    }
    assert list(by_strength.values()) == sorted(by_strength.values()), by_strength
    assert by_strength[Strength.SIGNIFICANTLY] > 0.95 and abs(by_strength[Strength.NEGLIGIBLY] - 0.5) < 0.2


def test_the_log_tells_how_far_it_went_and_ends_in_what_the_file_says(trained, recipe):
    steps = [record for record in read_metrics(trained) if "train/margin" in record]
    assert len(steps) == 15 and abs(steps[0]["train/margin"]) < 1e-5 < steps[-1]["train/margin"]
    for record in steps:
        drift = record["train/chosen_drift"] - record["train/rejected_drift"]
        assert record["train/margin"] == pytest.approx(recipe.beta * drift, rel=1e-3, abs=1e-5)
    held_out, last = rewards(trained, "held out"), evaluations(trained)[-1]
    assert last["eval/accuracy"] == pytest.approx(accuracy_of(held_out))
    assert last["eval/chosen_drift"] == pytest.approx(held_out[:, 0].mean() / recipe.beta, rel=1e-4)


def by_the_models(folder: Path, recipe: DPOConfig) -> np.ndarray:
    """The rewards of the test set (pairs, 2) from the saved model and the one it began as, dialogue by dialogue."""
    after, tokenizer = load_model(folder, dtype="float32")
    before, _ = load_model(recipe.checkpoint)
    pairs = load_pairs(recipe.data, tokenizer, Llama2Chat(), 128).tests
    texts = [ids.tolist() for number in range(len(pairs)) for ids in pairs[number]]
    gained = [
        after_it[0][-answer:].sum() - before_it[0][-answer:].sum()
        for after_it, before_it, answer in zip(
            score_tokens(after, texts), score_tokens(before, texts), pairs.answers.flat, strict=True
        )
    ]
    return recipe.beta * np.array(gained).reshape(-1, 2)


def test_the_saved_model_has_the_rewards_that_were_reported(trained, recipe):
    """By another program, on dialogues that stand alone."""
    np.testing.assert_allclose(rewards(trained, "test"), by_the_models(trained, recipe), atol=2e-4)


def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(recipe, trained, tmp_path):
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"))
    with stopped_at(7, "step 7"):
        dpo.run(config)
    with pytest.raises(UserError, match="begun with another recipe:\n  beta: 0.1 there, 0.2 here"):
        dpo.run(dataclasses.replace(config, beta=0.2))
    others = dataclasses.replace(recipe.data, sources=(write(tmp_path / "others.jsonl", rows(3, 600)),))
    with pytest.raises(UserError, match="begun with another recipe:\n  pairs: "):
        dpo.run(dataclasses.replace(config, data=others))
    dpo.run(dataclasses.replace(config, resume="must"))
    assert_same_run(tmp_path / "run", trained)
    assert (tmp_path / "run" / "scores.jsonl").read_bytes() == (trained / "scores.jsonl").read_bytes()


def test_adapters_learn_beside_their_reference_and_are_a_model_like_any_other(recipe, tmp_path):
    """With dropout, which is off while scoring, and after a stop; they alone are saved."""
    lora = LoraConfig(rank=8, dropout=0.1)
    optimizer = dataclasses.replace(recipe.optimizer, peak_lr=1e-2)
    config = dataclasses.replace(recipe, train="lora", lora=lora, optimizer=optimizer, out=str(tmp_path / "run"))
    with stopped_at(7, "step 7"):
        dpo.run(config)
    dpo.run(dataclasses.replace(config, resume="must"))
    assert accuracy_of(rewards(tmp_path / "run", "test", Strength.SIGNIFICANTLY)) > 0.9
    np.testing.assert_allclose(rewards(tmp_path / "run", "test"), by_the_models(tmp_path / "run", recipe), atol=5e-4)
    saved = read_metadata(find_checkpoints(tmp_path / "run")[-1])["fingerprints"]["model"]
    assert set(saved) == {f"layers.{target}.{factor}" for target in lora.targets for factor in ("a", "b")}


def test_nothing_is_learned_at_a_rate_of_zero(recipe, tmp_path):
    still = dataclasses.replace(recipe.optimizer, peak_lr=0.0)
    dpo.run(dataclasses.replace(recipe, optimizer=still, out=str(tmp_path / "run")))
    assert np.abs(rewards(tmp_path / "run", "test")).max() < 1e-5
    assert evaluations(tmp_path / "run")[-1]["eval/loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_a_greater_beta_keeps_it_nearer_to_the_reference(recipe, trained, tmp_path):
    dpo.run(dataclasses.replace(recipe, beta=2.0, out=str(tmp_path / "run")))
    near, far = (
        np.abs(rewards(folder, "test")).mean() / beta for folder, beta in ((tmp_path / "run", 2.0), (trained, 0.1))
    )
    assert near < 0.7 * far


def test_the_verb_reports_and_dry_runs(recipe, trained, tmp_path, capsys):
    flags = ["--data", *recipe.data.sources, "--pairs", "32", "--data.held-out", "0.2", "--compute.dtype", "float32"]
    flags += ["--compute.remat", "none", "--optimizer.peak-lr", "3e-3", "--optimizer.warmup-steps", "2"]
    assert cli.main(["dpo", recipe.checkpoint, *flags, "--out", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 15 and plan["recipe"]["pairs"] == 32 and not (tmp_path / "run").exists()
    assert "»" in plan["pair"][0] and plan["data"]
    assert cli.main(["dpo", "--data", *recipe.data.sources]) == 2
    page = write_dpo_report(trained).read_text()
    assert "| accuracy | significantly | better | slightly | negligibly | all | pairs |" in page


def test_the_settings_are_the_authors():
    config = DPOConfig()
    assert (config.beta, config.pairs, config.epochs, config.label_smoothing) == (0.1, 64, 1, 0.0)
    assert (config.optimizer.peak_lr, config.optimizer.final_lr_ratio) == (1e-6, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "name the model to begin with"),
        ({"epochs": 0}, "--epochs is 0; it must be 1 or more"),
        ({"beta": 0.0}, "--beta 0.0 must be above 0"),
        ({"beta": math.nan}, "--beta nan must be above 0"),
        ({"label_smoothing": 0.5}, "--label-smoothing 0.5 must be from 0 to below 0.5"),
        ({"length": 1000}, "--length 1000 is more than the model's context of 128"),
        ({"length": 8}, "No pair is left to train on"),
        ({"optimizer": OptimizerConfig(warmup_steps=15)}, "the whole run has 15 steps"),
    ],
)
def test_bad_input_is_named(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        dpo.run(dataclasses.replace(recipe, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
