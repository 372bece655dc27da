"""PPO: it reaches a planted optimum and nothing without a signal, begins at its reference, goes on after a stop, and refuses
what would make its numbers wrong."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.config import Compute
from llama_jax.conversion.load import load_model
from llama_jax.data.prompts import PromptsConfig
from llama_jax.errors import Preempted, UserError
from llama_jax.generation.llama import Llama
from llama_jax.generation.ppo_models import Actors, first_critic, read_frozen
from llama_jax.generation.rewards import load_reward_model, reward_info
from llama_jax.model.lora import LoraConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import ppo, ppo_iteration
from llama_jax.stages.ppo import PPOConfig
from llama_jax.stages.ppo_config import CONSTANT
from llama_jax.training.checkpoint import find_checkpoints, flat, read_metadata, restore_model
from llama_jax.training.held_out_pairs import Findings
from llama_jax.training.loop import LoopConfig
from llama_jax.training.metrics import read_metrics
from llama_jax.training.preemption import StopSignal
from tests.stages.reward_models import write_reward_model
from tests.stages.runs import assert_same_run, newest, on_one_device, stopped_at
from tests.tiny_checkpoint import write_tiny_checkpoint

QUESTIONS = [f"tell {thing} {number}" for thing in ("tea", "car", "sky", "sea") for number in range(10)]
COMPUTE = Compute(dtype="float32", remat="none")


one_device = on_one_device(ppo)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    words = [f"{' '.join(QUESTIONS)} a good one\n"]
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "hf", words * 20, vocab_size=300, context=64)


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory) -> PPOConfig:
    """Three iterations of 64 short answers to plain prompts, in mini-batches of 32; every third prompt is adversarial."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": text}], "risk": "odd" * (i % 3 == 0)}
        for i, text in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PPOConfig(
        checkpoint=str(base),
        data=PromptsConfig(sources=(str(path),)),
        plain=True,
        iterations=3,
        batch=64,
        mini_batch=32,
        max_new_tokens=8,
        eval_prompts=8,
        rows=32,
        optimizer=dataclasses.replace(CONSTANT, peak_lr=1e-3),
        critic=dataclasses.replace(CONSTANT, peak_lr=1e-3),
        compute=COMPUTE,
        loop=LoopConfig(log_every=1, eval_every=2, save_every=2),
    )


@pytest.fixture(scope="module")
def judges(base, tmp_path_factory) -> dict[str, str]:
    """Two reward models that disagree."""
    folder = tmp_path_factory.mktemp("judges")
    return {
        "helpfulness": write_reward_model(folder / "helpful", base, seed=1),
        "safety": write_reward_model(folder / "safe", base, seed=2, bias=-1.0),
    }


