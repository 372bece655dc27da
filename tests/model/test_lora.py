"""Adapters: nothing changes at first, merged equals unmerged, gradients by the chain rule, and of rank r alone."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LLAMA2_7B, Compute, LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model.lora import (
    MATRICES,
    Adapter,
    Adapters,
    LoraConfig,
    abstract_adapters,
    adapt,
    init_adapters,
    merge,
)
from llama_jax.model.low_rank import Lora, lora_einsum
from llama_jax.model.quantize import Int8, input_axes, quantize_abstract, quantize_model
from llama_jax.model.transformer import Transformer, abstract, layers_apart
from llama_jax.parallel.mesh import make_mesh, sharding
from tests.parity.numpy_llama import random_weights, to_ours

# Ranks, inputs and outputs all differ from the number of layers, so that no axis is taken for another by chance.
CONFIG = LlamaConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=96, head_dim=12)
LORA = LoraConfig(rank=3, alpha=5.0)
DROPPING = replace(LORA, dropout=0.4)
FP32 = Compute(dtype="float32", attention="xla", remat="none")
TOLERANCE = 1e-5
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (4, 16))


@cache
def model() -> Transformer:
    return to_ours(random_weights(CONFIG, seed=0), CONFIG)


@cache
def narrow() -> Transformer:
    return quantize_model(model())


BASES = {"float32": model, "int8": narrow}


@cache
def trained(lora: LoraConfig = LORA) -> Adapters:
    """Adapters whose b is no longer zero; their corrections are about as large as the weights."""
    fresh = init_adapters(CONFIG, lora, jax.random.key(1))
    rng = np.random.default_rng(2)
    return {name: Adapter(x.a, jnp.asarray(rng.normal(size=x.b.shape) / 2, jnp.float32)) for name, x in fresh.items()}


@partial(jax.jit, static_argnames=("lora", "compute"))
def logits(base: Transformer, adapters: Adapters, lora=LORA, compute=FP32, key=None) -> jax.Array:
    return adapt(base, adapters, lora, key)(TOKENS, compute=compute)


plain_logits = jax.jit(lambda model: model(TOKENS, compute=FP32))


def difference(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def names_of(tree: Transformer) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Int8 | Lora))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_not_one_bit(dtype: str):
    fresh, compute = init_adapters(CONFIG, LORA, jax.random.key(1)), replace(FP32, dtype=dtype)
    want = jax.jit(lambda model: model(TOKENS, compute=compute))(model())
    assert jnp.array_equal(logits(model(), fresh, compute=compute), want)


def test_fresh_adapters_of_an_int8_model_change_rounding_at_most():
    """Its scale is multiplied as the zero is added, in one instruction that rounds once instead of twice."""
    got = logits(narrow(), init_adapters(CONFIG, LORA, jax.random.key(1)))
    assert difference(got, plain_logits(narrow())) < 1e-6


@pytest.mark.parametrize("target", MATRICES)
def test_merged_equals_unmerged_for_every_matrix(target: str):
    only = {
        name: adapter if name.endswith(target) else replace(adapter, b=jnp.zeros_like(adapter.b))
        for name, adapter in trained().items()
    }
    got, merged = logits(model(), only), plain_logits(merge(model(), only, LORA))
    assert difference(got, merged) < TOLERANCE
    assert difference(got, plain_logits(model())) > 1000 * TOLERANCE, "the adapter does something"


@pytest.mark.parametrize("base", BASES)
def test_merged_equals_unmerged_for_all_together(base: str):
    merged = merge(BASES[base](), trained(), LORA)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged)), "plain weights, widened where needed"
    assert difference(logits(BASES[base](), trained()), plain_logits(merged)) < TOLERANCE


def rolled(factor: str, axis: int) -> Adapters:
    """The adapters with one factor of the queries' moved along an axis."""
    query = trained()["layers.wq_DNH"]
    return trained() | {"layers.wq_DNH": replace(query, **{factor: jnp.roll(getattr(query, factor), 1, axis)})}


