"""Every attention kernel that runs here, against a float64 softmax written out in NumPy."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from llama_jax.errors import UserError
from llama_jax.model.attention import attend_to_cache, attend_with_cache, best_implementation, causal_attention

# A length that is neither a multiple of a chunk nor of a kernel's block.
B, T, H = 2, 200, 64
XLA_DOT_PRODUCT_ATTENTION = jax.nn.dot_product_attention


@pytest.fixture(params=["xla", "splash", "cudnn"])
def attend(request, monkeypatch):
    """`causal_attention` through one kernel, which is what users call.

    Splash runs in Pallas' interpreter. cuDNN cannot: here XLA plays its part behind the same function of JAX, given the
    very mask and flags that cuDNN would get, so that a mask that forgets the segments shows.
    """
    if request.param == "cudnn":

        def stand_in(*args, implementation, **kwargs):
            assert implementation == "cudnn"
            return XLA_DOT_PRODUCT_ATTENTION(*args, **kwargs, implementation="xla")

        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
        monkeypatch.setattr("llama_jax.model.attention.lacks_cudnn", lambda dtype: False)
    return jax.jit(partial(causal_attention, implementation=request.param))


def make_inputs(n_heads: int = 4, n_kv_heads: int = 2, length: int = T, seed: int = 0):
    """Random q, k, v, and three packed segments per row whose borders differ between rows."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, length, n, H)).astype(np.float32) for n in (n_heads, n_kv_heads, n_kv_heads))
    borders = np.sort(rng.choice(np.arange(1, length), (B, 2)), axis=1)
    segments = (np.arange(length)[None, :, None] >= borders[:, None, :]).sum(-1).astype(np.int32)
    return q, k, v, segments


