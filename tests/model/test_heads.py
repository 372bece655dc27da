"""The reward model: its score is a function of the sequence alone, in float32, read at the sequence's last token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.model import transformer
from llama_jax.model.heads import (
    abstract_reward_model,
    describe_reward_model,
    positions,
    score,
    standardised,
    with_scalar_head,
    without_head,
)
from llama_jax.parallel.mesh import make_mesh, sharding
from tests.parity.numpy_llama import random_weights, to_ours

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=64, head_dim=8, context_length=32
)
jitted = jax.jit(score, static_argnums=4)
FP32 = Compute(dtype="float32", attention="xla", remat="none")
SIZES = (9, 4, 13, 1, 6)
LENGTH = 20


@pytest.fixture(scope="module")
def model():
    return with_scalar_head(without_head(to_ours(random_weights(CONFIG, seed=0), CONFIG)), CONFIG, jax.random.key(1))


@pytest.fixture(scope="module")
def sequences():
    random = np.random.default_rng(0)
    return [random.integers(0, CONFIG.vocab_size, size).astype(np.int32) for size in SIZES]


@pytest.fixture(scope="module")
def alone(model, sequences):
    """Each sequence's score, by itself and without padding."""
    return np.array([rows(model, [[ids]], len(ids))[0, 0] for ids in sequences])


def rows(model, groups, length, *, left=0, gap=0, filler=0, last=None):
    """Scores of groups of sequences, each group in a row: `left` places of padding before it and `gap` between."""
    tokens = np.full((len(groups), length), filler, np.int32)
    segments = np.zeros((len(groups), length), np.int32)
    ends = np.zeros((len(groups), max(map(len, groups))), np.int32)
    for r, group in enumerate(groups):
        at = left if left >= 0 else length - len(group[0])
        for k, ids in enumerate(group):
            tokens[r, at : at + len(ids)], segments[r, at : at + len(ids)] = ids, k + 1
            ends[r, k] = at + len(ids) - 1
            at += len(ids) + gap
    return np.asarray(jitted(model, tokens, segments, ends if last is None else last, FP32))


@pytest.mark.parametrize(
    "layout",
    [{}, {"left": -1}, {"left": 5}, {"filler": 63}, {"filler": 63, "left": 7}],
    ids=["right", "left", "both", "filled", "filled both"],
)
def test_the_score_does_not_depend_on_padding_or_on_the_batch(model, sequences, alone, layout):
    batch = rows(model, [[ids] for ids in sequences], LENGTH, **layout)[:, 0]
    np.testing.assert_allclose(batch, alone, rtol=1e-5, atol=1e-6)
    assert np.ptp(alone) > 0.5


@pytest.mark.parametrize("gap", [0, 2])
def test_the_score_does_not_depend_on_what_shares_a_row(model, sequences, alone, gap):
    packed = rows(model, [sequences[:2], sequences[2:]], 30, left=3, gap=gap)
    np.testing.assert_allclose(np.concatenate([packed[0, :2], packed[1]]), alone, rtol=1e-5, atol=1e-6)


def test_the_score_does_not_depend_on_what_stands_after_the_end(model, sequences, alone):
    """Even in the same segment, where only its place is told."""
    tokens = np.stack([np.concatenate([sequences[0], np.full(LENGTH - 9, fill, np.int32)]) for fill in (0, 5, 63)])
    got = jitted(model, tokens, np.ones_like(tokens), np.full((3, 1), 8), FP32)[:, 0]
    np.testing.assert_allclose(got, alone[0], rtol=1e-5)


def test_every_token_up_to_the_last_matters_and_the_last_is_read(model, sequences, alone):
    for place in range(9):
        changed = sequences[0].copy()
        changed[place] = (changed[place] + 1) % CONFIG.vocab_size
        assert abs(rows(model, [[changed]], 9)[0, 0] - alone[0]) > 1e-3
    before = rows(model, [[sequences[0]]], 9, last=np.array([[7]]))[0, 0]
    np.testing.assert_allclose(before, rows(model, [[sequences[0][:8]]], 8)[0, 0], rtol=1e-5)
    assert abs(before - alone[0]) > 1e-3


