"""AdamW and its schedule against numbers of the paper and a NumPy AdamW written from its definition."""

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.model import transformer
from llama_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from tests.training.tiny import MODEL, named

PAPER = OptimizerConfig()
TOTAL = 500_000  # about 2.0T tokens in batches of 4M
CONFIG = OptimizerConfig(peak_lr=1e-2, warmup_steps=2)
UPDATES = 3


def test_defaults_are_the_papers():
    assert (PAPER.b1, PAPER.b2, PAPER.eps) == (0.9, 0.95, 1e-5)
    assert (PAPER.weight_decay, PAPER.clip_norm, PAPER.warmup_steps, PAPER.final_lr_ratio) == (0.1, 1.0, 2000, 0.1)


@pytest.mark.parametrize("peak", [3e-4, 1.5e-4])
def test_learning_rate_rises_over_2000_steps_and_ends_at_a_tenth(peak):
    schedule = learning_rate(OptimizerConfig(peak_lr=peak), TOTAL)
    middle = (1999 + TOTAL - 1) / 2
    expected = {
        0: peak / 2000,
        999: peak / 2,
        1999: peak,
        2000: peak * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / (TOTAL - 2000)))),
        middle: peak * 0.55,
        TOTAL - 1: peak / 10,
    }
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6, abs=peak * 1e-7), step


def test_a_run_of_one_step_takes_it_at_the_peak():
    assert float(learning_rate(OptimizerConfig(peak_lr=1.0, warmup_steps=0), 1)(0)) == pytest.approx(1.0)


def test_the_shortest_runs_end_at_a_tenth_too():
    for warmup, total in ((0, 2), (1, 2), (2, 3)):
        schedule = learning_rate(OptimizerConfig(peak_lr=1.0, warmup_steps=warmup), total)
        assert float(schedule(max(warmup, 1) - 1)) == pytest.approx(1.0)
        assert float(schedule(total - 1)) == pytest.approx(0.1)
    rates = [float(learning_rate(CONFIG, 20)(step)) for step in range(20)]
    assert rates[1:] == sorted(rates[1:], reverse=True) and len(set(rates)) == 20, "the last step alone is the lowest"


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps is 2000.* 2000 steps.*--optimizer.warmup-steps"):
        learning_rate(PAPER, 2000)


def random_tree(seed: int, scale: float):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (scale * random.normal(size=s.shape)).astype(np.float32), transformer.abstract(MODEL))


# The first is far longer than the clip, the last far shorter, so that epsilon is felt.
GRADIENTS = [random_tree(1, 1.0), random_tree(2, 1e-2), random_tree(3, 1e-5)]


def is_norm(name: str) -> bool:
    return "norm" in name


def adamw_in_numpy(weights, *, eps_inside=False, decay_norms=False, clip_updates=False, coupled=False, corrected=True):
    """The weights after each update, float64, by the definition of AdamW, or by a common mistake in it."""
    c = CONFIG
    lr_of_step = [5e-3, 1e-2, 1e-2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 18)))]
    w = {name: leaf.astype(np.float64) for name, leaf in named(weights).items()}
    m, v = ({name: np.zeros(leaf.shape) for name, leaf in w.items()} for _ in range(2))

    def clip(tree):
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in tree.values()))
        return {name: leaf * min(1.0, c.clip_norm / norm) for name, leaf in tree.items()}

    history = []
    for t, lr in enumerate(lr_of_step, start=1):
        g = {name: leaf.astype(np.float64) for name, leaf in named(GRADIENTS[t - 1]).items()}
        g = g if clip_updates else clip(g)
        decay = {name: 0.0 if is_norm(name) and not decay_norms else c.weight_decay for name in w}
        if coupled:
            g = {name: g[name] + decay[name] * w[name] for name in w}
        step = {}
        for name in w:
            m[name] = c.b1 * m[name] + (1 - c.b1) * g[name]
            v[name] = c.b2 * v[name] + (1 - c.b2) * g[name] ** 2
            m_hat, v_hat = (m[name] / (1 - c.b1**t), v[name] / (1 - c.b2**t)) if corrected else (m[name], v[name])
            step[name] = m_hat / (np.sqrt(v_hat + c.eps) if eps_inside else np.sqrt(v_hat) + c.eps)
        step = clip(step) if clip_updates else step
        for name in w:
            w[name] = w[name] - lr * (step[name] + (0 if coupled else decay[name] * w[name]))
        history.append(dict(w))
    return history


@pytest.fixture(scope="module")
def weights():
    return random_tree(0, 0.3)


@pytest.fixture(scope="module")
def ours(weights):
    """The weights after each update of the optimizer, in float64 so that only the updates are rounded."""
    optimizer = make_optimizer(CONFIG, MODEL, 20)
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    w = {name: leaf.astype(np.float64) for name, leaf in named(weights).items()}
    history = []
    for gradient in GRADIENTS:
        updates, state = update(gradient, state, weights)
        weights = jax.tree.map(np.add, weights, updates)
        w = {name: w[name] + leaf for name, leaf in named(updates).items()}
        history.append(w)
    return history


def difference(ours, theirs, weights) -> float:
    """The largest relative error of any update of any weight leaf."""
    error, before = 0.0, [named(weights)] * 2
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine:
            change = other[name] - before[1][name]
            error = max(error, np.max(np.abs(mine[name] - before[0][name] - change)) / np.max(np.abs(change)))
        before = [mine, other]
    return error


def test_three_updates_are_those_of_adamw(ours, weights):
    assert difference(ours, adamw_in_numpy(weights), weights) < 1e-5


@pytest.mark.parametrize(
    "mistake",
    [{"eps_inside": True}, {"decay_norms": True}, {"clip_updates": True}, {"coupled": True}, {"corrected": False}],
)
def test_mistakes_in_adamw_would_be_seen(ours, weights, mistake):
    assert difference(ours, adamw_in_numpy(weights, **mistake), weights) > 1e-3


def test_without_a_gradient_matrices_decay_and_norms_do_not(weights):
    optimizer = make_optimizer(CONFIG, MODEL, 20)
    zeros = jax.tree.map(np.zeros_like, weights)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(weights), weights)
    names = named(updates)
    assert sum(map(is_norm, names)) == 3
    for name, update in names.items():
        expected = 0 if is_norm(name) else -5e-3 * 0.1 * named(weights)[name]
        np.testing.assert_allclose(update, expected * np.ones_like(update), rtol=1e-6, err_msg=name)
