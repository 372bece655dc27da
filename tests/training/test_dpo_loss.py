"""The loss of direct preference optimisation: against a Llama in NumPy on unpacked dialogues, and the same however packed."""

import math
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.data.pairs import UNKNOWN, BatchShape, PairBatch, Pairs, make_pair_batch
from llama_jax.model.lora import LoraConfig, adapt, init_adapters, merge
from llama_jax.model.transformer import shardings
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.batches import to_devices
from llama_jax.training.dpo_loss import Policies, answer_log_probs, dpo_objective, drifts, pair_terms
from llama_jax.training.step import make_train_step, new_state
from tests.parity.numpy_llama import forward, random_weights, to_ours
from tests.training.tiny import FP32, KEEP_GRADIENT, MODEL, relative_error

PACKED = [[0, 1], [2], [3, 4], [5]]  # of which row holds which pairs
PAIRS, LENGTH, BETA = 6, 64, 0.3
log_probs_of = jax.jit(answer_log_probs, static_argnums=2)
drifts_of = jax.jit(drifts, static_argnums=2)


@pytest.fixture(scope="module")
def weights() -> list[dict]:
    return [random_weights(MODEL, seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def policies(weights) -> Policies:
    return Policies(*(to_ours(own, MODEL) for own in weights))


def pairs() -> Pairs:
    """Dialogues of all lengths; answers of one token, of all but the first, and of what lies between."""
    random = np.random.default_rng(0)
    sizes = random.integers(3, 16, 2 * PAIRS)
    ids = random.integers(3, MODEL.vocab_size, sizes.sum())
    answers = random.integers(1, sizes)
    answers[:2], answers[2:4] = 1, sizes[2:4] - 1
    none, unknown = np.zeros(PAIRS, np.int32), np.full((PAIRS, 2), UNKNOWN, np.int8)
    starts = np.cumsum([0, *sizes])
    return Pairs(ids, starts, answers.reshape(-1, 2), none, none, unknown[:, 0], unknown, (PAIRS,))


def batch(packed=PACKED, length: int = LENGTH, places: int = 2) -> PairBatch:
    """Rows of unequally many pairs, and two places without one."""
    return make_pair_batch(pairs(), packed, BatchShape(len(packed), length, places), range(len(packed)))


def in_order(by_place, packed=PACKED) -> np.ndarray:
    """What belongs to each pair, from what belongs to each place."""
    by_pair = {number: np.asarray(by_place)[r, k] for r, row in enumerate(packed) for k, number in enumerate(row)}
    return np.stack([by_pair[number] for number in range(PAIRS)])


def by_numpy(weights) -> np.ndarray:
    """Log-probabilities of the answers (pairs, 2), each dialogue alone, in float64."""
    found = []
    for number in range(PAIRS):
        for ids, answer in zip(pairs()[number], pairs().answers[number], strict=True):
            logits = forward(weights, ids, MODEL)
            all_log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            found.append(sum(all_log_probs[place - 1, ids[place]] for place in range(len(ids) - answer, len(ids))))
    return np.array(found).reshape(-1, 2)


@pytest.fixture(scope="module")
def expected(weights) -> np.ndarray:
    """By how much policy and reference differ on each answer (pairs, 2), in float64."""
    return by_numpy(weights[0]) - by_numpy(weights[1])


def test_an_answer_is_as_likely_as_its_dialogue_alone_makes_it(weights, policies):
    for own, model in zip(weights, policies, strict=True):
        np.testing.assert_allclose(in_order(log_probs_of(model, batch(), FP32)), by_numpy(own), rtol=1e-5)


def test_packing_and_padding_change_nothing(policies):
    packed = [[5, 0], [4], [2], [1, 3]]
    ours = in_order(drifts_of(policies, batch(packed, length=96, places=3), FP32), packed)
    np.testing.assert_allclose(ours, in_order(drifts_of(policies, batch(), FP32)), rtol=1e-4, atol=1e-5)


def formula(drift: np.ndarray, smoothing: float) -> float:
    wins = 1 / (1 + np.exp(-BETA * (drift[:, 0] - drift[:, 1])))
    return np.mean(-(1 - smoothing) * np.log(wins) - smoothing * np.log(1 - wins))


def test_a_step_reports_what_the_authors_formula_gives(whole, expected):
    metrics, margin = whole[1], BETA * (expected[:, 0] - expected[:, 1])
    np.testing.assert_allclose(metrics.loss, formula(expected, 0.0), rtol=1e-5)
    assert float(metrics.accuracy) == pytest.approx(np.mean(margin > 0)) and 0 < np.mean(margin > 0) < 1
    known = {"margin": margin.mean(), "chosen_drift": expected[:, 0].mean(), "rejected_drift": expected[:, 1].mean()}
    assert {name: float(value.sum()) for name, value in metrics.extras.items()} == pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_share_of_the_labels_may_be_wrong(expected, smoothing):
    got = pair_terms(jnp.asarray(expected), BETA, smoothing)["loss"].mean()
    np.testing.assert_allclose(got, formula(expected, smoothing), rtol=1e-5)


def test_the_gradient_by_hand():
    """At a tie half of beta to each side, up for the chosen answer; nothing is left to learn far ahead, unless labels may err."""

    def gradient(chosen, rejected, smoothing=0.0):
        of = jax.grad(lambda drift: pair_terms(drift, 0.1, smoothing)["loss"])
        return np.asarray(of(jnp.array([chosen, rejected])))

    np.testing.assert_allclose(gradient(3.0, 3.0), [-0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(gradient(0.0, 10.0), [-0.07310586, 0.07310586], rtol=1e-6)
    assert np.abs(gradient(200.0, 0.0)).max() < 1e-8 and gradient(200.0, 0.0, 0.2)[0] == pytest.approx(0.02)
    # Nine in ten right: there the smoothed loss is least.
    np.testing.assert_allclose(gradient(10 * math.log(9), 0.0, 0.1), 0, atol=1e-8)


def test_a_tie_is_half_right():
    right = pair_terms(jnp.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]), 0.1)["accuracy"]
    np.testing.assert_array_equal(right, [0.5, 1.0, 0.0])


def test_extreme_drifts_give_a_finite_loss():
    for drift in ([1e5, -1e5], [-1e5, 1e5]):
        value, gradient = jax.value_and_grad(lambda d: pair_terms(d, 0.1, 0.1)["loss"])(jnp.array(drift))
        assert np.isfinite(value) and np.isfinite(gradient).all()


@cache
def train_step(micro_batches: int = 1):
    return make_train_step(
        KEEP_GRADIENT,
        FP32,
        objective=dpo_objective(BETA),
        micro_batches=micro_batches,
        assemble=lambda trained, reference, key: Policies(trained, reference),
    )


def gradient_of(policies, data, micro_batches=1):
    begun = new_state(jax.tree.map(jnp.array, policies[0]), KEEP_GRADIENT)
    state, metrics = train_step(micro_batches)(begun, data, policies[1])
    return state.opt_state, metrics


@pytest.fixture(scope="module")
def whole(policies):
    return gradient_of(policies, batch())


def assert_equal_steps(ours, theirs) -> None:
    assert relative_error(ours[0], theirs[0]) < 2e-5
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(getattr(ours[1], name), getattr(theirs[1], name), rtol=2e-5)
    both = [{name: float(parts.sum()) for name, parts in one[1].extras.items()} for one in (ours, theirs)]
    assert both[0] == pytest.approx(both[1], rel=2e-5)
    assert int(ours[1].targets) == int(theirs[1].targets) == PAIRS


def test_micro_batches_change_nothing_though_their_pairs_are_not_equally_many(policies, whole):
    assert_equal_steps(gradient_of(policies, batch(), 4), whole)


def test_eight_devices_change_nothing(policies, whole):
    """Rows, sequences, heads and the vocabulary split."""
    mesh, packed = make_mesh("fsdp=2,context=2,tensor=2"), [*PACKED, [], [], [], []]
    with jax.set_mesh(mesh):
        layout = shardings(MODEL, mesh)
        got = gradient_of([jax.device_put(model, layout) for model in policies], to_devices(mesh, batch(packed), 8))
    assert_equal_steps(got, whole)


def test_before_the_first_step_the_gradient_is_that_of_the_plain_difference(policies):
    """In likelihood, between the chosen and the rejected answers, times half of beta; the loss is log 2."""

    def differences(model):
        log_probs_BK2 = answer_log_probs(model, batch(), FP32)
        return jnp.sum(log_probs_BK2[..., 0] - log_probs_BK2[..., 1]) / PAIRS

    gradient, metrics = gradient_of((policies.policy, policies.policy), batch())
    assert float(metrics.loss) == pytest.approx(math.log(2), rel=1e-6)
    plain = jax.jit(jax.grad(differences))(policies.policy)
    assert relative_error(gradient, jax.tree.map(lambda g: -0.5 * BETA * g, plain)) < 1e-4


def test_a_narrow_copy_is_as_good_a_reference_as_the_weights_it_was_made_of(policies):
    """Since the policy is narrowed in the same way before it computes."""
    compute = Compute(dtype="bfloat16", attention="xla", remat="none", loss_chunk=8)
    copy = jax.jit(lambda model: model.cast("bfloat16"))(policies.policy)
    assert np.abs(drifts_of(Policies(policies.policy, copy), batch(), compute)).max() < 1e-4
    assert np.abs(drifts_of(Policies(policies.policy, policies.reference), batch(), compute)).max() > 1


def test_the_reference_of_adapters_is_the_model_they_begin_from(policies):
    """Fresh adapters change nothing; moved ones make the policy another, and the reference stays the frozen model."""
    lora, frozen = LoraConfig(rank=4), policies.policy
    fresh = init_adapters(MODEL, lora, jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.05, fresh)
    still, drift = (
        in_order(drifts_of(Policies(adapt(frozen, a, lora), frozen), batch(), FP32)) for a in (fresh, moved)
    )
    assert np.abs(still).max() < 1e-4 and np.abs(drift).min() > 1e-3
    merged = in_order(log_probs_of(merge(frozen, moved, lora), batch(), FP32))
    np.testing.assert_allclose(drift, merged - in_order(log_probs_of(frozen, batch(), FP32)), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_outside_of_answers_reaches_neither_loss_nor_gradient():
    data, random = batch(), np.random.default_rng(3)
    x_BTD = jnp.asarray(random.normal(size=(*data.tokens_BT.shape, 8)), jnp.float32)
    head_DV = jnp.asarray(random.normal(size=(8, MODEL.vocab_size)), jnp.float32)
    answered_BT = np.zeros(data.tokens_BT.shape, bool)
    for r, k in zip(*np.nonzero(data.pair_mask_BK), strict=True):
        for last, count in (
            (data.chosen_last_BK, data.chosen_answer_BK),
            (data.rejected_last_BK, data.rejected_answer_BK),
        ):
            answered_BT[r, last[r, k] - count[r, k] : last[r, k]] = True

    @jax.jit
    @jax.value_and_grad
    def loss(x_BTD, head_DV):
        model, other = (
            SimpleNamespace(hidden=lambda *_, x=x, **__: x, output_head=lambda: head_DV) for x in (x_BTD, -x_BTD)
        )
        weights_BK = data.pair_mask_BK / np.float32(PAIRS)
        return dpo_objective(BETA).sums(Policies(model, other), data, weights_BK, FP32).loss

    clean, gradient = loss(x_BTD, head_DV)
    assert np.abs(gradient)[answered_BT].max(1).min() > 0 and not np.any(gradient[~answered_BT])
    for poison in (jnp.nan, jnp.inf):
        dirty, dirty_gradient = loss(jnp.where(answered_BT[..., None], x_BTD, poison), head_DV)
        assert float(dirty) == float(clean)
        np.testing.assert_array_equal(dirty_gradient, gradient)
