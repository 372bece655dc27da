"""The losses of PPO: against formulas in NumPy, the same however a batch is split, and blind to what nobody drew."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llama_jax.config import Compute
from llama_jax.model.heads import RewardModel, with_scalar_head, without_head
from llama_jax.model.quantize import quantize_model
from llama_jax.model.transformer import shardings
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import ppo_loss
from llama_jax.training.batches import to_devices
from llama_jax.training.ppo_loss import (
    Experience,
    explained_variance,
    policy_log_probs,
    policy_metrics,
    policy_objective,
    token_log_probs,
    token_values,
    value_objective,
)
from llama_jax.training.step import make_train_step, new_state
from tests.parity.numpy_llama import random_weights, to_ours
from tests.training.tiny import FP32, KEEP_GRADIENT, MODEL, relative_error

ROWS, T, V = 8, 16, MODEL.vocab_size
CLIP, TEMPERATURE = 0.2, 0.7
OBJECTIVES = {"policy": policy_objective(CLIP, TEMPERATURE), "value": value_objective()}

log_probs_of = jax.jit(policy_log_probs, static_argnums=(3, 4))


@pytest.fixture(scope="module")
def model():
    return to_ours(random_weights(MODEL, seed=0), MODEL)


@pytest.fixture(scope="module")
def critic(model):
    return with_scalar_head(without_head(model), MODEL, jax.random.key(0))


def experience(seed: int = 0) -> Experience:
    """Random tokens, and answers of very unlike lengths: micro-batches of it have unlike shares of all drawn tokens."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, V, (ROWS, T + 1)).astype(np.int32)
    start_B1 = random.integers(1, 5, (ROWS, 1))
    end_B1 = start_B1 + np.array([1, 2, 10, 11, 3, 5, 9, 0])[:, None]
    floats = random.normal(size=(3, ROWS, T)).astype(np.float32)
    floats[2] += 1  # or the critic's errors nearly cancel, and with them its bias's gradient
    mask_BT = (np.arange(T) >= start_B1) & (np.arange(T) < end_B1)
    return Experience(tokens[:, :-1], tokens[:, 1:], np.ones((ROWS, T), np.int32), mask_BT, *floats)


@pytest.fixture(scope="module")
def drawn(model):
    """Experience whose old log-probabilities are those of a policy nearby: ratios within and beyond the clip range."""
    data = experience()
    now_BT, _ = log_probs_of(model, data.tokens_BT, data.targets_BT, TEMPERATURE, FP32)
    return data._replace(old_log_probs_BT=np.asarray(now_BT) + 0.3 * data.old_log_probs_BT)


def weights_of(data: Experience) -> np.ndarray:
    return data.answer_mask_BT / np.float32(max(data.answer_mask_BT.sum(), 1))


def poisoned(data: Experience, poison: float) -> Experience:
    """With `poison` in every float that belongs to no drawn token."""
    return data._replace(
        **{
            name: np.where(data.answer_mask_BT, getattr(data, name), np.float32(poison))
            for name in ("old_log_probs_BT", "advantages_BT", "returns_BT")
        }
    )


# Log-probabilities


def head_inputs(dtype=jnp.float32):
    random = np.random.default_rng(0)
    x_BTD, head_DV = random.normal(size=(3, 20, 16)), random.normal(size=(16, 301)) / 16**0.5 * 3
    targets_BT, ct_BT = random.integers(0, 301, (3, 20)), random.normal(size=(3, 20))
    return jnp.asarray(x_BTD, dtype), jnp.asarray(head_DV, dtype), jnp.asarray(targets_BT, jnp.int32), ct_BT