def numpy_attention(q, k, v, segments, *, regroup=False, scale=None, reach=0):
    """Attention one head and one query at a time, in float64; the options make the mutants."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    n_heads, n_kv_heads = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        m = n % n_kv_heads if regroup else n // (n_heads // n_kv_heads)
        seen = np.flatnonzero((np.arange(q.shape[1]) <= t + reach) & (segments[b] == segments[b, t]))
        scores = scale * (k[b, seen, m] @ q[b, t, n])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, m]
    return out


def difference(a, b) -> float:
    """Relative to the norm of b."""
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@partial(jax.jit, static_argnums=0)
def with_gradients(attend, q, k, v, cotangent, segments=None):
    """The output and the gradients of q, k and v."""
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_equals_numpy_in_float64(attend, heads):
    q, k, v, segments = make_inputs(*heads)
    assert difference(attend(q, k, v, segments), numpy_attention(q, k, v, segments)) < 1e-6
    assert difference(attend(q, k, v), numpy_attention(q, k, v, np.zeros_like(segments))) < 1e-6


@pytest.mark.parametrize(
    "mutant",
    [
        lambda q, k, v, s: numpy_attention(q, k, v, np.zeros_like(s)),
        lambda q, k, v, s: numpy_attention(q, k, v, s, regroup=True),
        lambda q, k, v, s: numpy_attention(q, k, v, s, scale=1.0),
        lambda q, k, v, s: numpy_attention(q, k, v, s, reach=1),
    ],
    ids=["segments ignored", "heads regrouped", "scale missing", "one token ahead"],
)
def test_each_mutant_is_far_from_it(attend, mutant):
    q, k, v, segments = make_inputs()
    assert difference(attend(q, k, v, segments), mutant(q, k, v, segments)) > 1e-2


def test_packed_equals_each_segment_alone_forward_and_backward(attend):
    q, k, v, segments = make_inputs()
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    packed = with_gradients(attend, q, k, v, cotangent, segments)
    for b, segment in [(0, 1), (1, 2)]:
        span = np.flatnonzero(segments[b] == segment)
        alone = with_gradients(attend, *(x[b : b + 1, span] for x in (q, k, v, cotangent)))
        for of_alone, of_packed in zip(alone, packed, strict=True):
            assert difference(of_alone[0], of_packed[b, span]) < 2e-6


def test_gradients_equal_those_of_a_dense_softmax(attend):
    q, k, v, segments = make_inputs()
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def dense(q, k, v, segments):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / 8.0
        mask = np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None, :])
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v)

    expected = with_gradients(dense, q, k, v, cotangent, segments)
    for got, value in zip(with_gradients(attend, q, k, v, cotangent, segments), expected, strict=True):
        assert difference(got, value) < 2e-6


def test_grouped_queries_with_repeated_keys_equal_many_heads(attend):
    q, k, v, segments = make_inputs(4, 2)
    repeated = attend(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2), segments)
    assert difference(attend(q, k, v, segments), repeated) < 1e-6


def test_no_gradient_reaches_later_tokens_or_other_segments(attend):
    q, k, v, segments = make_inputs()
    # Inside row 0's middle segment, so that tokens of all kinds lie around it.
    t = int(np.flatnonzero(segments[0] == 1)[-1]) - 1
    _, _, dk, dv = with_gradients(attend, q, k, v, np.zeros_like(q) + (np.arange(T) == t)[:, None, None], segments)
    seen = (segments == segments[0, t]) & (np.arange(T) <= t)
    assert 2 < seen[0].sum() < T - 2
    for grad in (np.abs(dk).sum((2, 3))[0], np.abs(dv).sum((2, 3))[0]):
        assert (grad[~seen[0]] == 0).all()
        assert (grad[seen[0]] > 0).all()


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_bfloat16_scores_and_softmax_stay_in_float32(implementation):
    q, k, v, segments = make_inputs()
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    exact = numpy_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), segments)
    out = causal_attention(q, k, v, segments, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    # What remains is the rounding of the scaled queries, of the weights and of the result.
    assert difference(out.astype(jnp.float32), exact) < 4e-3


def test_the_backward_pass_keeps_no_scores():
    shapes = [jax.ShapeDtypeStruct((B, 4096, heads, H), jnp.float32) for heads in (4, 2, 2)]
    segments = jnp.zeros((B, 4096), jnp.int32)
    pull = jax.eval_shape(lambda *qkv: jax.vjp(partial(causal_attention, segment_ids_BT=segments), *qkv)[1], *shapes)
    kept = sum(x.size for x in jax.tree.leaves(pull))
    # Each chunk keeps the keys and values it saw, which XLA shares where the whole is compiled as one.
    assert kept < 12 * B * 4096 * 4 * H < B * 4 * 4096**2 / 4


def test_on_a_cpu_auto_means_xla():
    assert best_implementation(jnp.dtype(jnp.bfloat16), T, H) == "xla"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NVIDIA H200", "cudnn"), ("NVIDIA L4", "cudnn"), ("Tesla T4", "xla"), ("NVIDIA of another year", "xla")],
)
def test_gpus_that_are_compiled_for_and_not_there_have_what_their_generation_has(kind, expected):
    mesh = AbstractMesh((1,), ("fsdp",), abstract_device=AbstractDevice(kind, None, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert best_implementation(jnp.dtype(jnp.bfloat16), T, H) == expected
        assert best_implementation(jnp.dtype(jnp.float32), T, H) == "xla"


def test_cudnn_in_float32_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="float32.*--compute.attention xla"):
        causal_attention(*make_inputs(), implementation="cudnn")


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here, so no cuDNN")
def test_cudnn_on_a_gpu_equals_xla_packed():
    of_tests = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in of_tests}
    script = Path(__file__).with_name("cudnn_on_gpu.py")
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("new", [1, 3])
def test_cache_equals_the_whole_with_ragged_lengths(new):
    rng = np.random.default_rng(0)
    lengths = np.array([0, 5, 9], np.int32)  # empty, part full, full
    slots = 9
    q, k, v = (rng.normal(size=(3, slots + new, heads, H)).astype(np.float32) for heads in (4, 2, 2))
    # Slots beyond a sequence's length hold what must not be read.
    filled = np.arange(slots)[None, :, None, None] < lengths[:, None, None, None]
    cached_k, cached_v = (np.where(filled, x[:, :slots], 1e4).astype(np.float32) for x in (k, v))
    fresh = [np.stack([x[b, length : length + new] for b, length in enumerate(lengths)]) for x in (q, k, v)]
    fresh_k, fresh_v, cached_k, cached_v = (x.swapaxes(1, 2) for x in (*fresh[1:], cached_k, cached_v))
    got = attend_with_cache(fresh[0], fresh_k, fresh_v, cached_k, cached_v, lengths)
    # The same where the new ones stand in the cache already.
    positions_BT = lengths[:, None] + np.arange(new)
    full_k, full_v = (np.pad(x, ((0, 0), (0, 0), (0, new), (0, 0)), constant_values=1e4) for x in (cached_k, cached_v))
    for b, length in enumerate(lengths):
        full_k[b, :, length : length + new], full_v[b, :, length : length + new] = fresh_k[b], fresh_v[b]
    got_from_cache = attend_to_cache(fresh[0], full_k, full_v, positions_BT)
    for b, length in enumerate(lengths):
        whole = causal_attention(*(x[b : b + 1, : length + new] for x in (q, k, v)), implementation="xla")
        assert difference(got[b], np.asarray(whole[0, length:])) < 1e-6
        assert difference(got_from_cache[b], np.asarray(whole[0, length:])) < 1e-6


def test_an_empty_cache_without_slots_equals_the_whole():
    q, k, v, _ = make_inputs(length=7)
    k_BKTH, v_BKTH = k.swapaxes(1, 2), v.swapaxes(1, 2)
    got = attend_with_cache(q, k_BKTH, v_BKTH, k_BKTH[:, :, :0], v_BKTH[:, :, :0], np.zeros(B, np.int32))
    assert difference(got, np.asarray(causal_attention(q, k, v, implementation="xla"))) < 1e-6