def test_positions_count_from_each_segments_first_token():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0], [3, 3, 0, 0, 1, 1, 1, 1]])
    assert positions(segments).tolist() == [[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 0, 1, 2, 3]]


def test_the_head_computes_in_float32_whatever_the_trunk_does(model, sequences):
    bf16 = jitted(
        model, sequences[0][None], np.ones((1, 9), np.int32), np.array([[8]]), replace(FP32, dtype="bfloat16")
    )
    x = model.trunk.hidden(sequences[0][None], compute=replace(FP32, dtype="bfloat16"))[0, 8]
    assert x.dtype == jnp.bfloat16 and bf16.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(model.head_D, np.float64)
    np.testing.assert_allclose(bf16[0, 0], exact, rtol=1e-6, atol=1e-6)
    # A score is a float all the way, bias and all.
    assert float(replace(model, head_D=model.head_D * 0, bias=jnp.float32(0.7)).read(x)) == np.float32(0.7)


def test_what_is_not_finite_elsewhere_reaches_neither_score_nor_gradient(model, sequences, monkeypatch):
    x = model.trunk.hidden(sequences[0][None], compute=FP32)
    poisoned = x.at[0, :8].set(jnp.nan).at[0, 3].set(jnp.inf)

    def of(head_D, x):
        read = replace(model, head_D=head_D).read(jnp.take_along_axis(x, jnp.array([[[8]]]), axis=1))
        return read.sum()

    clean, grads = jax.value_and_grad(of, (0, 1))(model.head_D, x)
    dirty, dirty_grads = jax.value_and_grad(of, (0, 1))(model.head_D, poisoned)
    assert clean == dirty and all(map(np.array_equal, grads, dirty_grads))
    # And `score` reads just so.
    monkeypatch.setattr(transformer.Transformer, "hidden", lambda *_, **__: poisoned)
    got = score(model, sequences[0][None], np.ones((1, 9), np.int32), np.array([[8]]), FP32)
    assert float(got[0, 0]) == float(clean)


def test_the_head_begins_with_the_stated_spread_and_without_bias():
    wide = replace(CONFIG, dim=4096, n_layers=1, vocab_size=8)
    declared = describe_reward_model(wide)
    assert declared.head_D.std == (4096 + 1) ** -0.5
    model = with_scalar_head(None, wide, jax.random.key(0))
    assert float(model.bias) == 0 and model.head_D.dtype == jnp.float32
    np.testing.assert_allclose(float(model.head_D.std()) * 4097**0.5, 1, atol=0.04)
    assert abs(float(model.head_D.mean())) < 4 / 4097


def test_it_is_the_trunk_without_its_output_head(model):
    trunk = to_ours(random_weights(CONFIG, seed=0), CONFIG)
    assert not hasattr(model.trunk, "head_DV") and model.trunk.config.n_params < CONFIG.n_params
    assert all(map(np.array_equal, jax.tree.leaves(model.trunk.layers), jax.tree.leaves(trunk.layers)))
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_reward_model(CONFIG))
    assert shapes.head_D == (32,) and shapes.bias == ()
    assert jax.tree.structure(shapes, is_leaf=lambda s: isinstance(s, tuple)) == jax.tree.structure(model)


def test_standardised_scores_are_those_less_the_mean_in_units_of_the_deviation(model, sequences, alone):
    mean, std = alone.mean(), alone.std(ddof=1)
    got = rows(standardised(model, mean, std), [[ids] for ids in sequences], LENGTH)[:, 0]
    np.testing.assert_allclose(got, (alone - mean) / std, rtol=1e-4, atol=1e-5)


def test_eight_devices_give_the_same_scores(model, sequences, alone):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    layout = jax.tree.map(lambda p: sharding(mesh, *p.axes), describe_reward_model(CONFIG))
    tokens, segments = np.zeros((8, LENGTH), np.int32), np.zeros((8, LENGTH), np.int32)
    for r, ids in enumerate((*sequences, *sequences[:3])):
        tokens[r, : len(ids)], segments[r, : len(ids)] = ids, 1
    last = segments.sum(1, keepdims=True) - 1
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, layout)
        got = jitted(placed, tokens, segments, last, FP32)
    np.testing.assert_allclose(got[:5, 0], alone, rtol=1e-5, atol=1e-6)
