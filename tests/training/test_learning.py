"""It learns what it should and nothing else: a text by heart, and a Markov chain down to its entropy and not below."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.data.packing import Batch
from llama_jax.data.pipeline import DataConfig, make_batches
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.step import batch_loss, init_state, make_train_step

COMPUTE = Compute(dtype="float32", attention="xla", remat="none")
MODEL = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, head_dim=16, vocab_size=300, context_length=64
)
TEXT = """In a hole in the ground there lived a hobbit; not here. Here lives a model of two layers, which reads these few
lines 200 times. It is to say them by heart: that the 1st of them begins with a hole, that 7 times 8 are 56, that rain
in the plain falls mainly, that a quick brown fox jumps over a lazy dog, and that nothing else was ever written.
"""


@cache
def trainer(config, peak_lr, steps):
    """A function to a fresh state, and the training step."""
    optimizer = make_optimizer(OptimizerConfig(peak_lr=peak_lr, warmup_steps=20), config, steps)
    return jax.jit(lambda: init_state(config, optimizer, jax.random.key(0))), make_train_step(optimizer, COMPUTE)


def train(config, peak_lr, batches, steps):
    """The weights after so many steps, and the last step's loss."""
    fresh, step = trainer(config, peak_lr, steps)
    state = fresh()
    for _, batch in zip(range(steps), batches, strict=False):
        state, metrics = step(state, batch)
    return state.model, float(metrics.loss)


def test_a_small_text_is_learnt_by_heart(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.train(TEXT.splitlines(), tmp_path / "tokenizer.model", vocab_size=MODEL.vocab_size)
    data = DataConfig(sources=(f"text:{tmp_path}/text.txt",), held_out=0.0, prefetch=0)
    batch, _ = next(make_batches(data, tokenizer, rows=4, length=64, seed=0))
    assert batch.loss_mask_BT.sum() >= 4 * 64 - 1, "one text fills the batch"
    _, loss = train(MODEL, 1e-2, iter(lambda: batch, None), 200)
    assert loss < 0.05


STATES = 12
CHAIN = replace(MODEL, dim=32, n_layers=1, ffn_dim=64, head_dim=8, vocab_size=STATES, context_length=32)


def transition_matrix() -> np.ndarray:
    """P[i, j]: the probability that j follows i; every row another one, far from even."""
    return np.random.default_rng(0).dirichlet(np.full(STATES, 0.2), STATES)


def stationary(P: np.ndarray) -> np.ndarray:
    return np.linalg.matrix_power(P, 1000)[0]


def entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)


def chains(P: np.ndarray, rows: int, seed: int, shuffle_targets: bool = False):
    """Endless batches of the chain's states, from its stationary distribution on."""
    random = np.random.default_rng(seed)
    steps_SS, length = np.cumsum(P, axis=1), CHAIN.context_length
    while True:
        tokens = np.empty((rows, length + 1), np.int32)
        tokens[:, 0] = random.choice(STATES, rows, p=stationary(P))
        for t in range(length):
            draw = random.random((rows, 1))
            tokens[:, t + 1] = np.minimum((steps_SS[tokens[:, t]] < draw).sum(1), STATES - 1)
        targets = tokens[:, 1:]
        if shuffle_targets:
            targets = random.permuted(targets.ravel()).reshape(targets.shape)
        place_BT = np.broadcast_to(np.arange(length, dtype=np.int32), targets.shape)
        yield Batch(tokens[:, :-1], targets, np.ones_like(targets), place_BT, np.ones(targets.shape, bool))


def held_out_loss(model, P) -> tuple[float, float]:
    """Nats per target on chains never trained on, and what the chain itself, knowing P, would have had on them."""
    batch = next(chains(P, 1024, seed=99))
    weights = np.full(batch.tokens_BT.shape, 1 / batch.tokens_BT.size, np.float32)
    loss = jax.jit(lambda m: batch_loss(m, batch, weights, COMPUTE).nats)(model)
    return float(loss), float(-np.log(P[batch.tokens_BT, batch.targets_BT]).mean())


@pytest.fixture(scope="module")
def chain():
    P = transition_matrix()
    rate = float(stationary(P) @ entropy(P))
    # Otherwise there would be nothing to learn from the state, and the tests below would say nothing.
    assert rate < 0.7 * entropy(stationary(P)) and rate < 0.7 * np.log(STATES)
    return P, rate


def test_a_markov_source_is_learnt_down_to_its_entropy_rate_and_not_below(chain):
    P, rate = chain
    model, _ = train(CHAIN, 1e-2, chains(P, 32, seed=1), 250)
    loss, of_the_source = held_out_loss(model, P)
    assert of_the_source == pytest.approx(rate, rel=0.015), "32768 targets are enough to see 2%"
    assert loss < 1.02 * rate
    # No model is better than the source itself; what falls below would have been seen before.
    assert of_the_source - 1e-3 < loss < 1.02 * of_the_source


def test_without_a_learning_rate_nothing_moves(chain):
    P, rate = chain
    model, _ = train(CHAIN, 0.0, chains(P, 32, seed=1), 30)
    fresh = trainer(CHAIN, 0.0, 30)[0]().model
    jax.tree.map(np.testing.assert_array_equal, model, fresh)
    assert held_out_loss(model, P)[0] > 1.3 * rate


def test_with_shuffled_targets_only_the_frequencies_are_learnt(chain):
    P, rate = chain
    model, _ = train(CHAIN, 1e-2, chains(P, 32, seed=1, shuffle_targets=True), 250)
    loss, _ = held_out_loss(model, P)
    assert loss > 1.2 * rate
    assert loss == pytest.approx(entropy(stationary(P)), rel=0.03)
