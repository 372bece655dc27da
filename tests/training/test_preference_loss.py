"""The loss on pairs: the paper's formula, the same however a batch is split, and blind to places without a pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.pairs import UNKNOWN, BatchShape, PairBatch, Pairs, make_pair_batch
from llama_jax.model.heads import describe_reward_model, score, with_scalar_head, without_head
from llama_jax.parallel.mesh import make_mesh, sharding
from llama_jax.training import preference_loss
from llama_jax.training.batches import to_devices
from llama_jax.training.preference_loss import (
    LARGE_MARGINS,
    NO_MARGINS,
    SMALL_MARGINS,
    pair_scores,
    preferences_objective,
    ranking_loss,
    safety_loss,
)
from llama_jax.training.step import make_train_step, new_state
from tests.parity.numpy_llama import random_weights, to_ours
from tests.training.tiny import FP32, KEEP_GRADIENT, MODEL, relative_error

PACKED = [[0, 1], [2], [3, 4], [5]]  # of which row holds which pairs
PAIRS, LENGTH = 6, 64
jitted = jax.jit(pair_scores, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def model():
    return with_scalar_head(without_head(to_ours(random_weights(MODEL, seed=0), MODEL)), MODEL, jax.random.key(0))


def pairs() -> Pairs:
    """Every strength and label, dialogues of all lengths."""
    random = np.random.default_rng(0)
    sizes = random.integers(3, 16, 2 * PAIRS)
    ids = random.integers(3, MODEL.vocab_size, sizes.sum())
    none = np.zeros(PAIRS, np.int32)
    strength = np.array([UNKNOWN, 0, 1, 2, 3, 3], np.int8)
    safe = np.array([[1, 0], [1, 1], [0, 0], [UNKNOWN, UNKNOWN], [1, UNKNOWN], [0, 0]], np.int8)
    return Pairs(ids, np.cumsum([0, *sizes]), np.stack([none, none], 1), none, none, strength, safe, (PAIRS,))


def batch(packed=PACKED, length: int = LENGTH, places: int = 2) -> PairBatch:
    """Rows of unequally many pairs, and two places without one."""
    return make_pair_batch(pairs(), packed, BatchShape(len(packed), length, places), range(len(packed)))


def in_order(by_place, packed=PACKED) -> np.ndarray:
    """What belongs to each pair, from what belongs to each place."""
    return np.stack([np.asarray(by_place)[r, k] for r, row in enumerate(packed) for k in range(len(row))])


def by_numpy(scores, data: PairBatch, margins, safety_weight):
    """Ranking loss, whole loss and accuracy, in float64, pair by pair."""
    losses, ranking, right = [], [], []
    for pair in zip(*np.nonzero(data.pair_mask_BK), strict=True):
        chosen, rejected = map(float, scores[pair])
        strength = int(data.strength_BK[pair])
        margin = 0.0 if strength == UNKNOWN else margins[3 - strength]
        ranking.append(-np.log(1 / (1 + np.exp(-(chosen - rejected - margin)))))
        right.append(chosen > rejected)
        safety = 0.0
        for given, label in ((chosen, data.chosen_safe_BK[pair]), (rejected, data.rejected_safe_BK[pair])):
            probability = 1 / (1 + np.exp(-given))
            safety -= 0.0 if label == UNKNOWN else 0.5 * np.log(probability if label else 1 - probability)
        losses.append(ranking[-1] + safety_weight * safety)
    return np.mean(losses), np.mean(ranking), np.mean(right)


@pytest.mark.parametrize("safety_weight", [0.0, 0.7])
@pytest.mark.parametrize("margins", [NO_MARGINS, SMALL_MARGINS, LARGE_MARGINS])
def test_it_is_the_papers_formula(monkeypatch, margins, safety_weight):
    data = batch()
    scores = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, 2)), jnp.float32)
    monkeypatch.setattr(preference_loss, "pair_scores", lambda model, *_: model)
    weights = data.pair_mask_BK / np.float32(data.pair_mask_BK.sum())
    got = preferences_objective(margins, safety_weight).sums(scores, data, weights, FP32)
    np.testing.assert_allclose(got[:3], by_numpy(scores, data, margins, safety_weight), rtol=1e-5)


def test_the_margins_are_the_papers():
    assert NO_MARGINS == (0, 0, 0, 0) and SMALL_MARGINS == (1, 2 / 3, 1 / 3, 0) and LARGE_MARGINS == (3, 2, 1, 0)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_by_hand():
    """At equal scores with margin 1 it is -sigmoid(1); far ahead nothing is left to learn, unless a margin asks for more."""
    gradient = jax.grad(lambda c, r, m: ranking_loss(c, r, m), (0, 1))
    chosen, rejected = gradient(0.25, 0.25, 1.0)
    assert float(chosen) == pytest.approx(-0.7310586) and float(rejected) == pytest.approx(0.7310586)
    assert float(gradient(0.7, 0.0, 0.7)[0]) == pytest.approx(-0.5)
    assert abs(float(gradient(20.0, 0.0, 3.0)[0])) < 1e-7 < abs(float(gradient(5.0, 0.0, 3.0)[0]))
    safe = jax.grad(lambda scores: safety_loss(scores, jnp.array([[1, 0]])).sum())(jnp.zeros((1, 2)))
    np.testing.assert_allclose(safe, [[-0.25, 0.25]])
    assert not jax.grad(lambda scores: safety_loss(scores, jnp.full((1, 2), UNKNOWN)).sum())(jnp.ones((1, 2))).any()


def test_extreme_scores_give_a_finite_loss():
    assert np.isfinite(ranking_loss(-1e4, 1e4, 3.0)) and np.isfinite(ranking_loss(1e4, -1e4, 3.0))
    assert np.isfinite(safety_loss(jnp.array([[1e4, -1e4]]), jnp.array([[0, 1]]))).all()


def test_a_place_without_a_pair_reaches_neither_loss_nor_gradient(monkeypatch):
    data = batch()
    weights = data.pair_mask_BK / np.float32(data.pair_mask_BK.sum())
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 2)), jnp.float32)
    monkeypatch.setattr(preference_loss, "pair_scores", lambda model, *_: model)

    def of(scores):
        return preferences_objective(LARGE_MARGINS, 1.0).sums(scores, data, weights, FP32).loss

    clean, gradient = jax.value_and_grad(of)(scores)
    for poison in (jnp.nan, jnp.inf, -jnp.inf):
        dirty, dirty_gradient = jax.value_and_grad(of)(jnp.where(data.pair_mask_BK[..., None], scores, poison))
        assert float(dirty) == float(clean)
        np.testing.assert_array_equal(dirty_gradient, gradient)
    assert not gradient[~data.pair_mask_BK].any() and gradient[data.pair_mask_BK].all()


def test_padding_before_a_dialogue_changes_no_score(model):
    data = batch()
    ours, theirs = (in_order(jitted(model, data, FP32, left)) for left in (False, True))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_dialogue_is_scored_as_itself_whatever_shares_its_row(model):
    ours = in_order(jitted(model, batch(), FP32))
    read = jax.jit(score, static_argnums=4)
    for number in range(PAIRS):
        for side, ids in enumerate(pairs()[number]):
            tokens = np.zeros((1, 16), np.int32)
            tokens[0, : len(ids)] = ids
            alone = read(
                model, tokens, (np.arange(16) < len(ids))[None].astype(np.int32), np.array([[len(ids) - 1]]), FP32
            )
            np.testing.assert_allclose(ours[number, side], alone[0, 0], rtol=1e-5, atol=1e-6)
    other = [[5, 0], [4], [2], [1, 3]]
    again = np.concatenate([ours[row] for row in other])
    np.testing.assert_allclose(in_order(jitted(model, batch(other), FP32), other), again, rtol=1e-5, atol=1e-6)


def test_a_step_reports_what_the_formula_gives_of_the_models_scores(model, whole):
    _, ranking, right = by_numpy(jitted(model, batch(), FP32), batch(), LARGE_MARGINS, 0.5)
    np.testing.assert_allclose((whole[1].loss, whole[1].accuracy), (ranking, right), rtol=1e-5)


def gradient_of(model, data, micro_batches=1, layout=None):
    step = make_train_step(
        KEEP_GRADIENT,
        FP32,
        objective=preferences_objective(LARGE_MARGINS, 0.5),
        micro_batches=micro_batches,
        layout=layout,
    )
    state, metrics = step(new_state(jax.tree.map(jnp.array, model), KEEP_GRADIENT), data)
    return state.opt_state, metrics


@pytest.fixture(scope="module")
def whole(model):
    return gradient_of(model, batch())


def assert_equal_steps(ours, theirs) -> None:
    assert relative_error(ours[0], theirs[0]) < 1e-5
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(getattr(ours[1], name), getattr(theirs[1], name), rtol=1e-5)
    assert int(ours[1].targets) == int(theirs[1].targets) == PAIRS


def test_micro_batches_change_nothing_though_their_pairs_are_not_equally_many(model, whole):
    """Of four parts two have two pairs and two have one; the mean of the parts' means would be another."""
    assert_equal_steps(gradient_of(model, batch(), 4), whole)


def test_eight_devices_change_nothing(model, whole):
    mesh, packed = make_mesh("data=2,fsdp=2,tensor=2"), [[0, 1], [2], [3, 4], [5], [], [], [], []]
    data = batch(packed)
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda p: sharding(mesh, *p.axes), describe_reward_model(MODEL))
        got = gradient_of(jax.device_put(model, layout), to_devices(mesh, data, 8))
        assert got[0].trunk.layers.wq_DNH.sharding.is_equivalent_to(layout.trunk.layers.wq_DNH, 4)
    assert_equal_steps(got, whole)


def test_more_padding_and_more_places_change_no_score(model):
    wider = in_order(jitted(model, batch(length=96, places=3), FP32))
    np.testing.assert_allclose(wider, in_order(jitted(model, batch(), FP32)), rtol=1e-5, atol=1e-6)