MISTAKES = {
    "scale left out": lambda: (trained(), replace(LORA, alpha=float(LORA.rank))),
    "a of the next layer": lambda: (rolled("a", 0), LORA),
    "b of the next layer": lambda: (rolled("b", 0), LORA),
    "b of the next rank": lambda: (rolled("b", 1), LORA),
    "b of the next head": lambda: (rolled("b", 2), LORA),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_correction_is_caught(mistake: str):
    adapters, lora = MISTAKES[mistake]()
    assert difference(logits(model(), adapters, lora=lora), plain_logits(merge(model(), trained(), LORA))) > 0.01


def test_merging_keeps_the_dtype_and_what_is_not_adapted():
    half = merge(model().cast(jnp.bfloat16), trained(), LORA)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    some = replace(LORA, targets=("wq_DNH", "w_down_FD"))
    merged = names_of(merge(model(), trained(some), some))
    for name, leaf in names_of(model()).items():
        assert (merged[name] is leaf) == (name not in trained(some))


def test_a_correction_has_rank_r():
    merged, plain = names_of(merge(model(), trained(), LORA)), names_of(model())
    for target in MATRICES:
        change = np.asarray(merged[f"layers.{target}"], np.float64) - np.asarray(plain[f"layers.{target}"], np.float64)
        for layer in change:
            inputs = int(np.prod(layer.shape[: input_axes(target)]))
            singular = np.linalg.svd(layer.reshape(inputs, -1), compute_uv=False)
            assert singular[LORA.rank - 1] > 0.1 * singular[0] and singular[LORA.rank] < 1e-5 * singular[0]


def loss(model: Transformer, compute: Compute = FP32) -> jax.Array:
    log_probs_BTV = jax.nn.log_softmax(model(TOKENS, compute=compute))
    return -jnp.take_along_axis(log_probs_BTV[:, :-1], TOKENS[:, 1:, None], -1).mean()


@partial(jax.jit, static_argnames=("lora", "compute"))
def gradients(base: Transformer, adapters: Adapters, lora=LORA, compute=FP32, key=None) -> tuple:
    return jax.value_and_grad(lambda adapters: loss(adapt(base, adapters, lora, key), compute))(adapters)


@pytest.mark.parametrize("base", BASES)
def test_gradients_follow_the_chain_rule_from_the_merged_weights(base: str):
    """The factors' gradients from the gradient of the whole matrix, which needs no adapter to be computed."""
    whole = names_of(jax.jit(jax.grad(loss))(merge(BASES[base](), trained(), LORA)))
    _, got = gradients(BASES[base](), trained())
    for name, adapter in trained().items():
        a, b, matrix = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b, whole[name]))
        L, r, shape = CONFIG.n_layers, LORA.rank, matrix.shape
        inputs = int(np.prod(a.shape[1:-1]))
        a, b, matrix = a.reshape(L, inputs, r), b.reshape(L, r, -1), matrix.reshape(L, inputs, -1)
        want_a = LORA.scale * np.einsum("Lio,Lro->Lir", matrix, b).reshape(adapter.a.shape)
        want_b = LORA.scale * np.einsum("Lio,Lir->Lro", matrix, a).reshape(adapter.b.shape)
        assert difference(got[name].a, want_a) < 1e-4, (name, shape)
        assert difference(got[name].b, want_b) < 1e-4, (name, shape)


def test_fresh_adapters_learn_through_b_first():
    """With b zero no gradient reaches a, and b's does not vanish: training can begin."""
    _, got = gradients(model(), init_adapters(CONFIG, LORA, jax.random.key(1)))
    assert all(not x.a.any() and x.b.any() for x in got.values())


def test_nothing_is_dropped_without_a_key():
    assert jnp.array_equal(logits(model(), trained(), lora=DROPPING), logits(model(), trained()))
    key = jax.random.key(7)
    assert jnp.array_equal(logits(model(), trained(), key=key), logits(model(), trained())), "nor at a share of 0"
    assert difference(logits(model(), trained(), lora=DROPPING, key=key), logits(model(), trained())) > 0.01


def test_dropout_is_right_in_the_mean_and_drops_its_share():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 20), (20, 20), (20, 5)))
    zero = jnp.zeros((20, 5))

    def run(key, a, b):
        return lora_einsum("TD,DF->TF", x, Lora(zero, a, b, key, 2.0, 0.25), jnp.einsum)

    samples = jax.vmap(lambda key: run(key, a, b))(jax.random.split(jax.random.key(0), 20_000))
    spread = samples.std(0) / 20_000**0.5
    assert float((jnp.abs(samples.mean(0) - 2 * x @ a @ b) / spread).max()) < 5, "standard errors"
    kept = jax.vmap(lambda key: run(key, jnp.eye(20), jnp.eye(20)[:, :5]))(jax.random.split(jax.random.key(1), 2_000))
    assert np.asarray(kept != 0).mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(kept.max(0), jnp.maximum(2 * x[:, :5] / 0.75, 0), rtol=1e-6)


def test_masks_differ_between_layers_matrices_and_keys():
    adapted = adapt(model(), trained(), DROPPING, jax.random.key(0))
    other = adapt(model(), trained(), DROPPING, jax.random.key(1))
    keys = [leaf.dropout_key for tree in (adapted, other) for leaf in names_of(tree).values() if isinstance(leaf, Lora)]
    bits = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(bits, axis=0)) == 2 * len(MATRICES) * CONFIG.n_layers


