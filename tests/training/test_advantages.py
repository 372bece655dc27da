"""What becomes of scores: by hand, against plain loops over tokens, and blind to whatever stands outside of the answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.parallel.mesh import make_mesh, sharding
from llama_jax.training.advantages import LOGIT_CLAMP, THRESHOLD, chosen_reward, gae, logit, token_rewards, whiten

T = 12
# Where answers begin and end: ended within the row, cut at its end, of a single token, none, the whole row, ...
SPANS = ((2, 7), (5, T), (3, 4), (0, 0), (0, T), (1, 3), (6, 11), (T - 1, T))
MASK = np.array([[start <= t < end for t in range(T)] for start, end in SPANS])


def numbers(seed: int, shape=MASK.shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def all_of_it(score_B, kl_BT, values_BT, mask_BT, gamma=0.97, lam=0.9):
    """Everything from scores to whitened advantages and returns."""
    rewards_BT = token_rewards(whiten(logit(score_B), jnp.ones(score_B.shape, bool)), kl_BT, mask_BT, 0.05)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    return rewards_BT, whiten(advantages_BT, mask_BT), returns_BT


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize(("safety", "is_low"), [(0.149, True), (0.15, False), (0.151, False)])
def test_the_truth_table_of_the_piecewise_reward(safety, is_low, tagged):
    by_safety = tagged or is_low
    for helpfulness in (0.05, 0.9):
        reward, which = chosen_reward(jnp.array([safety]), jnp.array([helpfulness]), jnp.array([tagged]))
        assert bool(which[0]) == by_safety and reward.dtype == jnp.float32
        assert float(reward[0]) == np.float32(safety if by_safety else helpfulness)


def test_the_threshold_is_the_papers_and_can_be_another():
    assert THRESHOLD == 0.15
    reward, by_safety = chosen_reward(np.array([0.2, 0.4]), np.array([0.9, 0.9]), np.array([False, False]), 0.3)
    np.testing.assert_array_equal(reward, np.float32([0.2, 0.9]))
    np.testing.assert_array_equal(by_safety, [True, False])


def test_the_logit_undoes_the_sigmoid_and_is_finite_at_both_ends():
    x = np.linspace(-8, 8, 33)
    np.testing.assert_allclose(logit(1 / (1 + np.exp(-x))), x, atol=5e-4)
    ends = np.asarray(logit(np.array([0.0, 1.0, LOGIT_CLAMP / 2, 1 - LOGIT_CLAMP / 2])))
    np.testing.assert_allclose(ends, np.log((1 - LOGIT_CLAMP) / LOGIT_CLAMP) * np.array([-1, 1, -1, 1]), rtol=1e-4)
    assert float(logit(0.5)) == 0


def test_whitening_is_over_all_that_the_mask_keeps_with_the_unbiased_variance():
    x = numbers(0) + 100 + np.arange(len(MASK))[:, None]  # rows of unlike means
    kept = x[MASK].astype(np.float64)
    want = np.zeros(x.shape)
    want[MASK] = (kept - kept.mean()) / kept.std(ddof=1)
    np.testing.assert_allclose(whiten(x, MASK), want, atol=2e-5)
    # The mistakes this is to catch: the biased variance, and the statistics of each row.
    assert abs(kept.std(ddof=0) / kept.std(ddof=1) - 1) > 5e-3
    assert np.abs(np.asarray(whiten(x, MASK))[4].mean()) > 0.3


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11])
def test_whitening_equal_entries_a_single_one_or_none_gives_zeros(n):
    for value in (0.0, 0.1, -9.21, 1e30):
        np.testing.assert_array_equal(whiten(jnp.full(n, value), jnp.ones(n, bool)), np.zeros(n))
    np.testing.assert_array_equal(whiten(numbers(0, (n,)), np.arange(n) == 0), np.zeros(n))
    np.testing.assert_array_equal(whiten(numbers(0, (n,)), np.zeros(n, bool)), np.zeros(n))


def test_whitening_does_not_blow_up_rounding():
    x = np.float32(0.7) + np.spacing(np.float32(0.7)) * np.arange(4, dtype=np.float32)
    assert len(set(x.tolist())) == 4 and np.abs(whiten(x, np.ones(4, bool))).max() < 0.01


def test_a_score_arrives_whole_on_the_last_drawn_token_and_nowhere_else():
    score = np.array([0.7, -1.25, 3.0, 50.0, 0.1, -0.3, 2.5, 0.9])
    rewards = np.asarray(token_rewards(score, jnp.zeros(MASK.shape), MASK, 0.01))
    assert rewards.dtype == np.float32
    want = np.zeros(MASK.shape, np.float32)
    for row, (start, end) in enumerate(SPANS):
        if start < end:
            want[row, end - 1] = score[row]
    np.testing.assert_array_equal(rewards, want)


def test_every_drawn_token_pays_beta_times_its_kl_and_what_is_logged_is_what_is_paid():
    score, kl, beta = numbers(1, len(MASK)), numbers(2), 0.3
    rewards = np.asarray(token_rewards(score, kl, MASK, beta))
    scores = np.asarray(token_rewards(score, np.zeros_like(kl), MASK, beta))
    np.testing.assert_allclose(rewards - scores, np.where(MASK, -beta * kl, 0), atol=1e-6)
    answered = MASK.any(1)
    np.testing.assert_allclose(rewards.sum(1)[answered], (score - beta * (MASK * kl).sum(1))[answered], atol=1e-5)


def test_advantages_by_hand():
    rewards, values = np.zeros((1, 6), np.float32), np.zeros((1, 6), np.float32)
    rewards[0, 4], values[0, 2:5] = 1, (0.5, 0.6, 0.7)
    mask = np.array([[0, 0, 1, 1, 1, 0]], bool)
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    # Surprises 0.04, 0.03 and 0.3; 0.9 * 0.8 = 0.72 of what comes after is added to each.
    np.testing.assert_allclose(advantages, [[0, 0, 0.21712, 0.246, 0.3, 0]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0, 0, 0.71712, 0.846, 1.0, 0]], atol=1e-6)


def by_loop(rewards, values, gamma, lam):
    """Advantages of every answer by the definition: the sum of all later surprises, each weighted by its distance."""
    advantages = np.zeros(MASK.shape)
    for row, (start, end) in enumerate(SPANS):
        value = [float(v) for v in values[row, start:end]] + [0.0]
        surprise = [float(rewards[row, start + i]) + gamma * value[i + 1] - value[i] for i in range(end - start)]
        for i in range(end - start):
            advantages[row, start + i] = sum((gamma * lam) ** (j - i) * surprise[j] for j in range(i, end - start))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (0.95, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sum_of_all_later_surprises(gamma, lam):
    rewards, values = numbers(3), numbers(4)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    want = by_loop(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages, want, atol=2e-6)
    np.testing.assert_allclose(returns, np.where(MASK, want + values, 0), atol=2e-6)


def test_with_gamma_and_lambda_one_a_return_is_the_plain_sum_of_what_comes():
    rewards, values = numbers(3), numbers(4)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)
    to_come = np.where(MASK, rewards, 0)[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(returns, np.where(MASK, to_come, 0), atol=2e-6)
    np.testing.assert_allclose(advantages, np.where(MASK, to_come - values, 0), atol=2e-6)


def test_a_critic_that_knows_leaves_no_advantage():
    rewards, gamma = numbers(5), 0.9
    values = by_loop(rewards, np.zeros(MASK.shape), gamma, 1.0).astype(np.float32)
    for lam in (0.0, 0.8, 1.0):
        advantages, returns = gae(rewards, values, MASK, gamma, lam)
        np.testing.assert_allclose(advantages, np.zeros(MASK.shape), atol=1e-6)
        np.testing.assert_allclose(returns, values, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_stands_outside_of_an_answer_reaches_nothing(poison):
    score = 1 / (1 + np.exp(-numbers(6, len(MASK))))
    kl, values = numbers(7), numbers(8)
    dirty = [np.where(MASK, a, poison).astype(np.float32) for a in (kl, values)]
    clean = [np.where(MASK, a, 0).astype(np.float32) for a in (kl, values)]
    for ours, theirs in zip(all_of_it(score, *dirty, MASK), all_of_it(score, *clean, MASK), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    def total(kl, values):
        return sum(jnp.sum(a * a) for a in all_of_it(score, kl, values, MASK))

    for ours, theirs in zip(
        *(jax.grad(total, (0, 1))(*map(jnp.asarray, which)) for which in (dirty, clean)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert np.isfinite(ours).all() and not np.asarray(ours)[~MASK].any() and np.asarray(ours)[MASK].any()


def test_more_padding_and_another_place_in_the_row_change_nothing():
    score = 1 / (1 + np.exp(-numbers(6, len(MASK))))
    wide = lambda a, before, after: np.pad(a, ((0, 0), (before, after)), constant_values=a.dtype.type(7))  # noqa: E731
    kl, values = numbers(7), numbers(8)
    narrow = all_of_it(score, kl, values, MASK)
    for before, after in ((0, 5), (3, 2)):
        mask = np.pad(MASK, ((0, 0), (before, after)))
        got = all_of_it(score, wide(kl, before, after), wide(values, before, after), mask)
        for ours, theirs in zip(got, narrow, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(theirs)[MASK], atol=1e-6)
            assert not np.asarray(ours)[~mask].any()


@pytest.mark.parametrize("text", ["data=2,fsdp=4", "data=2,context=4"])
def test_eight_devices_change_nothing(text):
    """Whitening by each device's own entries would."""
    arrays = (1 / (1 + np.exp(-numbers(6, len(MASK)))), numbers(7), numbers(8), MASK)
    mesh = make_mesh(text)
    with jax.set_mesh(mesh):
        placed = (jax.device_put(a, sharding(mesh, *("batch", "length")[: a.ndim])) for a in arrays)
        got = jax.jit(all_of_it)(*placed)
    for ours, theirs in zip(got, all_of_it(*arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
