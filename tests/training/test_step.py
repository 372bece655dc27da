"""The training step: the mean over a batch's targets however it is split, and steps that must not count."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.step import abstract_state, init_state, make_train_step, new_state
from tests.training.tiny import (
    FP32,
    KEEP_GRADIENT,
    MODEL,
    assert_same,
    batch,
    named,
    on_mesh,
    optimizer,
    relative_error,
)


@pytest.fixture(scope="module")
def model():
    return jax.device_get(jax.jit(lambda: init_state(MODEL, optax.identity(), jax.random.key(0)).model)())


@cache
def gradient_step(micro_batches):
    return make_train_step(KEEP_GRADIENT, FP32, micro_batches=micro_batches)


def gradient_of(model, batch, micro_batches=1):
    start = new_state(jax.tree.map(jnp.array, model), KEEP_GRADIENT)
    state, metrics = gradient_step(micro_batches)(start, batch)
    return state.opt_state, metrics


def rows_of(batch, which):
    return type(batch)(*(array[which] for array in batch))


def test_micro_batches_do_not_change_the_update_though_their_masks_differ(model):
    data = batch(0)
    whole, metrics = gradient_of(model, data)
    for parts in (2, 4):
        split, split_metrics = gradient_of(model, data, parts)
        assert relative_error(split, whole) < 1e-6
        np.testing.assert_allclose(split_metrics.loss, metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(split_metrics.grad_norm, metrics.grad_norm, rtol=1e-6)
        np.testing.assert_allclose(split_metrics.accuracy, metrics.accuracy, rtol=1e-6)
        assert int(split_metrics.targets) == int(metrics.targets)
    # The mistake this is to catch: the mean of the parts' own means.
    halves = [gradient_of(model, rows_of(data, slice(start, start + 4)))[0] for start in (0, 4)]
    means = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert relative_error(means, whole) > 1e-2


def test_loss_and_accuracy_are_means_per_target(model):
    data = batch(0)
    _, metrics = gradient_of(model, data)
    logits = np.asarray(
        jax.jit(lambda m: m(data.tokens_BT, positions_BT=data.positions_BT, segment_ids_BT=data.segment_ids_BT, compute=FP32))(model),
        np.float64,
    )  # fmt: skip
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z - np.take_along_axis(logits, data.targets_BT[..., None], -1)[..., 0]
    mask = data.loss_mask_BT
    assert int(metrics.targets) == mask.sum()
    np.testing.assert_allclose(metrics.loss, nats[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.accuracy, (logits.argmax(-1) == data.targets_BT)[mask].mean(), rtol=1e-6)


def test_a_batch_without_targets_is_no_gradient_and_no_nan(model):
    data = batch(0)
    gradient, metrics = gradient_of(model, data._replace(loss_mask_BT=np.zeros_like(data.loss_mask_BT)))
    assert float(metrics.loss) == 0 and int(metrics.targets) == 0 and int(metrics.skipped) == 0
    assert all(not leaf.any() for leaf in named(gradient).values())


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(optimizer(), FP32)


def with_head(state, change):
    model = jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(leaf) if "head_DV" in jax.tree_util.keystr(path) else leaf, state.model
    )
    return state.replace(model=model)


@pytest.mark.parametrize(
    "poison",
    [lambda head: head.at[0, 0].set(jnp.nan), lambda head: head * jnp.float32(1e38), lambda head: head * 1e30],
    ids=["a NaN weight", "infinite logits", "an infinite gradient norm"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(train_step, model, poison):
    state, _ = train_step(new_state(jax.tree.map(jnp.array, model), optimizer()), batch(1))
    healthy_head = jax.device_get(state.model.head_DV)
    state = with_head(state, poison)
    before = jax.device_get(state)
    state, metrics = train_step(state, batch(2))
    assert not (np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm))
    assert_same(state.model, before.model)
    assert_same(state.opt_state, before.opt_state)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (2, 1, 1)
    state, _ = train_step(state, batch(3))
    assert (int(state.skipped), int(state.skipped_in_row)) == (2, 2)
    state, _ = train_step(with_head(state, lambda _: jnp.array(healthy_head)), batch(4))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (4, 2, 0)
    assert relative_error(state.opt_state, before.opt_state) > 1e-3, "a good step after them counts"


def test_the_state_is_donated(train_step, model):
    state = new_state(jax.tree.map(jnp.array, model), optimizer())
    train_step(state, batch(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_moments_lie_where_their_weights_lie(model):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(MODEL, optimizer(), mesh))
    with jax.set_mesh(mesh):
        create = jax.jit(lambda: init_state(MODEL, optimizer(), jax.random.key(0)), out_shardings=layout)
        state, _ = make_train_step(optimizer(), FP32, layout=layout)(create(), on_mesh(mesh, batch(1)))
    weights = jax.tree.leaves(state.model)
    adam = optax.tree_utils.tree_get(state.opt_state, "mu"), optax.tree_utils.tree_get(state.opt_state, "nu")
    for moments in adam:
        for weight, moment in zip(weights, jax.tree.leaves(moments), strict=True):
            assert moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(adam))
    assert held < 2 * MODEL.n_params / 3, "a device holds a fourth of the matrices, and little besides"


def test_moments_on_the_host_are_the_same_moments(model):
    """Between steps they lie in the host's memory, on each mesh device's own host part; a step computes the same bits."""
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    states = {}
    for offload in (False, True):
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(MODEL, optimizer(), mesh, offload=offload))
        with jax.set_mesh(mesh):
            state = jax.jit(lambda: init_state(MODEL, optimizer(), jax.random.key(0)), out_shardings=layout)()
            step = make_train_step(optimizer(), replace(FP32, offload=offload), layout=layout)
            for number in range(3):
                state, metrics = step(state, on_mesh(mesh, batch(number)))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.model)} == {"device"}
        states[offload] = (state, metrics)
    assert_same(*states.values())
