"""nf4 weights: QLoRA's levels, the nearest of them, blocks where they belong, and adapters on top."""

from functools import cache
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LLAMA2_7B, Compute, LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model.lora import LoraConfig, adapt, init_adapters, merge
from llama_jax.model.nf4 import LEVELS, Nf4, nf4_abstract, nf4_model, quantize_nf4, widen
from llama_jax.model.quantize import Int8
from llama_jax.model.transformer import Transformer, abstract, init, shardings
from llama_jax.parallel.mesh import make_mesh
from tests.model.test_quantize import tree_bytes
from tests.parity.numpy_llama import random_weights, to_ours

CONFIG = LlamaConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=192, vocab_size=96, head_dim=16)
MATRICES = ("wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "w_gate_DF", "w_up_DF", "w_down_FD")
FP32 = Compute(dtype="float32", attention="xla", remat="none")
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 24))
TOLERANCE = 1e-5


@cache
def model() -> Transformer:
    return to_ours(random_weights(CONFIG, seed=0), CONFIG)


@cache
def narrow() -> Transformer:
    return nf4_model(model())


def widened(model: Transformer) -> Transformer:
    return jax.tree.map(
        lambda leaf: widen(leaf, jnp.float32) if isinstance(leaf, Nf4) else leaf,
        model,
        is_leaf=lambda leaf: isinstance(leaf, Nf4),
    )


logits = jax.jit(lambda model: model(TOKENS, compute=FP32))


