"""From answers to experience: masks, not ids, say what is real; one KL is logged and paid; padding and parts change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.model.heads import trunk_config, with_scalar_head, without_head
from llama_jax.model.transformer import init
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.experience import (
    Programs,
    combine,
    make_answers,
    make_experience,
    mini_batch_of,
    of_function,
)
from llama_jax.training.ppo_loss import explained_variance, policy_metrics, policy_objective, value_objective
from llama_jax.training.step import make_train_step, new_state
from tests.training.tiny import KEEP_GRADIENT, relative_error

EOS = 2
PROMPTS = [[1, 5, 6], [1, 7], [1, 5, 9, 9, 3]]
DRAWN = [[8, EOS], [0, 4, 4], [EOS]]  # ended; cut, with a token of id 0 in it; ended at once
CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, head_dim=8, vocab_size=16, context_length=64
)
COMPUTE = Compute(dtype="float32", remat="none")


def test_what_was_drawn_is_masked_eos_included_and_padding_is_not():
    answers = make_answers(PROMPTS, DRAWN, 8)
    for row, (prompt, drawn) in enumerate(zip(PROMPTS, DRAWN, strict=True)):
        mask_T = answers.answer_mask_BT[row]
        assert answers.targets_BT[row, mask_T].tolist() == drawn
        assert answers.tokens_BT[row, : len(prompt) + len(drawn)].tolist() == prompt + drawn
        assert not answers.tokens_BT[row, len(prompt) + len(drawn) :].any() and mask_T.sum() == len(drawn)
        assert np.flatnonzero(mask_T)[0] == len(prompt) - 1, (
            "the state before the first drawn token is the prompt's last"
        )
    assert answers.last_B.tolist() == [4, 4, 5]
    last_tokens = answers.tokens_BT[np.arange(3), answers.last_B]
    assert last_tokens.tolist() == [EOS, 4, EOS], "a reward model reads EOS, or the last token of what was cut"


def test_a_functions_reward_is_logged_as_it_came_and_whitened_without_a_logit():
    rewards = of_function(np.array([0.7, 3.0, -2.0], np.float32))
    assert rewards.reward_B.tolist() == np.array([0.7, 3.0, -2.0], np.float32).tolist()
    values = np.array([0.7, 3.0, -2.0])
    assert rewards.whitened_B == pytest.approx((values - values.mean()) / values.std(ddof=1), rel=1e-5)


def test_two_models_judge_by_the_papers_rule_and_one_alone_always():
    safety_B, helpfulness_B = np.array([2.0, -3.0, 1.0], np.float32), np.array([1.0, 4.0, -1.0], np.float32)
    tagged_B = np.array([False, False, True])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    both = combine(safety_B, helpfulness_B, tagged_B, 0.15)
    assert both.by_safety_B.tolist() == [False, True, True]
    chosen_B = np.array([1.0, -3.0, 1.0])  # before the sigmoid, of which the logit is the inverse
    assert both.reward_B == pytest.approx(sigmoid(chosen_B), rel=1e-5)
    assert both.whitened_B == pytest.approx((chosen_B - chosen_B.mean()) / chosen_B.std(ddof=1), rel=1e-4)
    alone = combine(None, helpfulness_B, tagged_B, 0.15)
    assert alone.reward_B == pytest.approx(sigmoid(helpfulness_B), rel=1e-5) and not alone.by_safety_B.any()
    assert combine(safety_B, None, tagged_B, 0.15).by_safety_B.all()


@pytest.fixture(scope="module")
def drawn():
    """Made-up numbers of every place, those outside of answers included."""
    answers, random = make_answers(PROMPTS, DRAWN, 8), np.random.default_rng(0)
    log_probs_BT, reference_BT, values_BT = random.normal(size=(3, 3, 8)).astype(np.float32)
    return answers, np.array([1.0, -2.0, 0.5], np.float32), log_probs_BT, reference_BT, values_BT


def test_the_kl_that_is_logged_is_the_one_that_is_paid(drawn):
    """With γ = λ = 1 the first return is the score less β times all of it."""
    answers, whitened_B, log_probs_BT, reference_BT, _ = drawn
    experience, kl_BT = make_experience(*drawn, beta=0.3, gamma=1.0, lam=1.0)
    mask_BT = answers.answer_mask_BT
    assert np.array_equal(kl_BT, np.where(mask_BT, log_probs_BT - reference_BT, 0))
    first_B = mask_BT.argmax(axis=1)
    returns_B = experience.returns_BT[np.arange(3), first_B]
    assert returns_B == pytest.approx(whitened_B - 0.3 * kl_BT.sum(axis=1), rel=1e-5)
    last_B = answers.last_B - 1
    assert experience.returns_BT[np.arange(3), last_B] == pytest.approx(
        whitened_B - 0.3 * kl_BT[np.arange(3), last_B], rel=1e-5
    )


def test_returns_are_made_before_advantages_are_whitened(drawn):
    experience, _ = make_experience(*drawn, beta=0.3, gamma=0.9, lam=0.8)
    mask_BT = drawn[0].answer_mask_BT
    advantages = experience.advantages_BT[mask_BT]
    assert advantages.mean() == pytest.approx(0, abs=1e-6) and advantages.std(ddof=1) == pytest.approx(1, rel=1e-4)
    raw = (experience.returns_BT - drawn[4])[mask_BT]
    assert advantages == pytest.approx((raw - raw.mean()) / raw.std(ddof=1), abs=1e-5)


def test_longer_rows_change_nothing(drawn):
    answers, whitened_B, *arrays = drawn
    longer = make_answers(PROMPTS, DRAWN, 14)
    poisoned = [np.pad(a_BT, ((0, 0), (0, 6)), constant_values=np.nan) for a_BT in arrays]
    ours, our_kl_BT = make_experience(answers, whitened_B, *arrays, beta=0.3, gamma=0.9, lam=0.8)
    theirs, their_kl_BT = make_experience(longer, whitened_B, *poisoned, beta=0.3, gamma=0.9, lam=0.8)
    assert their_kl_BT.sum() == pytest.approx(our_kl_BT.sum(), rel=1e-6)
    for name in ("advantages_BT", "returns_BT"):
        mine, other = (getattr(one, name)[one.answer_mask_BT] for one in (ours, theirs))
        assert other == pytest.approx(mine, abs=1e-6)


@pytest.fixture(scope="module")
def model():
    return init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def judge(model):
    return with_scalar_head(without_head(model), trunk_config(CONFIG), jax.random.key(1))


@pytest.mark.parametrize(("length", "rows"), [(8, 1), (8, 2), (8, 4), (12, 2), (16, 1)])
def test_what_models_say_depends_neither_on_parts_nor_on_padding_nor_on_neighbours(model, judge, length, rows):
    """Three answers a row each, one at a time and in parts of which the last is filled up; two in a row; and all three."""
    mesh = make_mesh(devices=jax.devices()[:1])

    def read(length: int, rows: int):
        answers = make_answers(PROMPTS, DRAWN, length)
        programs = Programs(mesh, rows, 0.7, COMPUTE)
        mask_BT = answers.answer_mask_BT
        log_probs_BT, entropy_BT = programs.log_probs(model, answers)
        values_BT = programs.values(judge, answers)
        return programs.scores(judge, answers), log_probs_BT[mask_BT], entropy_BT[mask_BT], values_BT[mask_BT]

    with jax.set_mesh(mesh):
        for ours, theirs in zip(read(length, rows), read(6, 3), strict=True):
            assert ours == pytest.approx(theirs, abs=2e-6)


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_a_step_on_answers_that_share_rows_is_the_step_on_a_row_for_each(model, judge, kind):
    """Seven answers in three rows of eight, two of four micro-batches skipped: gradient, loss and report."""
    random = np.random.default_rng(3)
    prompts, drawn = (
        [random.integers(3, 16, n).tolist() for n in ns] for ns in ((3, 2, 5, 1, 2, 3, 2), (2, 6, 1, 4, 9, 1, 2))
    )
    answers = make_answers(prompts, drawn, 16)
    with jax.set_mesh(mesh := make_mesh(devices=jax.devices()[:1])):
        old_BT, _ = Programs(mesh, 4, 0.7, COMPUTE).log_probs(model, answers)
    noisy_BT, reference_BT, values_BT = old_BT + random.normal(size=(3, 7, 16)).astype(np.float32) * [
        [[0.3]],
        [[1]],
        [[1]],
    ]
    experience, _ = make_experience(
        answers,
        random.normal(size=7).astype(np.float32),
        noisy_BT,
        reference_BT,
        values_BT,
        beta=0.1,
        gamma=0.9,
        lam=0.8,
    )
    packed = mini_batch_of(experience, np.arange(7)[::-1], 8, 4)
    assert np.flatnonzero(packed.segment_ids_BT.any(1)).tolist() == [0, 1, 4], "rows of the first two parts"
    start, objective = (model, policy_objective(0.2, 0.7)) if kind == "policy" else (judge, value_objective())
    found = []
    for batch, parts in ((experience, 1), (packed, 4)):
        step = make_train_step(KEEP_GRADIENT, COMPUTE, objective=objective, micro_batches=parts, skip_empty=True)
        state, metrics = step(new_state(jax.tree.map(jnp.array, start), KEEP_GRADIENT), batch)
        found.append((state.opt_state, metrics))
    (alone, of_alone), (shared, of_shared) = found
    assert relative_error(shared, alone) < 2e-5
    assert not any(np.asarray(extra)[2:].any() for extra in of_shared.extras), (
        "computed, extreme ratios would be infinite"
    )
    assert float(of_shared.loss) == pytest.approx(float(of_alone.loss), rel=1e-5)
    assert int(of_shared.targets) == int(of_alone.targets) == answers.answer_mask_BT.sum()
    report = policy_metrics if start is model else lambda extras: {"variance": explained_variance(extras)}
    assert report([of_shared.extras]) == pytest.approx(report([of_alone.extras]), rel=1e-4)