@pytest.mark.parametrize(("chunk", "temperature"), [(5, 1.0), (7, 0.7), (20, 1.3), (64, 0.7)])
def test_log_probs_entropies_and_gradients_are_those_of_a_full_softmax(chunk, temperature):
    x, head, targets, ct = head_inputs()

    def ours(x, head):
        log_probs, entropy = token_log_probs(x, head, targets, temperature, chunk)
        return jnp.sum(ct * log_probs), (log_probs, entropy)

    def theirs(x, head):
        log_probs_BTV = jax.nn.log_softmax(x @ head / temperature)
        log_probs = jnp.take_along_axis(log_probs_BTV, targets[..., None], -1)[..., 0]
        return jnp.sum(ct * log_probs), (log_probs, -jnp.sum(jnp.exp(log_probs_BTV) * log_probs_BTV, -1))

    (_, values), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(x, head)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a, np.float64)) for a in (x, head))
        (_, wanted), wanted_gradients = jax.value_and_grad(theirs, (0, 1), has_aux=True)(*wide)
    assert relative_error((values, gradients), (wanted, wanted_gradients)) < 2e-6
    assert {value.dtype for value in values} == {jnp.dtype("float32")}


def test_logits_beyond_the_range_of_the_exponential_are_no_trouble():
    logits_V = jnp.array([300.0, 299.0, -300.0])
    log_probs, entropy = token_log_probs(jnp.ones((1, 3, 1)), logits_V[None], jnp.array([[0, 1, 2]]), 1.0, 3)
    odds = np.exp(-1)
    np.testing.assert_allclose(log_probs[0], np.array([0, -1, -600]) - np.log1p(odds), rtol=1e-6)
    np.testing.assert_allclose(entropy[0], np.log1p(odds) + odds / (1 + odds), rtol=1e-5)