def difference(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def test_levels_are_the_quantiles_of_appendix_e():
    """Eight quantiles above and seven below zero, evenly spaced in probability up to the offset of QLoRA's code."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    np.testing.assert_allclose(LEVELS, np.sort([*positive, 0, *negative]) / max(positive), atol=1e-7)


def nearest(w: np.ndarray, axis: int) -> np.ndarray:
    """Block for block and weight for weight, the level that is nearest."""
    rows = np.moveaxis(w.astype(np.float64), axis, -1)
    result = np.empty_like(rows)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], 64):
            block = rows[index][start : start + 64]
            largest = np.abs(block).max()
            levels = np.array(LEVELS) * largest
            result[index][start : start + 64] = levels[np.abs(block[:, None] - levels).argmin(-1)]
    return np.moveaxis(result, -1, axis)


@pytest.mark.parametrize(("shape", "axis"), [((128, 3, 5), -3), ((2, 128, 3, 5), -3), ((3, 64), -1), ((2, 192, 7), -2)])
def test_every_weight_becomes_the_nearest_level_of_its_block(shape: tuple[int, ...], axis: int):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))).astype(np.float32)
    w[..., :64, 0] = 0  # a block of zeros, or part of one
    q = quantize_nf4(jnp.asarray(w), axis)
    assert (q.codes.dtype, q.codes.size) == (jnp.uint8, w.size // 2)
    assert (q.scale.dtype, q.scale.size) == (jnp.float32, w.size // 64)
    got = np.asarray(widen(q, jnp.float32))
    np.testing.assert_allclose(got, nearest(w, axis), rtol=1e-6, atol=0)
    # No weight moves further than half the widest gap between levels.
    largest = np.repeat(np.asarray(q.scale), 64, axis=axis)
    assert (np.abs(got - w) <= largest * 0.1520).all()


def test_the_error_on_normal_weights_is_that_of_the_method():
    """Measured: 9.2% RMS, where 15 evenly spaced levels leave 10.8%."""
    w = jnp.asarray(np.random.default_rng(1).standard_normal((4096, 64)), jnp.float32)
    error = float(jnp.sqrt(jnp.mean((widen(quantize_nf4(w, -2), jnp.float32) - w) ** 2)))
    steps = jnp.abs(w.reshape(64, 64, 64)).max(1, keepdims=True) / 7
    even = (jnp.round(w.reshape(64, 64, 64) / steps) * steps).reshape(w.shape)
    even_error = float(jnp.sqrt(jnp.mean((even - w) ** 2)))
    assert error == pytest.approx(0.092, abs=0.001) and error < 0.9 * even_error


def test_matrices_of_blocks_are_quantised_and_nothing_else():
    leaves = jax.tree_util.tree_leaves_with_path(narrow(), is_leaf=lambda leaf: isinstance(leaf, Nf4))
    found = {jax.tree_util.keystr(path).rpartition(".")[2] for path, leaf in leaves if isinstance(leaf, Nf4)}
    assert found == set(MATRICES)
    assert narrow().head_DV is model().head_DV and narrow().embedding_VD is model().embedding_VD


def test_logits_are_those_of_the_rounded_weights():
    want = logits(widened(narrow()))
    assert difference(logits(narrow()), want) < TOLERANCE
    assert difference(logits(model()), want) > 0.01
    cast = narrow().cast(jnp.bfloat16)
    assert (cast.layers.wo_NHD.codes.dtype, cast.layers.wo_NHD.scale.dtype) == (jnp.uint8, jnp.float32)
    assert cast.head_DV.dtype == jnp.bfloat16


@pytest.mark.parametrize("matrix", MATRICES)
def test_scales_of_another_layer_or_block_are_seen(matrix: str):
    want = logits(widened(narrow()))
    for axis in (0, narrow().layers.__dict__[matrix].axis):

        def mutate(path, leaf, axis=axis):
            if not (isinstance(leaf, Nf4) and jax.tree_util.keystr(path).endswith(matrix)):
                return leaf
            return Nf4(leaf.codes, jnp.roll(leaf.scale, 1, axis), leaf.axis)

        wrong = jax.tree_util.tree_map_with_path(mutate, narrow(), is_leaf=lambda leaf: isinstance(leaf, Nf4))
        assert difference(logits(wrong), want) > 100 * TOLERANCE


def test_7b_takes_a_little_over_half_a_byte_a_weight():
    whole = abstract(LLAMA2_7B, dtype=jnp.bfloat16)
    assert tree_bytes(nf4_abstract(whole)) / 1e9 == pytest.approx(6.476 * (0.5 + 4 / 64) + 0.262 * 2, abs=0.01)


def test_shapes_and_shardings_are_known_without_the_model():
    mesh = make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    quantised = nf4_model(jax.device_put(model(), shardings(CONFIG, mesh)))
    expected = nf4_abstract(abstract(CONFIG, mesh))
    assert jax.tree.structure(quantised) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(quantised), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim), (got.sharding, want.sharding)
    with jax.set_mesh(mesh):
        assert difference(jax.device_get(logits(quantised)), jax.device_get(logits(narrow()))) < TOLERANCE


def test_widths_that_blocks_do_not_fit_are_refused():
    with pytest.raises(UserError, match="48 is no multiple"):
        quantize_nf4(jnp.ones((48, 2)), -2)
    with pytest.raises(UserError, match="leaves 32 of 128 to a device"):
        nf4_abstract(abstract(CONFIG, make_mesh("fsdp=4,tensor=2")))


def test_matrices_are_widened_one_layer_at_a_time():
    deep = LlamaConfig(dim=128, n_layers=16, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab_size=61, head_dim=32)
    quantised = nf4_model(init(deep, jax.random.key(0)))
    layer = 4 * (deep.n_params - 2 * 61 * 128) / 16

    def temporary(transform) -> int:
        program = jax.jit(lambda model: transform(model)(TOKENS % 61, compute=FP32)).lower(quantised).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(lambda model: model) < 2 * layer
    assert temporary(widened) > 14 * layer, "what would be seen if the whole model were widened"


def test_adapters_learn_on_top_of_it_and_merge_into_it():
    lora = LoraConfig(rank=4, alpha=8.0)
    adapters = jax.tree.map(lambda leaf: leaf + 0.02, init_adapters(CONFIG, lora, jax.random.key(0)))

    def loss(adapters, base):
        return jnp.mean(adapt(base, adapters, lora)(TOKENS, compute=FP32) ** 2)

    got = jax.jit(jax.grad(loss))(adapters, narrow())
    want = jax.jit(jax.grad(loss))(adapters, widened(narrow()))
    assert max(jax.tree.leaves(jax.tree.map(difference, got, want))) < 1e-4
    merged = merge(narrow(), adapters, lora)
    assert not any(
        isinstance(leaf, Int8 | Nf4) for leaf in jax.tree.leaves(merged, is_leaf=lambda x: isinstance(x, Nf4))
    )
    assert difference(logits(merged), logits(adapt(narrow(), adapters, lora))) < TOLERANCE