@pytest.fixture(scope="module")
def trained(recipe, judges, tmp_path_factory) -> Path:
    """A run against both."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    ppo.run(dataclasses.replace(recipe, **judges, out=str(folder)))
    return folder


def iterations(folder: Path | str) -> list[dict]:
    return [record for record in read_metrics(Path(folder)) if "reward/mean" in record]


def share_of_e(dialogues) -> list[float]:
    """The planted reward: how much of an answer is the letter e."""
    return [one[-1].content.count("e") / 8 for one in dialogues]


def learn(recipe: PPOConfig, out: Path, score=share_of_e, peak_lr: float = 4e-3, **changes) -> list[dict]:
    """18 iterations of 64 answers on one signal alone, and what they logged."""
    rate = dataclasses.replace(CONSTANT, peak_lr=peak_lr)
    quiet = LoopConfig(log_every=0, eval_every=0, save_every=0)
    settings = {"iterations": 18, "eval_prompts": 0, "beta": 0.0} | changes
    ppo.run(dataclasses.replace(recipe, **settings, optimizer=rate, critic=rate, loop=quiet, out=str(out)), score=score)
    return iterations(out)


def mean_of_last(records: list[dict], name: str) -> float:
    return float(np.mean([record[name] for record in records[-3:]]))


@pytest.fixture(scope="module")
def optimum(recipe, tmp_path_factory) -> list[dict]:
    return learn(recipe, tmp_path_factory.mktemp("optimum") / "run")


def test_a_planted_reward_is_learned(optimum):
    """From 2% of an answer to nine tenths of it, which is the whole of what can be had but for exploration."""
    assert optimum[0]["reward/mean"] < 0.05
    assert mean_of_last(optimum, "reward/mean") > 0.9
    assert mean_of_last(optimum, "policy/entropy") < optimum[0]["policy/entropy"] / 4


def test_nothing_moves_without_a_learning_rate_and_the_flipped_sign_is_obeyed(recipe, tmp_path):
    still = learn(recipe, tmp_path / "still", peak_lr=0.0, iterations=4)
    assert all(record["kl/sequence"] == 0 and record["reward/mean"] < 0.06 for record in still)
    assert all(record["policy/ratio_min"] == pytest.approx(1, abs=1e-5) for record in still)

    def early(dialogues) -> list[float]:
        return [sum("a" <= letter <= "m" for letter in one[-1].content) / 16 for one in dialogues]

    fallen = learn(recipe, tmp_path / "flipped", lambda dialogues: [-value for value in early(dialogues)])
    assert mean_of_last(fallen, "reward/mean") > 0.5 * fallen[0]["reward/mean"], "less than half is left"


def test_a_great_kl_weight_holds_the_policy_at_its_reference_and_none_lets_it_go(recipe, tmp_path):
    """The reward is whole with two letters of eight, so that what more it moves is drift."""

    def two(dialogues) -> list[float]:
        return [min(one[-1].content.count("e"), 2) / 2 for one in dialogues]

    runs = {beta: learn(recipe, tmp_path / str(beta), two, beta=beta) for beta in (0.0, 0.01, 100.0)}
    drift = {beta: mean_of_last(records, "kl/sequence") for beta, records in runs.items()}
    assert drift[0.0] > 1.2 * drift[0.01] > 10 * abs(drift[100.0]), drift
    assert mean_of_last(runs[0.01], "reward/mean") > 0.9 and mean_of_last(runs[100.0], "reward/mean") < 0.3


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_it_begins_at_its_reference_and_sampler_and_trainer_agree(recipe, judges, tmp_path, temperature):
    """At every temperature; and of one mini-batch that is the whole batch every ratio is 1, of a later one not."""
    config = dataclasses.replace(recipe, **judges, temperature=temperature, eval_prompts=0, out=str(tmp_path / "run"))
    ppo.run(dataclasses.replace(config, batch=32, iterations=2))
    first, second = iterations(config.out)
    assert first["kl/sequence"] == first["kl/token"] == 0 and second["kl/sequence"] != 0
    for record in (first, second):
        assert record["sampler/largest_difference"] < 1e-5
        assert record["policy/ratio_min"] == pytest.approx(1, abs=1e-5)
        assert record["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert record["policy/clip_fraction"] == 0


def test_a_later_mini_batch_has_other_ratios(trained):
    first = iterations(trained)[0]
    assert first["policy/ratio_max"] > 1.001 and first["policy/ratio_min"] < 0.999 and first["policy/approx_kl"] > 0


def test_what_a_run_shows(trained, recipe):
    """Every number of the list, for each iteration; shares that add up; and answers to held-out prompts."""
    records = iterations(trained)
    assert [record["step"] for record in records] == [1, 2, 3]
    names = {
        *("reward/mean", "reward/safety", "reward/helpfulness", "reward/by_safety", "reward/by_helpfulness"),
        *("kl/token", "kl/sequence", "policy/approx_kl", "policy/clip_fraction", "policy/entropy", "policy/ratio_min"),
        *("policy/ratio_max", "critic/explained_variance", "critic/loss", "answers/length", "answers/cut"),
        *("policy/grad_norm", "critic/grad_norm", "speed/generate_tokens_per_s", "speed/train_tokens_per_s"),
        *("time/generate", "time/judge", "time/train"),
    }
    for record in records:
        assert names <= record.keys() and all(math.isfinite(value) for value in record.values())
        assert record["reward/by_safety"] + record["reward/by_helpfulness"] == pytest.approx(1)
        assert record["time/generate"] + record["time/judge"] + record["time/train"] == pytest.approx(1)
        assert record["kl/sequence"] == pytest.approx(record["kl/token"] * record["answers/length"], rel=1e-4, abs=1e-7)
    held_out = [record for record in read_metrics(trained) if "eval/reward" in record]
    assert [record["step"] for record in held_out] == [0, 2, 3]
    page = (trained / "samples" / "000000.md").read_text()
    assert page.count("> user: tell") == page.count("reward ") == 8


def test_each_answer_is_in_one_step_of_policy_and_critic(recipe, judges, tmp_path, monkeypatch):
    """And the probabilities that ratios are of are found once a batch, before the first step."""
    seen: dict[str, list] = {"steps": [], "log_probs": []}
    compile_steps = ppo.compile_steps

    def counted(prepared):
        policy_step, critic_step, plan = compile_steps(prepared)

        def noted(name, step):
            def call(state, batch, frozen):
                seen["steps"].append((name, jax.tree.map(np.asarray, batch)))
                return step(state, batch, frozen)

            return call

        return noted("policy", policy_step), noted("critic", critic_step), plan

    monkeypatch.setattr(ppo, "compile_steps", counted)
    read = ppo.Programs.log_probs
    monkeypatch.setattr(
        ppo.Programs,
        "log_probs",
        lambda self, model, answers: seen["log_probs"].append(1) or read(self, model, answers),
    )
    path, long = tmp_path / "prompts.jsonl", " and tell car sky tea"  # rows are long enough for two of the others
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (*QUESTIONS, QUESTIONS[0] + long)))
    settings = {"data": PromptsConfig(sources=(str(path),)), "iterations": 1, "eval_prompts": 0}
    ppo.run(dataclasses.replace(recipe, **judges, **settings, out=str(tmp_path / "run")))
    assert [name for name, _ in seen["steps"]] == ["policy", "critic"] * 2
    assert len(seen["log_probs"]) == 2, "the policy's and the reference's"
    batches = [batch for name, batch in seen["steps"] if name == "policy"]
    answers = [
        batch.old_log_probs_BT[(batch.segment_ids_BT == number) & batch.answer_mask_BT].tobytes()
        for batch in batches
        for number in np.unique(batch.segment_ids_BT[batch.segment_ids_BT > 0])
    ]
    assert len(answers) == 64 == len(set(answers)), "every answer once"
    assert any(not batch.segment_ids_BT.any(1).all() for batch in batches), "they share rows, and some rows stay empty"


def test_adam_has_the_papers_epsilon_and_the_rate_is_constant():
    config = PPOConfig()
    for optimizer in (config.optimizer, config.critic):
        assert (optimizer.eps, optimizer.peak_lr, optimizer.final_lr_ratio) == (1e-5, 1e-6, 1.0)
        assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (config.batch, config.mini_batch, config.clip, config.beta, config.threshold) == (512, 64, 0.2, 0.01, 0.15)


def test_the_same_prompt_twice_gets_two_answers_and_another_iteration_others(recipe, tmp_path):
    asked: list[tuple] = []

    def note(dialogues) -> list[float]:
        asked.extend(dialogues)
        return [0.0] * len(dialogues)

    path = Path(tmp_path / "one.jsonl")
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "tell tea 1"}]}) + "\n")
    one = dataclasses.replace(recipe, data=PromptsConfig(sources=(str(path),)), eval_prompts=0, iterations=2)
    ppo.run(
        dataclasses.replace(one, optimizer=dataclasses.replace(CONSTANT, peak_lr=0.0), out=str(tmp_path / "run")),
        score=note,
    )
    assert len(asked) == 128 and len({dialogue[0] for dialogue in asked}) == 1
    assert len({dialogue[-1] for dialogue in asked}) > 125


def test_a_stop_changes_nothing_wherever_it_comes(recipe, judges, trained, tmp_path):
    """After an iteration, and in the middle of one, between drawing and training."""
    for number, place in enumerate((1, 4)):  # 2 i: answers of iteration i are drawn; 2 i + 1: it is over
        config = dataclasses.replace(recipe, **judges, out=str(tmp_path / f"run{number}"))
        with stopped_at(place, f"iteration {(place + 1) // 2}"):
            ppo.run(config)
        ppo.run(dataclasses.replace(config, resume="must"))
        assert_same_run(Path(config.out), trained)


def test_a_stop_before_anything_was_learned_claims_nothing(recipe, judges, tmp_path, monkeypatch):
    config = dataclasses.replace(recipe, **judges, out=str(tmp_path / "run"))
    monkeypatch.setattr(StopSignal, "received", lambda self, asked: "SIGTERM")
    with pytest.raises(Preempted, match="no iteration was finished; start it again"):
        ppo.run(config)
    assert not [path for path in (tmp_path / "run" / "checkpoints").glob("*") if path.name.isdigit()]


def test_the_result_is_a_model_like_any_other(trained, base):
    model, _ = load_model(trained, None)
    before, _ = load_model(base, None)
    assert not np.array_equal(model.embedding_VD, before.embedding_VD)
    assert len(Llama.load(trained).generate(["tell tea"], max_new_tokens=4)) == 1
    assert newest(trained)["step"] == 3 and restore_model(trained / "best")[0] is not None


def test_the_critic_begins_as_the_reward_model(recipe, judges, base):
    """The helpfulness one where there are two; without one as the policy with a fresh head of deviation 1 / sqrt(D + 1)."""
    infos = {name: reward_info(find_checkpoints(Path(path))[-1]) for name, path in judges.items()}
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, model, _ = ppo.open_pinned(base)
        both = Actors(base, model, None, infos["safety"], infos["helpfulness"], COMPUTE)
        critic, judge = first_critic(both, mesh, 0), load_reward_model(judges["helpfulness"]).model
        assert all(np.array_equal(a, b) for a, b in zip(flat(critic).values(), flat(judge).values(), strict=True))
        alone = first_critic(Actors(base, model, None, None, None, COMPUTE), mesh, 0)
    assert alone.bias == 0 and 0.6 < np.std(alone.head_D) * (model.dim + 1) ** 0.5 < 1.4
    assert np.array_equal(alone.trunk.embedding_VD, load_model(base, mesh, "float32")[0].embedding_VD)


def test_the_critics_first_values_are_the_judges_scores_in_the_units_of_whitened_rewards(recipe, judges, tmp_path):
    """So that at an answer's last token it says what the answer earned, but for the clamp on extreme rewards; bare scores
    would begin far off.
    """
    seen = []

    def noted(*arguments, **weights):
        seen.append((arguments, make_experience(*arguments, **weights)))
        return seen[-1][1]

    make_experience = ppo_iteration.make_experience
    own = {"helpfulness": judges["helpfulness"], "iterations": 1, "eval_prompts": 0, "out": str(tmp_path / "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_iteration, "make_experience", noted)
        ppo.run(dataclasses.replace(recipe, **own))
    ((answers, whitened_B, _, _, values_BT), _) = seen[0]
    at_last_B = values_BT[np.arange(64), answers.last_B]
    assert (at_last_B.mean(), at_last_B.std(ddof=1)) == pytest.approx((0, 1), abs=1e-4)
    assert np.corrcoef(at_last_B, whitened_B)[0, 1] > 0.9


def test_an_answer_that_was_cut_pays_the_penalty_and_no_other_does(recipe, tmp_path, monkeypatch):
    """On top of the whitened reward; every second answer is said to be cut."""
    sample, make = ppo_iteration.sample_rollouts, ppo_iteration.make_experience
    paid = []
    monkeypatch.setattr(
        ppo_iteration,
        "sample_rollouts",
        lambda *a, **k: [one._replace(ended=bool(i % 2)) for i, one in enumerate(sample(*a, **k))],
    )
    monkeypatch.setattr(ppo_iteration, "make_experience", lambda *a, **k: (paid.append(a[1]), make(*a, **k))[1])
    for penalty in (0.0, 0.5):
        learn(recipe, tmp_path / str(penalty), iterations=1, cut_penalty=penalty)
    np.testing.assert_allclose(paid[0] - paid[1], np.where(np.arange(64) % 2, 0.0, 0.5), atol=1e-6)


def test_first_the_critic_may_learn_alone(recipe, judges, tmp_path, monkeypatch):
    """The second iteration still draws from the reference, with a critic that knows better; then the policy moves, and its
    learning rate reaches its end with the last step that it makes.
    """
    make_optimizer, totals = ppo.make_optimizer, []
    monkeypatch.setattr(ppo, "make_optimizer", lambda *given: totals.append(given[2]) or make_optimizer(*given))
    own = {**judges, "critic_warmup": 2, "eval_prompts": 0, "out": str(tmp_path / "run")}
    ppo.run(dataclasses.replace(recipe, **own))
    first, second, third = iterations(tmp_path / "run")
    assert first["kl/sequence"] == second["kl/sequence"] == third["kl/sequence"] == 0
    assert "policy/loss" not in first and "policy/loss" not in second and third["policy/grad_norm"] > 0
    assert third["critic/explained_variance"] > first["critic/explained_variance"]
    assert totals == [2, 6], "two mini-batches of one iteration, and of three"


def test_adapters_share_one_backbone(recipe, base, tmp_path):
    """Policy, reference, reward model and critic: the very same buffers; and they begin where whole models would. The policy's
    dropout is off where answers are drawn and scored."""
    lora = LoraConfig(rank=2, targets=("wq_DNH", "w_up_DF"))
    judge = write_reward_model(tmp_path / "judge", base, seed=1, lora=lora)
    config = dataclasses.replace(
        recipe, helpfulness=judge, train="lora", lora=LoraConfig(rank=4, dropout=0.3), out=str(tmp_path / "lora")
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        actors = ppo.prepare(config, mesh, has_score=False).actors
        frozen, critic = read_frozen(actors, mesh), first_critic(actors, mesh, 0)
    assert actors.shares(actors.judge) and set(critic.trunk) == {f"layers.{name}" for name in lora.targets}
    for shared in (frozen.helpfulness.trunk, frozen.trunk):
        assert shared.embedding_VD is frozen.reference.embedding_VD
    ppo.run(config)
    whole = dataclasses.replace(recipe, helpfulness=judge, out=str(tmp_path / "whole"))
    ppo.run(whole)
    ours, theirs = iterations(config.out)[0], iterations(whole.out)[0]
    assert ours["kl/sequence"] == theirs["kl/sequence"] == 0
    for name in ("reward/mean", "answers/length", "critic/loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.2 if name == "critic/loss" else 1e-4)
    moved = iterations(config.out)[-1]
    assert moved["kl/sequence"] != 0 and moved["sampler/largest_difference"] < 1e-5
    assert "adapters" in read_metadata(find_checkpoints(Path(config.out))[-1])
    assert not np.array_equal(load_model(config.out, None)[0].layers.wq_DNH, load_model(base, None)[0].layers.wq_DNH)


def test_held_out_prompts_that_do_not_gain_end_it(recipe, tmp_path, capsys):
    def falls(dialogues, seen=[0]) -> list[float]:  # noqa: B006 (it counts the calls)
        seen[0] += 1
        return [-float(seen[0])] * len(dialogues)

    config = dataclasses.replace(
        recipe, iterations=9, patience=2, loop=LoopConfig(eval_every=1), out=str(tmp_path / "run")
    )
    ppo.run(config, score=falls)
    assert len(iterations(config.out)) == 2 and newest(Path(config.out))["step"] == 2
    assert "held-out prompts gained most at iteration 0" in capsys.readouterr().err
    ppo.run(dataclasses.replace(config, resume="must"), score=falls)
    assert len(iterations(config.out)) == 2, "what is over is not gone on with"


def test_a_bad_reward_ends_the_run_and_loses_nothing(recipe, tmp_path):
    calls = []

    def score(dialogues) -> list[float]:
        calls.append(1)
        return [math.nan if len(calls) == 2 else 0.0] * len(dialogues)

    quiet = LoopConfig(eval_every=0, save_every=0)
    with pytest.raises(UserError, match="the score of answer 0 of 64 is nan"):
        ppo.run(dataclasses.replace(recipe, eval_prompts=0, loop=quiet, out=str(tmp_path / "run")), score=score)
    assert newest(tmp_path / "run")["step"] == 1, "the iteration before it is saved"


def test_bad_input_is_named_and_nothing_is_begun(recipe, judges, base, tmp_path, capsys):
    poor = write_reward_model(
        tmp_path / "poor", base, findings=Findings(pairs=400, accuracy=0.5, length_correlation=0.9, padding_change=0.0)
    )
    chatty = write_reward_model(tmp_path / "chatty", base, plain=False)
    other = write_tiny_checkpoint(
        tmp_path / "other", ["other words of another kind\n"] * 40, vocab_size=290, context=64
    )
    foreign = write_reward_model(tmp_path / "foreign", other)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    words = [
        "ppo",
        str(base),
        "--data",
        *recipe.data.sources,
        "--plain",
        "--out",
        str(tmp_path / "run"),
        "--compute.dtype",
        "float32",
    ]
    words += ["--eval-prompts", "8", "--max-new-tokens", "8", "--batch", "16", "--mini-batch", "8"]
    helpful = ["--helpfulness", judges["helpfulness"]]
    cases = [
        ([], "nothing judges: name a run of llama-jax reward with --helpfulness"),
        (["--helpfulness", poor], "is not to be used for PPO:\n  its accuracy on 400 held-out pairs is 50.0%"),
        (["--helpfulness", poor], "its scores follow the length of answers: correlation 0.90"),
        (["--helpfulness", chatty], "was trained without --plain, and is used with it"),
        (["--helpfulness", foreign], "has another tokenizer than the policy"),
        (
            [*helpful, "--mini-batch", "6"],
            "--mini-batch 6 does not divide --batch 16; it may be one of [1, 2, 4, 8, 16]",
        ),
        (
            [*helpful, "--max-new-tokens", "64"],
            "leaves room for --max-new-tokens 64 in the model's context of 64 tokens",
        ),
        ([*helpful, "--data.sources", str(empty)], "empty.jsonl"),
        ([*helpful, "--temperature", "0"], "--temperature is 0.0; it must be above 0"),
        ([*helpful, "--function", "none.py:f"], "no file none.py; expected FILE.py:NAME"),
        ([*helpful, "--eval-prompts", "40"], "--eval-prompts 40 would leave none of 40 prompts to train on"),
        ([*helpful, "--nf4"], "say --train lora"),
    ]
    for flags, message in cases:
        assert cli.main([*words, *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_function_is_named_on_the_command_line_and_a_dry_run_touches_nothing(recipe, base, tmp_path, capsys):
    file = tmp_path / "checks.py"
    file.write_text("def grade(dialogues):\n    return [len(one[-1].content) for one in dialogues]\n")
    words = [
        "ppo",
        str(base),
        "--data",
        *recipe.data.sources,
        "--plain",
        "--function",
        f"{file}:grade",
        "--compute.dtype",
        "float32",
    ]
    words += [
        "--batch",
        "8",
        "--mini-batch",
        "8",
        "--max-new-tokens",
        "8",
        "--eval-prompts",
        "8",
        "--compute.remat",
        "none",
    ]
    words += ["--iterations", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "judges      a function" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert cli.main(words) == 0
    (record,) = iterations(tmp_path / "run")
    assert record["reward/mean"] > 1, "what the function gives is no probability, and need not be"