def shapes_in(jaxpr):
    """The shape of every value that a program computes, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_full_logits_never_exist_and_the_backward_pass_keeps_none():
    x, head, targets, _ = head_inputs()
    program = jax.make_jaxpr(jax.grad(lambda x, head: token_log_probs(x, head, targets, 0.7, 5)[0].sum(), (0, 1)))
    with_tokens_and_words = [a.size for a in shapes_in(program(x, head).jaxpr) if 301 in a.shape and 16 not in a.shape]
    assert max(with_tokens_and_words) == 3 * 5 * 301


def test_the_heads_gradient_is_summed_in_float32_though_computed_in_bfloat16():
    """Many equal tokens: a bfloat16 sum, of 8 bits, would stop growing at 256 of them."""
    x, head, targets, _ = head_inputs(jnp.bfloat16)

    def gradient(n, chunk):
        tokens = jnp.repeat(x[:1, :1], n, 1), jnp.repeat(targets[:1, :1], n, 1)
        whole = lambda head: token_log_probs(tokens[0], head, tokens[1], 0.7, chunk)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(whole))(head)

    one, many = gradient(1, 1), gradient(2048, 2)
    assert one.dtype == many.dtype == jnp.bfloat16
    assert relative_error(many.astype(jnp.float32), 2048 * one.astype(jnp.float32)) < 2**-6


def test_a_models_log_probs_are_those_of_its_logits_at_the_temperature_quantised_or_not(model):
    data = experience()
    for given in (model, quantize_model(model)):
        got, _ = log_probs_of(given, data.tokens_BT, data.targets_BT, TEMPERATURE, FP32)
        full_BTV = jax.nn.log_softmax(jax.jit(lambda m: m(data.tokens_BT, compute=FP32))(given) / TEMPERATURE)
        want = np.take_along_axis(np.asarray(full_BTV), data.targets_BT[..., None], -1)[..., 0]
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_hidden_states_outside_of_answers_reach_neither_loss_nor_gradient(kind, poison):
    data, random = experience(), np.random.default_rng(1)
    x_BTD = random.normal(size=(ROWS, T, 8))
    head = jnp.asarray(random.normal(size=(8, V) if kind == "policy" else 8), jnp.float32)

    def loss(x_BTD, head):
        trunk = SimpleNamespace(hidden=lambda tokens, **_: x_BTD, output_head=lambda: head)
        stub = trunk if kind == "policy" else RewardModel(trunk, head, jnp.zeros(()))
        return OBJECTIVES[kind].sums(stub, data, weights_of(data), FP32).loss

    inputs = (jnp.asarray(np.where(data.answer_mask_BT[..., None], x_BTD, bad), jnp.float32) for bad in (0, poison))
    of = jax.jit(jax.value_and_grad(loss, (0, 1)))
    clean, dirty = (of(x, head) for x in inputs)
    for ours, theirs in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# The policy's loss, of log-probabilities that stand in for a model


@pytest.fixture
def given_log_probs(monkeypatch):
    """The model is its log-probabilities, each with an entropy of 1."""
    monkeypatch.setattr(ppo_loss, "policy_log_probs", lambda model, *_: (model, jnp.ones(model.shape)))


def policy_sums(log_probs, data, clip=CLIP):
    return policy_objective(clip, TEMPERATURE).sums(jnp.asarray(log_probs, jnp.float32), data, weights_of(data), FP32)


def test_the_surrogate_and_all_that_is_reported_are_the_papers_formulas(given_log_probs):
    data = experience()
    log_probs = data.old_log_probs_BT + 0.3 * experience(1).old_log_probs_BT
    got = policy_sums(log_probs, data)
    losses, kls, ratios = [], [], []
    for place in zip(*np.nonzero(data.answer_mask_BT), strict=True):
        log_ratio = float(log_probs[place]) - float(data.old_log_probs_BT[place])
        ratio, advantage = np.exp(log_ratio), float(data.advantages_BT[place])
        losses.append(-min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage))
        kls.append(ratio - 1 - log_ratio)
        ratios.append(ratio)
    beyond = np.mean([abs(ratio - 1) > CLIP for ratio in ratios])
    assert 0.2 < beyond < 0.8
    np.testing.assert_allclose(got.loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(got.extras, (1, np.mean(kls), beyond, 1, min(ratios), max(ratios)), rtol=1e-5)
    assert float(got.nats) == float(got.loss) and float(got.correct) == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.3, 1, 0), (1.3, -1, 1.3), (0.7, 1, -0.7), (0.7, -1, 0), (1.1, 1, -1.1), (0.9, -1, 0.9), (1, 2, -2)],
)
def test_beyond_the_clip_range_only_the_way_back_has_a_slope(given_log_probs, ratio, advantage, slope):
    """Each case by hand: the slope of -ratio * advantage along the log-probability, or none."""
    one = np.ones((1, 1), np.float32)
    none = np.zeros((1, 1), np.int32)
    data = Experience(none, none, none + 1, one > 0, -2 * one, advantage * one, one)
    got = jax.grad(lambda log_probs: policy_sums(log_probs, data).loss)(jnp.asarray(-2 + np.log(ratio) * one))
    np.testing.assert_allclose(got, [[slope]], rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_belongs_to_no_drawn_token_reaches_neither_loss_nor_gradient_nor_report(given_log_probs, poison):
    data = experience()
    log_probs = data.old_log_probs_BT + 0.1
    of = jax.value_and_grad(lambda log_probs, data: (lambda s: (s.loss, s))(policy_sums(log_probs, data)), has_aux=True)
    clean = of(jnp.asarray(log_probs), data)
    bad = jnp.asarray(np.where(data.answer_mask_BT, log_probs, poison))
    for ours, theirs in zip(jax.tree.leaves(of(bad, poisoned(data, poison))), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.asarray(clean[1])[~data.answer_mask_BT].any()


def test_reports_of_several_steps_come_to_means_and_extremes(given_log_probs):
    log_ratios = (0.1, -0.5)
    steps = [policy_sums(experience(i).old_log_probs_BT + r, experience(i)).extras for i, r in enumerate(log_ratios)]
    # Each of two micro-batches, one of them without a drawn token, as a step that skips it hands them on.
    empty = jax.tree.map(np.zeros_like, steps[0])
    steps = [jax.tree.map(lambda *parts: np.stack(parts), step, empty) for step in steps]
    # A place without a drawn token has no ratio, not one of 1.
    alone = policy_metrics(steps[:1])
    assert alone["ratio_min"] == pytest.approx(np.exp(0.1)) == pytest.approx(alone["ratio_max"])
    got = policy_metrics(steps)
    want = {
        "approx_kl": np.mean([np.exp(r) - 1 - r for r in log_ratios]),
        "clip_fraction": 0.5,
        "entropy": 1.0,
        "ratio_min": np.exp(-0.5),
        "ratio_max": np.exp(0.1),
    }
    assert got == pytest.approx(want, rel=1e-4)


# The critic's loss


def given_values(monkeypatch):
    monkeypatch.setattr(ppo_loss, "token_values", lambda model, *_: model)


def value_sums(values, data):
    return value_objective().sums(jnp.asarray(values, jnp.float32), data, weights_of(data), FP32)


def test_the_critics_loss_is_half_the_squared_error(monkeypatch):
    given_values(monkeypatch)
    data, values = experience(), experience(1).returns_BT
    got = value_sums(values, data)
    drawn = zip(*np.nonzero(data.answer_mask_BT), strict=True)
    losses = [0.5 * (float(values[place]) - float(data.returns_BT[place])) ** 2 for place in drawn]
    np.testing.assert_allclose(got.loss, np.mean(losses), rtol=1e-5)
    gradient = jax.grad(lambda values: value_sums(values, data).loss)(jnp.asarray(values))
    np.testing.assert_allclose(gradient, weights_of(data) * (values - data.returns_BT), atol=1e-7)


def test_explained_variance_is_of_all_drawn_tokens_however_they_were_split(monkeypatch):
    given_values(monkeypatch)
    data = experience()
    for values in (0.7 * data.returns_BT + 0.1, 3 - data.returns_BT, data.returns_BT):
        halves = [slice(0, None, 2), slice(1, None, 2)]
        parts = [
            value_objective()
            .sums(jnp.asarray(values[half]), Experience(*(a[half] for a in data)), weights_of(data)[half], FP32)
            .extras
            for half in halves
        ]
        got = explained_variance([jax.tree.map(lambda *parts: np.stack(parts), *parts)])
        returns, kept = data.returns_BT[data.answer_mask_BT], values[data.answer_mask_BT]
        assert got == pytest.approx(1 - np.var(returns - kept) / np.var(returns), abs=1e-5)
    flat = data._replace(returns_BT=np.zeros((ROWS, T), np.float32))
    assert np.isnan(explained_variance([value_sums(values, flat).extras]))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_values_and_returns_of_no_drawn_token_reach_nothing(monkeypatch, poison):
    given_values(monkeypatch)
    data, values = experience(), jnp.asarray(experience(1).returns_BT)
    of = jax.value_and_grad(lambda values, data: (lambda s: (s.loss, s))(value_sums(values, data)), has_aux=True)
    dirty = of(jnp.where(data.answer_mask_BT, values, poison), poisoned(data, poison))
    for ours, theirs in zip(jax.tree.leaves(dirty), jax.tree.leaves(of(values, data)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_value_is_of_the_state_before_its_token(critic):
    """The token drawn at place t is token t + 1: changing it changes no value up to t, and those from t + 1 on."""
    tokens = experience().tokens_BT[:1]
    read = jax.jit(token_values, static_argnums=2)
    before = read(critic, tokens, FP32)
    t = 6
    other = tokens.copy()
    other[0, t + 1] = (other[0, t + 1] + 1) % V
    after = read(critic, other, FP32)
    np.testing.assert_array_equal(before[0, : t + 1], after[0, : t + 1])
    assert (np.abs(np.asarray(before - after))[0, t + 1 :] > 1e-4).all()


def test_values_are_read_in_float32_whatever_the_trunks_precision(critic):
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, T, MODEL.dim)), jnp.bfloat16)
    given = dataclasses.replace(critic, trunk=SimpleNamespace(hidden=lambda tokens, compute: x_BTD))
    values = token_values(given, experience().tokens_BT, Compute(dtype="bfloat16"))
    want = np.asarray(x_BTD, np.float64) @ np.asarray(critic.head_D, np.float64) + float(critic.bias)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, want, atol=1e-6)


# Whole steps


@cache
def gradient_step(kind, micro_batches=1):
    return make_train_step(KEEP_GRADIENT, FP32, objective=OBJECTIVES[kind], micro_batches=micro_batches)


def gradient_of(kind, start, data, micro_batches=1):
    state, metrics = gradient_step(kind, micro_batches)(new_state(jax.tree.map(jnp.array, start), KEEP_GRADIENT), data)
    return state.opt_state, metrics


def test_at_first_every_ratio_is_one_and_the_gradient_the_plain_policy_gradient_afterwards_not(model):
    data = experience()
    old_BT, _ = log_probs_of(model, data.tokens_BT, data.targets_BT, TEMPERATURE, FP32)
    data = data._replace(old_log_probs_BT=np.asarray(old_BT))
    gradient, metrics = gradient_of("policy", model, data)
    got = policy_metrics([metrics.extras])
    assert got["ratio_min"] == pytest.approx(1, abs=1e-5) and got["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert got["clip_fraction"] == 0 and abs(got["approx_kl"]) < 1e-9

    def plain(model):
        logits_BTV = model(data.tokens_BT, compute=FP32) / TEMPERATURE
        log_probs_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), data.targets_BT[..., None], -1)[..., 0]
        return -jnp.sum(weights_of(data) * data.advantages_BT * log_probs_BT)

    assert relative_error(gradient, jax.jit(jax.grad(plain))(model)) < 2e-5
    moved = jax.tree.map(lambda weight, slope: weight - 0.5 * slope, model, gradient)
    later = policy_metrics([gradient_of("policy", moved, data)[1].extras])
    assert later["ratio_min"] < 0.9 and later["ratio_max"] > 1.1
    assert later["approx_kl"] > 1e-3 and later["clip_fraction"] > 0.05


@pytest.fixture(scope="module")
def whole(model, critic, drawn):
    return {"policy": gradient_of("policy", model, drawn), "value": gradient_of("value", critic, drawn)}


def assert_equal_steps(ours, theirs) -> None:
    assert relative_error(ours[0], theirs[0]) < 2e-5
    np.testing.assert_allclose(ours[1].loss, theirs[1].loss, rtol=1e-5)
    assert int(ours[1].targets) == int(theirs[1].targets) == experience().answer_mask_BT.sum()
    if isinstance(theirs[1].extras, ppo_loss.PolicySums):
        got, want = policy_metrics([ours[1].extras]), policy_metrics([theirs[1].extras])
        assert got == pytest.approx(want, rel=1e-4) and 0.1 < want["clip_fraction"] < 0.9
    else:
        assert explained_variance([ours[1].extras]) == pytest.approx(explained_variance([theirs[1].extras]), rel=1e-4)


@pytest.mark.parametrize(("kind", "parts"), [("policy", 4), ("value", 2)])
def test_micro_batches_change_nothing_though_their_answers_are_not_equally_long(
    model, critic, drawn, whole, kind, parts
):
    got = gradient_of(kind, {"policy": model, "value": critic}[kind], drawn, parts)
    assert all(extra.shape == (parts,) for extra in got[1].extras)
    assert_equal_steps(got, whole[kind])


def test_eight_devices_change_nothing(model, drawn, whole):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    with jax.set_mesh(mesh):
        start = jax.device_put(model, shardings(MODEL, mesh))
        got = gradient_of("policy", start, to_devices(mesh, drawn, ROWS))
    assert_equal_steps(got, whole["policy"])


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_more_padding_changes_neither_loss_nor_report(model, critic, drawn, whole, kind):
    wider = Experience(*(np.pad(a, ((0, 0), (0, 8))) for a in drawn))
    start, metrics = {"policy": model, "value": critic}[kind], whole[kind][1]
    sums = jax.jit(OBJECTIVES[kind].sums, static_argnums=3)(start, wider, weights_of(wider), FP32)
    np.testing.assert_allclose(sums.loss, metrics.loss, rtol=1e-5)
    report = policy_metrics if kind == "policy" else explained_variance
    assert report([sums.extras]) == pytest.approx(report([metrics.extras]), rel=1e-5)
