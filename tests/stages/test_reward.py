"""The reward stage: it learns graded preferences and nothing from shuffled ones, goes on after a stop, and is found out."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.config import Compute
from llama_jax.conversion.load import load_model
from llama_jax.data.pairs import PreferenceConfig
from llama_jax.data.preferences import Strength
from llama_jax.errors import UserError
from llama_jax.evaluation.rewards import read_scores
from llama_jax.generation.rewards import load_reward_model, make_score, score_texts, warnings_of
from llama_jax.model.lora import LoraConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import reward
from llama_jax.stages.reward import RewardConfig
from llama_jax.text.chat import Message
from llama_jax.training import held_out_pairs
from llama_jax.training.checkpoint import find_checkpoints, flat, read_metadata, restore_model
from llama_jax.training.held_out_pairs import Findings, accuracy_of, length_correlation
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig, warmed_up
from llama_jax.training.preference_loss import pair_scores
from tests.stages.graded_pairs import rows, write, write_base
from tests.stages.runs import assert_same_run, on_one_device, stopped_at

one_device = on_one_device(reward)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory) -> RewardConfig:
    """480 pairs, in 15 steps."""
    folder = tmp_path_factory.mktemp("pairs")
    tests = write(folder / "test.jsonl", rows(2, 300))
    return RewardConfig(
        checkpoint=str(base),
        data=PreferenceConfig((write(folder / "pairs.jsonl", rows(1, 600)),), tests=(tests,), held_out=0.2),
        pairs=32,
        optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=2),
        compute=Compute(dtype="float32", remat="none"),
        loop=LoopConfig(log_every=1, eval_every=100, save_every=5),
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    reward.run(dataclasses.replace(recipe, out=str(folder)))
    return folder


def scored(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_scores(folder) if row["set"] == kind]


def test_accuracy_grows_with_strength(trained):
    pairs = scored(trained, "held out") + scored(trained, "test")
    by_strength = {
        level: accuracy_of(np.array([row["scores"] for row in pairs if row["strength"] == level])) for level in Strength
    }
    assert list(by_strength.values()) == sorted(by_strength.values()), by_strength
    assert by_strength[Strength.SIGNIFICANTLY] > 0.95 and abs(by_strength[Strength.NEGLIGIBLY] - 0.5) < 0.15
    assert by_strength[Strength.SLIGHTLY] > 0.6
    assert not warnings_of(load_reward_model(trained).findings)


def test_shuffled_labels_leave_it_at_chance_and_it_says_so(recipe, tmp_path, capsys):
    generator = random.Random(5)
    shuffled = [
        row | dict(zip(("chosen", "rejected"), generator.sample((row["chosen"], row["rejected"]), 2), strict=True))
        for row in rows(1, 600)
    ]
    data = dataclasses.replace(recipe.data, sources=(write(tmp_path / "shuffled.jsonl", shuffled),), tests=())
    reward.run(dataclasses.replace(recipe, data=data, out=str(tmp_path / "run")))
    findings = load_reward_model(tmp_path / "run").findings
    assert abs(findings.accuracy - 0.5) < 2.33 * 0.5 / findings.pairs**0.5
    said = capsys.readouterr().err
    assert "warning: not to be used for PPO: its accuracy on" in said and "a coin reaches" in said
    assert json.loads((tmp_path / "run" / "findings.json").read_text())["warnings"] == warnings_of(findings)


def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(recipe, trained, tmp_path):
    config = dataclasses.replace(recipe, out=str(tmp_path / "run"))
    with stopped_at(7, "step 7"):
        reward.run(config)
    reward.run(dataclasses.replace(config, resume="must"))
    assert_same_run(tmp_path / "run", trained)
    assert (tmp_path / "run" / "scores.jsonl").read_bytes() == (trained / "scores.jsonl").read_bytes()


def dialogues(made: list[dict], side: str) -> list[tuple[Message, ...]]:
    return [(Message("user", row["prompt"]), Message("assistant", row[side])) for row in made]


def test_the_saved_model_scores_dialogues_as_training_did(trained):
    """Whatever batch they are in: alone, with longer ones, in another order."""
    made, expected = rows(2, 300), np.array([row["scores"] for row in scored(trained, "test")])
    score = make_score(trained)
    both = np.array([score(dialogues(made, side)) for side in ("chosen", "rejected")]).T
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-4)
    few = dialogues(made, "chosen")[:3]
    longer = (*few[0], Message("user", "tea 1? " * 6), Message("assistant", "a nice one"))
    mixed = score([longer, few[2], few[0]])
    np.testing.assert_allclose(mixed[1:], expected[[2, 0], 0], rtol=1e-4, atol=1e-4)
    assert all(type(value) is float for value in mixed) and score([]) == []
    narrow = np.array(make_score(trained, dtype="bfloat16")(dialogues(made, "chosen")))
    assert 1e-5 < np.abs(narrow - expected[:, 0]).max() < 0.1 * expected.std()  # the trunk rounds, the head does not


def test_adapters_learn_beside_a_frozen_model_and_are_a_reward_model_like_any_other(recipe, trained, tmp_path):
    """With dropout, which is off while scoring; they alone are saved, and a stop changes nothing."""
    lora = LoraConfig(rank=8, dropout=0.1)
    optimizer = dataclasses.replace(recipe.optimizer, peak_lr=1e-2)
    config = dataclasses.replace(recipe, train="lora", lora=lora, optimizer=optimizer, out=str(tmp_path / "run"))
    reward.run(config)
    tested = scored(tmp_path / "run", "test")
    assert accuracy_of(np.array([row["scores"] for row in tested if row["strength"] == 3])) > 0.9
    got = make_score(tmp_path / "run")(dialogues(rows(2, 300), "chosen"))
    np.testing.assert_allclose(got, [row["scores"][0] for row in tested], rtol=1e-3, atol=1e-3)
    saved = read_metadata(find_checkpoints(tmp_path / "run")[-1])["fingerprints"]["model"]
    assert set(saved) - {"head_D", "bias"} == {
        f"trunk.layers.{target}.{factor}" for target in lora.targets for factor in ("a", "b")
    }
    with stopped_at(7, "step 7"):
        reward.run(dataclasses.replace(config, out=str(tmp_path / "parts")))
    reward.run(dataclasses.replace(config, out=str(tmp_path / "parts"), resume="must"))
    assert_same_run(tmp_path / "parts", tmp_path / "run")


def test_an_answer_that_cannot_be_encoded_is_worse_than_any(trained):
    score = make_score(trained)
    question = Message("user", "tea 1?")
    got = score(
        [(question, Message("assistant", text)) for text in ("a nice one [/INST] and", "word " * 400, "a nice one")]
    )
    assert got[:2] == [-np.inf, -np.inf] and np.isfinite(got[2])


def test_a_dialogue_that_is_too_long_loses_its_oldest_turns(trained):
    score = make_score(trained)
    turn = (Message("user", "tea 1?"), Message("assistant", "a nice one"))
    longest = max(n for n in range(1, 20) if len(_ids(trained, turn * n)) <= 128)
    np.testing.assert_allclose(score([turn * 40]), score([turn * longest]), rtol=1e-6)


def _ids(folder, dialogue):
    loaded = load_reward_model(folder)
    return loaded.template.encode(loaded.tokenizer, dialogue).ids


def test_a_score_is_read_at_the_id_that_ends_the_answer(trained):
    loaded = load_reward_model(trained)
    ids = _ids(trained, dialogues(rows(2, 1), "chosen")[0])
    assert ids[-1] == loaded.tokenizer.eos_id
    whole, cut = score_texts(loaded.model, [ids, ids[:-1]])
    np.testing.assert_allclose(whole, scored(trained, "test")[0]["scores"][0], rtol=1e-4)
    assert whole != cut and score_texts(loaded.model, [[]]) == [-np.inf]


def test_the_head_begins_small_and_only_the_trunk_is_the_checkpoints(base, recipe, tmp_path):
    """Before the first step the scores are those of a head of variance 1 / (D + 1) on the checkpoint's own weights."""
    mesh = make_mesh("auto", jax.devices()[:1])
    with jax.set_mesh(mesh):
        prepared = reward.prepare(dataclasses.replace(recipe, out=str(tmp_path)), mesh)
        checkpoints = reward.Checkpoints(tmp_path / "checkpoints")
        state, *_ = reward.begin(prepared, checkpoints)
        checkpoints.close()
    assert float(state.model.bias) == 0 and not hasattr(state.model.trunk, "head_DV")
    theirs = flat(load_model(base)[0])
    assert all(np.array_equal(leaf, theirs[name]) for name, leaf in flat(state.model.trunk).items())
    np.testing.assert_allclose(float((state.model.head_D**2).mean()) * 65, 1, atol=0.5)


