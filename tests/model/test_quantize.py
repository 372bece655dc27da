"""int8 weights: rounding within half a step, scales where they belong, and no wide copy of the model in memory."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LLAMA2_7B, LLAMA2_70B, Compute, LlamaConfig
from llama_jax.generation.cache import init_cache
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import Decoding, Sampling, decode
from llama_jax.model import quantize as quantize_module
from llama_jax.model import transformer
from llama_jax.model.quantize import (
    Int8,
    dequantize,
    dequantize_model,
    input_axes,
    int8_einsum,
    is_quantized_name,
    quantization_error,
    quantize,
    quantize_abstract,
    quantize_model,
)
from llama_jax.model.transformer import Transformer, abstract, init, shardings
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from tests.parity.numpy_llama import random_weights, to_ours
from tests.stories260k import FOLDER, load_stories260k

# dim and ffn_dim are equal, so that a scale fits the wrong axis too.
CONFIG = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=132, head_dim=12)
MATRICES = ("wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "w_gate_DF", "w_up_DF", "w_down_FD", "head_DV")
FP32 = Compute(dtype="float32", remat="none")
TOLERANCE = 1e-5


@cache
def model() -> Transformer:
    return to_ours(random_weights(CONFIG, seed=0), CONFIG)


def leaf_names(tree: Transformer) -> dict[str, jax.Array | Int8]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Int8))
    return {jax.tree_util.keystr(path).removeprefix("."): leaf for path, leaf in leaves}


@pytest.mark.parametrize(("shape", "n_in"), [((33, 4, 6), 1), ((4, 6, 33), 2), ((64, 50), 1)])
def test_every_weight_is_within_half_a_step(shape: tuple[int, ...], n_in: int):
    rng = np.random.default_rng(0)
    # Channels of very different size, and one that is all zero.
    w = (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape[n_in:]))).astype(np.float32)
    w[..., 2] = 0
    q = quantize(jnp.asarray(w), n_in)
    assert (q.values.dtype, q.values.shape) == (jnp.int8, shape)
    assert (q.scale.dtype, q.scale.shape) == (jnp.float32, shape[n_in:])
    largest = np.abs(w).max(axis=tuple(range(n_in)))
    np.testing.assert_allclose(q.scale, largest / 127, rtol=1e-6)
    assert (np.abs(dequantize(q) - w) <= np.asarray(q.scale) * 0.5001).all()
    # The largest of each channel takes the outermost level, and the lowest int8 is never used.
    assert (np.abs(q.values).max(axis=tuple(range(n_in))) == np.where(largest > 0, 127, 0)).all()
    assert q.values.min() == -127


def test_error_is_that_of_uniform_rounding():
    """A step is scale wide, so its rounding error is scale / sqrt(12); and a channel that is a power of two is exact."""
    w = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (4096, 8)), jnp.float32)
    expected = (1 / 127 / np.sqrt(12)) / np.sqrt(1 / 3)
    assert float(quantization_error(w, quantize(w, 1))) == pytest.approx(expected, rel=0.02)
    exact = jnp.asarray(np.random.default_rng(2).integers(-127, 128, (300, 5)) * 2.0**-9).at[0].set(127 * 2.0**-9)
    assert float(quantization_error(exact, quantize(exact, 1))) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layer_by_layer_gives_the_bits_of_the_whole(dtype: str):
    """As a loader does it, one layer at a time in a program of its own, or step by step without one."""
    whole = leaf_names(quantize_model(model().cast(dtype)))
    jitted = jax.jit(quantize, static_argnums=1)
    for name, w in leaf_names(model().cast(dtype)).items():
        if not is_quantized_name(name):
            continue
        layers = w if name.startswith("layers.") else w[None]
        values, scale = (x if name.startswith("layers.") else x[None] for x in jax.tree.leaves(whole[name]))
        for i, layer in enumerate(layers):
            for function in (quantize, jitted):
                q = function(layer, input_axes(name))
                assert np.array_equal(q.values, values[i]) and np.array_equal(q.scale, scale[i])


def test_matrices_are_quantised_and_nothing_else():
    quantised = leaf_names(quantize_model(model()))
    assert {name.rpartition(".")[2] for name, leaf in quantised.items() if isinstance(leaf, Int8)} == set(MATRICES)
    for name, leaf in leaf_names(model()).items():
        assert is_quantized_name(name) == isinstance(quantised[name], Int8)
        assert is_quantized_name(name) or quantised[name] is leaf
    tied = quantize_model(init(replace(CONFIG, tie_embeddings=True), jax.random.key(0)))
    assert tied.output_head().dtype == jnp.float32  # the embedding's


def forward(model: Transformer) -> jax.Array:
    tokens_BT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 40))
    return model(tokens_BT, compute=FP32)


jitted_forward = jax.jit(forward)


def error_of(quantised: Transformer, forward=jitted_forward) -> float:
    """Largest difference of a logit, relative to the largest, from the model whose weights are what int8 left of them."""
    want = jitted_forward(dequantize_model(quantize_model(model()), jnp.float32))
    return float(jnp.abs(forward(quantised) - want).max() / jnp.abs(want).max())


def test_logits_are_those_of_the_rounded_weights():
    assert error_of(quantize_model(model())) < TOLERANCE


WRONG_SCALES = {
    "missing": jnp.ones_like,
    "of the next layer": lambda scale: jnp.roll(scale, 1, axis=0),
    "of the next channel": lambda scale: jnp.roll(scale, 1, axis=-1),
}


@pytest.mark.parametrize("wrong", WRONG_SCALES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_wrong_scales_are_caught(wrong: str, matrix: str):
    """A head has no layers: its next layer is its next channel."""

    def mutate(leaf_path, leaf):
        if not (isinstance(leaf, Int8) and jax.tree_util.keystr(leaf_path).endswith(matrix)):
            return leaf
        return Int8(leaf.values, WRONG_SCALES[wrong](leaf.scale))

    quantised = quantize_model(model())
    mutant = jax.tree_util.tree_map_with_path(mutate, quantised, is_leaf=lambda leaf: isinstance(leaf, Int8))
    assert error_of(mutant) > 100 * TOLERANCE


def test_a_scale_on_the_input_axis_is_caught(monkeypatch):
    def wrong(spec: str, x: jax.Array, q: Int8) -> jax.Array:
        if x.shape[-1:] != q.scale.shape:
            return int8_einsum(spec, x, q)
        return jnp.einsum(spec, x * q.scale, q.values.astype(x.dtype))

    monkeypatch.setattr(transformer, "int8_einsum", wrong)
    assert error_of(quantize_model(model()), jax.jit(lambda model: forward(model))) > 100 * TOLERANCE


def test_a_single_token_on_a_gpu_without_bfloat16_is_the_same_without_a_matmul(monkeypatch):
    """There a matmul would write all weights out in float32 first."""
    rng = np.random.default_rng(0)
    q = quantize(jnp.asarray(rng.normal(size=(24, 6, 4)), jnp.float32), 1)
    x = jnp.asarray(rng.normal(size=(1, 1, 24)), jnp.bfloat16)
    many = jnp.concatenate([x, x], axis=1)

    def multiply(x):
        return int8_einsum("BTD,DNH->BTNH", x, q)

    def has_matmul(x):
        return "dot_general" in str(
            jax.make_jaxpr(lambda x: multiply(x))(x)
        )  # a new function: jax keeps what it traced

    wanted = multiply(x)
    monkeypatch.setattr(quantize_module, "platform", lambda: "gpu")
    monkeypatch.setattr(quantize_module, "compute_capability", lambda: 7.5)
    np.testing.assert_allclose(multiply(x), wanted, rtol=1e-5, atol=1e-5)
    assert not has_matmul(x) and has_matmul(many)
    monkeypatch.setattr(quantize_module, "compute_capability", lambda: 8.0)
    assert has_matmul(x)


def test_bfloat16_products_are_summed_and_scaled_in_float32():
    """Values of up to 7 bits are exact in bfloat16: what is left is x's rounding, and the result's."""
    rng = np.random.default_rng(4)
    q = quantize(jnp.asarray(rng.standard_normal((512, 64)), jnp.float32), 1)
    x = jnp.asarray(rng.standard_normal((8, 512)), jnp.bfloat16)
    want = np.asarray(x, np.float64) @ (np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64))
    got = int8_einsum("MD,DF->MF", x, q)
    assert got.dtype == jnp.float32 and np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def tree_bytes(tree: Transformer) -> int:
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("config", "share"), [(LLAMA2_7B, 0.511), (LLAMA2_70B, 0.503)], ids=["7B", "70B"])
def test_a_quantised_model_is_half_of_a_bfloat16_one(config: LlamaConfig, share: float):
    """The rest above a half: the embedding, which stays, and the scales."""
    whole = abstract(config, dtype=jnp.bfloat16)
    assert 0.5 < tree_bytes(quantize_abstract(whole)) / tree_bytes(whole) < share


@pytest.mark.parametrize("layout", ["fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_shapes_and_shardings_are_known_without_the_model(layout: str):
    mesh = make_mesh(layout)
    quantised = quantize_model(jax.device_put(model(), shardings(CONFIG, mesh)))
    expected = quantize_abstract(abstract(CONFIG, mesh))
    assert jax.tree.structure(quantised) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(quantised), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim), (got.sharding, want.sharding)
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(quantize_abstract(abstract(CONFIG))))


DEEP = LlamaConfig(
    dim=128, n_layers=16, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab_size=61, head_dim=32, context_length=64
)


def temporary_bytes(model: Transformer, transform=lambda model: model) -> list[int]:
    """Temporary memory of the compiled forward pass and of decoding."""
    tokens_BT = jnp.zeros((1, 16), jnp.int32)
    forward = jax.jit(lambda model: transform(model)(tokens_BT, compute=FP32)).lower(model)
    cache, zero_B = init_cache(DEEP, 1, 64, jnp.dtype("float32")), jnp.zeros(1, jnp.int32)
    state = Decoding(cache, zero_B, zero_B + 4, jax.random.split(jax.random.key(0), 1))
    decoding = jax.jit(lambda model, state: decode(transform(model), state, Sampling(), 2, 4)).lower(model, state)
    return [program.compile().memory_analysis().temp_size_in_bytes for program in (forward, decoding)]


def test_matrices_are_widened_one_layer_at_a_time():
    quantised = quantize_model(init(DEEP, jax.random.key(0)))
    layer = 4 * sum(leaf.values.size for leaf in leaf_names(quantised).values() if isinstance(leaf, Int8)) / 16
    assert max(temporary_bytes(quantised)) < 1.5 * layer
    # What would be seen if the whole model were widened.
    assert min(temporary_bytes(quantised, lambda model: dequantize_model(model, jnp.float32))) > 15 * layer


@pytest.fixture(scope="module")
def stories(shared):
    return load_stories260k(shared), Tokenizer.load(shared / FOLDER)


def test_a_trained_model_loses_little(shared, stories):
    """Measured on 5,760 tokens: a KL divergence of 5.1e-4 nats a token, the loss 1.2e-3 higher; with five bits, 0.040."""
    whole, tokenizer = stories
    texts = (shared / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:64]
    tokens_BT = np.array([tokenizer.encode(text.strip())[:129] for text in texts if len(text) > 600])
    run = jax.jit(lambda model, tokens_BT: jax.nn.log_softmax(model(tokens_BT, compute=FP32)))

    def compare(quantised: Transformer) -> tuple[float, float]:
        p, q = run(whole, tokens_BT[:, :-1]), run(quantised, tokens_BT[:, :-1])
        kl = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))
        return float(kl), float(jnp.mean(jnp.take_along_axis(p - q, tokens_BT[:, 1:, None], -1)))

    quantised = quantize_model(whole)

    def coarser(leaf):
        if not isinstance(leaf, Int8):
            return leaf
        return Int8(8 * jnp.clip(jnp.round(leaf.values / 8), -15, 15).astype(jnp.int8), leaf.scale)

    coarse = jax.tree.map(coarser, quantised, is_leaf=lambda leaf: isinstance(leaf, Int8))
    kl, extra_loss = compare(quantised)
    assert 0 < kl < 7e-4 and abs(extra_loss) < 2e-3
    assert compare(coarse)[0] > 0.03


def test_generation_on_a_mesh_equals_one_device(stories):
    whole, tokenizer = stories
    quantised = quantize_model(whole)
    prompts, settings = ["Once upon a time", "Tom", "", "The dog"], {"max_new_tokens": 48, "seed": 3}
    alone = Llama(quantised, tokenizer).generate(prompts, **settings)
    mesh = make_mesh("fsdp=4,tensor=2")
    lies = jax.tree.map(lambda leaf: leaf.sharding, quantize_abstract(abstract(whole.config, mesh)))
    meshed = Llama(jax.device_put(quantised, lies), tokenizer).generate(prompts, **settings)
    assert [c.ids for c in meshed] == [c.ids for c in alone]
    for a, b in zip(meshed, alone, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    # And it is the int8 model that spoke, not the one it was made from.
    unquantised = Llama(whole, tokenizer).generate(prompts, **settings)
    assert max(abs(a.log_probs[0] - b.log_probs[0]) for a, b in zip(alone, unquantised, strict=True)) > 1e-4


def test_casting_leaves_int8_alone(stories):
    engine = Llama(quantize_model(stories[0]), stories[1], jnp.bfloat16)
    leaves = leaf_names(engine.model)
    assert {leaf.values.dtype for leaf in leaves.values() if isinstance(leaf, Int8)} == {jnp.dtype(jnp.int8)}
    assert {leaf.scale.dtype for leaf in leaves.values() if isinstance(leaf, Int8)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in leaves.values() if not isinstance(leaf, Int8)} == {jnp.dtype(jnp.bfloat16)}
    assert len(engine.generate([""], temperature=0, max_new_tokens=8)[0].ids) == 8