def test_the_backward_pass_recomputes_with_the_mask_of_the_forward_pass():
    key = jax.random.key(7)
    want_loss, want = gradients(model(), trained(), DROPPING, key=key)
    got_loss, got = gradients(model(), trained(), DROPPING, replace(FP32, remat="full"), key)
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(difference, got, want))) < TOLERANCE
    _, other = gradients(model(), trained(), DROPPING, replace(FP32, remat="full"), jax.random.key(8))
    assert max(jax.tree.leaves(jax.tree.map(difference, other, want))) > 0.01


@pytest.fixture(scope="module")
def on_one_device():
    return {
        base: jax.device_get(gradients(BASES[base](), trained(), DROPPING, key=jax.random.key(7))) for base in BASES
    }


@pytest.mark.parametrize(("base", "layout"), [("int8", "fsdp=4,tensor=2"), ("float32", "data=2,context=2,tensor=2")])
def test_loss_and_gradients_on_a_mesh_equal_one_device(base: str, layout: str, on_one_device):
    """Masks too: what is dropped does not depend on where it lies."""
    mesh = make_mesh(layout)
    whole = abstract(CONFIG, mesh)
    lies, adapters_lie = (
        jax.tree.map(lambda leaf: leaf.sharding, tree)
        for tree in (quantize_abstract(whole) if base == "int8" else whole, abstract_adapters(CONFIG, LORA, mesh))
    )
    with jax.set_mesh(mesh):
        frozen, adapters = jax.device_put(BASES[base](), lies), jax.device_put(trained(), adapters_lie)
        got = jax.device_get(gradients(frozen, adapters, DROPPING, replace(FP32, remat="full"), jax.random.key(7)))
    assert max(jax.tree.leaves(jax.tree.map(difference, got, on_one_device[base]))) < TOLERANCE


def test_adapters_lie_as_the_weights_do():
    """The axes that a factor shares with its weight are sharded as the weight's; the rank is not."""
    mesh = make_mesh("fsdp=4,tensor=2")
    lies = jax.tree.map(lambda leaf: leaf.sharding, abstract_adapters(LLAMA2_7B, LoraConfig(), mesh))
    q, down = lies["layers.wq_DNH"], lies["layers.w_down_FD"]
    assert q.a == sharding(mesh, "layer", "embed", "rank") and q.b == sharding(
        mesh, "layer", "rank", "heads", "head_dim"
    )
    assert down.a == sharding(mesh, "layer", "ffn", "rank") and down.b == sharding(mesh, "layer", "rank", "embed")


def test_adapters_of_7b_have_the_count_that_is_printed_everywhere():
    """Rank 16 on all seven matrices of Llama 2 7B: 39,976,960; rank 8 on queries and values: 4,194,304."""
    for lora, count in ((LoraConfig(), 39_976_960), (LoraConfig(rank=8, targets=("wq_DNH", "wv_DKH")), 4_194_304)):
        assert sum(leaf.size for leaf in jax.tree.leaves(abstract_adapters(LLAMA2_7B, lora))) == count


def test_initial_adapters_depend_on_their_name_and_key_alone():
    fresh = init_adapters(CONFIG, LORA, jax.random.key(1))
    wanted = abstract_adapters(CONFIG, LORA)
    assert jax.tree.structure(fresh) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(fresh), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    some = init_adapters(CONFIG, replace(LORA, targets=("wo_NHD",)), jax.random.key(1))
    assert some.keys() == {"layers.wo_NHD"} and jnp.array_equal(some["layers.wo_NHD"].a, fresh["layers.wo_NHD"].a)
    assert not jnp.array_equal(fresh["layers.w_up_DF"].a, fresh["layers.w_gate_DF"].a)
    wide = init_adapters(replace(CONFIG, dim=512, ffn_dim=2048), LoraConfig(), jax.random.key(1))
    for name, inputs in (("wq_DNH", 512), ("wo_NHD", 48), ("w_down_FD", 2048)):
        assert float(wide[f"layers.{name}"].a.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.05)


def test_layers_apart_are_the_same_model():
    adapted = adapt(narrow(), trained(), LORA)
    assert difference(plain_logits(layers_apart(adapted)), plain_logits(adapted)) < TOLERANCE


def test_layers_that_are_taken_apart_leave_nothing_of_the_stacked_ones():
    """Or a model would be twice in memory while it loads."""
    model = jax.tree.map(jnp.copy, narrow())
    wanted, stacked = layers_apart(model), jax.tree.leaves(model.layers)
    apart = layers_apart(model, consume=True)
    assert all(leaf.is_deleted() for leaf in stacked) and not model.embedding_VD.is_deleted()
    assert all(map(jnp.array_equal, jax.tree.leaves(apart), jax.tree.leaves(wanted)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("wq_DNH", "head_DV")}, "head_DV; expected one or more of wq_DNH"),
        ({"targets": ("wq_DNH", "wq_DNH")}, "each once"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        LoraConfig(**change)