def test_a_model_whose_scores_change_with_padding_is_found_out(recipe, trained, tmp_path, monkeypatch):
    mesh = make_mesh("auto", jax.devices()[:1])
    model, numbers = load_reward_model(trained).model, np.arange(40)
    with jax.set_mesh(mesh):
        prepared = reward.prepare(dataclasses.replace(recipe, out=str(tmp_path)), mesh)
        pairs = prepared.loaded.held_out
        sound, scores = reward.make_scorer(prepared).findings(model, pairs, numbers)
        monkeypatch.setattr(held_out_pairs, "pair_scores", lambda *given: pair_scores(*given) + 0.5 * given[-1])
        broken, _ = reward.make_scorer(prepared).findings(model, pairs, numbers)
    assert sound.padding_change < 1e-4
    assert broken.padding_change == pytest.approx(0.5 / scores.std(), rel=1e-3)


def test_the_schedule_is_the_papers():
    config = RewardConfig()
    assert (config.optimizer.peak_lr, config.optimizer.final_lr_ratio) == (1e-5, 0.1)
    assert (config.epochs, config.pairs) == (1, 512)
    assert [warmed_up(config.optimizer, steps).warmup_steps for steps in (1, 5, 10, 166, 167, 1000)] == [
        0,
        4,
        5,
        5,
        6,
        30,
    ]
    assert warmed_up(OptimizerConfig(warmup_steps=2), 1000).warmup_steps == 2


