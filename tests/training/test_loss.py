"""The chunked loss against a plain log-softmax, its gradients against autodiff, and what it never computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llama_jax.training.loss import token_loss

B, T, D, V = 3, 20, 16, 301


def inputs(dtype=jnp.float32):
    random = np.random.default_rng(0)
    x_BTD = random.normal(size=(B, T, D))
    head_DV = random.normal(size=(D, V)) / D**0.5 * 3
    targets_BT = random.integers(0, V, (B, T))
    weights_BT = random.random((B, T)) * (random.random((B, T)) < 0.7)
    return (
        jnp.asarray(x_BTD, dtype),
        jnp.asarray(head_DV, dtype),
        jnp.asarray(targets_BT, jnp.int32),
        jnp.asarray(weights_BT, jnp.float32),
    )


def plain(x_BTD, head_DV, targets_BT, weights_BT, z_loss=0.0):
    """What the paper minimises, with all logits at once; in float64 if x is."""
    logits_BTV = x_BTD @ head_DV
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    nats_BT = -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]
    return jnp.sum(weights_BT * (nats_BT + z_loss * jax.nn.logsumexp(logits_BTV, -1) ** 2))


def relative(ours, theirs):
    return float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs))) / np.max(np.abs(np.asarray(theirs))))


def in_float64(arrays):
    return [np.asarray(a, np.float64) if a.dtype != np.int32 else np.asarray(a) for a in arrays]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [5, 7, 20, 64])
def test_value_and_gradients_are_those_of_a_plain_cross_entropy(chunk, z_loss):
    x, head, targets, weights = inputs()
    scaled = lambda x, head: 3 * token_loss(x, head, targets, weights, chunk, z_loss).loss  # noqa: E731
    ours = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(x, head)
    with jax.enable_x64(True):
        x64, head64, targets, weights = in_float64((x, head, targets, weights))
        theirs = jax.value_and_grad(lambda x, head: 3 * plain(x, head, targets, weights, z_loss), argnums=(0, 1))(
            jnp.asarray(x64), jnp.asarray(head64)
        )
    assert relative(ours[0], theirs[0]) < 1e-6
    assert relative(ours[1][0], theirs[1][0]) < 1e-6
    assert relative(ours[1][1], theirs[1][1]) < 1e-6


def test_value_without_gradient_is_the_same_value():
    args = inputs()
    alone = jax.jit(lambda *a: token_loss(*a, 7, 1e-2))(*args)
    beside = jax.jit(lambda x, *a: jax.value_and_grad(lambda x: token_loss(x, *a, 7, 1e-2).loss)(x))(*args)[0]
    assert float(alone.loss) == float(beside)


def test_nats_leave_out_the_z_loss_and_correct_counts_the_weighted_hits():
    x, head, targets, weights = inputs()
    targets = targets.at[:, ::2].set(jnp.argmax(x @ head, -1)[:, ::2].astype(jnp.int32))
    sums = token_loss(x, head, targets, weights, 7, 0.5)
    assert relative(sums.nats, plain(x, head, targets, weights)) < 1e-6
    assert relative(sums.loss, plain(x, head, targets, weights, 0.5)) < 1e-6
    hits = np.asarray(jnp.argmax(x @ head, -1) == targets)
    assert hits.sum() >= B * T // 2
    np.testing.assert_allclose(sums.correct, (np.asarray(weights) * hits).sum(), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("chunk", [7, 20])
def test_what_stands_at_a_masked_token_reaches_neither_loss_nor_gradient(chunk, bad):
    x, head, targets, weights = inputs()
    masked = np.asarray(weights) == 0
    assert masked.any()
    gradients = jax.jit(
        jax.value_and_grad(lambda x, head: token_loss(x, head, targets, weights, chunk, 1e-2).loss, argnums=(0, 1))
    )
    poisoned = gradients(jnp.where(masked[..., None], bad, x), head)
    clean = gradients(x, head)
    for ours, theirs in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def shapes_in(jaxpr):
    """The shape of every value that a program computes, those of its inner programs too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_full_logits_never_exist():
    args = inputs()
    chunk = 5

    def largest(function):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(function, argnums=(0, 1)))(*args).jaxpr
        # The head and its gradient are as they are; what counts is anything that has tokens and vocabulary.
        return max(a.size for a in shapes_in(jaxpr) if V in a.shape and a.shape != (D, V))

    assert largest(plain) == B * T * V, "the walk over the program must see the logits of a plain loss"
    assert largest(lambda *a: token_loss(*a, chunk).loss) == B * chunk * V


def test_bfloat16_inputs_are_summed_in_float32():
    x, head, targets, weights = inputs(jnp.bfloat16)
    sums, (dx, dhead) = jax.value_and_grad(
        lambda x, head: (lambda s: (s.loss, s))(token_loss(x, head, targets, weights, 7)), argnums=(0, 1), has_aux=True
    )(x, head)
    assert {s.dtype for s in jax.tree.leaves(sums[1])} == {jnp.dtype("float32")}
    assert dx.dtype == dhead.dtype == jnp.bfloat16
    # Many equal tokens: a bfloat16 accumulator, of 8 bits, would stop growing at 256 of them.
    n = 4096
    x, targets, weights = x[:1, :1], targets[:1, :1], jnp.ones((1, 1))
    one = token_loss(x, head, targets, weights, 1)
    many = token_loss(jnp.repeat(x, n, 1), head, jnp.repeat(targets, n, 1), jnp.repeat(weights, n, 1), 16)
    # The logits themselves are bfloat16 and may be rounded otherwise in a larger matmul; the sum must add nothing to that.
    assert relative(many.nats, n * one.nats) < 2**-9
    gradient = lambda *a: jax.grad(lambda h: token_loss(a[0], h, *a[1:]).loss)(head).astype(jnp.float32)  # noqa: E731
    of_one = gradient(x, targets, weights, 1)
    of_many = gradient(jnp.repeat(x, n, 1), jnp.repeat(targets, n, 1), jnp.repeat(weights, n, 1), 16)
    assert relative(of_many, n * of_one) < 2**-7