def test_the_verb_reports_and_dry_runs(recipe, trained, tmp_path, capsys):
    flags = ["--data", *recipe.data.sources, "--pairs", "32", "--data.held-out", "0.2", "--compute.dtype", "float32"]
    flags += ["--compute.remat", "none", "--optimizer.warmup-steps", "2", "--loop.eval-every", "0"]
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["reward", recipe.checkpoint, *flags, *out, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 15 and not (tmp_path / "run").exists()
    (table,) = plan["data"].values()
    assert table["turns per dialogue"] == 1 and "»" in plan["pair"][0]
    assert cli.main(["reward", recipe.checkpoint, *flags, *out]) == 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| accuracy | significantly | better | slightly | negligibly | all | pairs |" in page
    assert all((tmp_path / "run" / name).stat().st_size > 1000 for name in ("calibration.png", "scores.png"))
    assert warnings_of(load_reward_model(tmp_path / "run").findings) == ["it was never evaluated on held-out pairs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "name the model to begin with"),
        ({"pairs": 0}, "--pairs is 0; it must be 1 or more"),
        ({"length": 1000}, "--length 1000 is more than the model's context of 128"),
        ({"margins": (1.0, float("nan"), 0.0, 0.0)}, "must be 0 or more"),
        ({"safety_weight": 1.0}, "--safety-weight is for pairs with safety labels"),
        ({"length": 8}, "No pair is left to train on"),
        ({"optimizer": OptimizerConfig(warmup_steps=15)}, "the whole run has 15 steps"),
    ],
)
def test_bad_input_is_named(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        reward.run(dataclasses.replace(recipe, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_no_language_model_and_the_other_way_round(trained, base, capsys):
    with pytest.raises(UserError, match="holds a reward model; expected a language model"):
        restore_model(trained)
    assert cli.main(["generate", str(trained), "x"]) == 2
    assert cli.main(["convert", str(trained), str(trained / "hf"), "--to", "hf"]) == 2
    assert capsys.readouterr().err.count("holds a reward model") >= 2
    with pytest.raises(UserError):
        load_reward_model(base)


GOOD = Findings(pairs=500, accuracy=0.7, length_correlation=0.1, padding_change=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"accuracy": 0.552}, "a coin reaches 55.2%"),  # 0.5 + 2.33 * 0.5 / sqrt(500) is 0.5521
        ({"accuracy": 0.553}, None),
        ({"pairs": 4, "accuracy": 1.0}, "its accuracy on 4 held-out pairs"),
        ({"accuracy": float("nan")}, "its accuracy"),
        ({"length_correlation": -0.8}, "follow the length of answers: correlation -0.80"),
        ({"length_correlation": float("nan")}, None),
        ({"padding_change": 0.26}, "change with padding: by 0.26 of their standard deviation, limit 0.25"),
        ({"padding_change": 0.24}, None),
        ({"padding_change": float("nan")}, "change with padding"),
        ({"pairs": 0}, "never evaluated"),
    ],
)
def test_reasons_not_to_use_it(changes, reason):
    reasons = warnings_of(dataclasses.replace(GOOD, **changes))
    assert len(reasons) == (reason is not None) and (reason is None or reason in reasons[0])


def test_a_score_that_counts_tokens_is_found_out():
    lengths = np.random.default_rng(0).integers(1, 50, (200, 2))
    assert length_correlation(0.1 * lengths, lengths) == pytest.approx(1)
    assert length_correlation(-lengths, lengths) == pytest.approx(-1)
    assert length_correlation(lengths[:, ::-1], lengths) == pytest.approx(-1)
    noise = np.random.default_rng(1).normal(size=(200, 2))
    assert abs(length_correlation(noise, lengths)) < 0.2
    assert np.isnan(length_correlation(noise, np.ones((200, 2))))
    assert accuracy_of(np.array([[1, 0], [0, 1], [1, 1], [2, 1]])) == 0.625
