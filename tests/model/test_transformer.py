"""What must hold of the transformer whatever its weights: causality, packing, layers, precision, layouts and purity."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llama_jax.config import Compute, LlamaConfig
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer, abstract, describe, init, rms_norm, rope_table, rotate, shardings
from llama_jax.parallel.mesh import make_mesh
from tests.parity.numpy_llama import random_weights, to_ours

CONFIG = LlamaConfig(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=61, head_dim=16)
FP32 = Compute(dtype="float32", remat="none")
B, T = 2, 24


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights that give every path signal."""
    return to_ours(random_weights(CONFIG, seed=3), CONFIG)


@pytest.fixture(scope="module")
def tokens_BT() -> jax.Array:
    return jnp.asarray(np.random.default_rng(4).integers(0, CONFIG.vocab_size, (B, T)), jnp.int32)


@partial(jax.jit, static_argnames="compute")
def logits(model: Transformer, tokens_BT: jax.Array, compute: Compute = FP32, **packing: jax.Array) -> jax.Array:
    return model(tokens_BT, compute=compute, **packing)


@partial(jax.jit, static_argnames="compute")
def loss_and_gradients(model: Transformer, tokens_BT: jax.Array, compute: Compute) -> tuple[jax.Array, Transformer]:
    def loss(model: Transformer) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(model(tokens_BT, compute=compute), axis=-1))

    return jax.value_and_grad(loss)(model)


def assert_close(got, want, tolerance: float) -> None:
    """Every array's largest difference is below `tolerance` of its largest value."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), jax.tree_util.keystr(path)


def test_no_logit_depends_on_a_later_token_and_each_depends_on_all_earlier_ones(model, monkeypatch):
    """By gradient with respect to the embedded tokens, which sees what changed ids can miss."""

    def influence_of_tokens() -> np.ndarray:
        tokens_BT = jnp.arange(T, dtype=jnp.int32)[None]

        def squares(x_BTD: jax.Array) -> jax.Array:
            with monkeypatch.context() as patch:
                patch.setattr(Transformer, "embed", lambda self, tokens_BT: x_BTD)
                return jnp.square(model(tokens_BT, compute=FP32)[0]).sum(-1)

        jacobian_TBSD = jax.jit(jax.jacrev(squares))(model.embed(tokens_BT))
        return np.abs(np.asarray(jacobian_TBSD)[:, 0]).max(-1)

    reach_TS = influence_of_tokens()
    later_TS = np.triu(np.ones((T, T), bool), 1)
    assert np.all(reach_TS[later_TS] == 0)
    assert np.all(reach_TS[~later_TS] > 1e-6)
    monkeypatch.setattr(
        transformer, "causal_attention", lambda q, k, v, *_, **__: q + v.mean(1, keepdims=True).repeat(2, 2)
    )
    assert np.all(influence_of_tokens()[later_TS] > 1e-6)


def test_packed_equals_unpacked(model):
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, CONFIG.vocab_size, n) for n in (7, 1, 11, 5)]
    row_T = np.concatenate(documents)[None]
    segment_ids = np.repeat(np.arange(1, 5), [len(d) for d in documents])[None]
    positions = np.concatenate([np.arange(len(d)) for d in documents])[None]
    alone = np.concatenate([logits(model, d[None])[0] for d in documents])
    assert_close(logits(model, row_T, positions_BT=positions, segment_ids_BT=segment_ids)[0], alone, 1e-5)
    # Without the segments, and (weaker, because rotary scores see distances alone) without the mask between them, it is another function.
    unmasked = np.asarray(logits(model, row_T, positions_BT=positions)[0])
    assert np.abs(unmasked - alone).max() > 0.1 * np.abs(alone).max()


def test_positions_count_by_their_distance_alone(model, tokens_BT):
    positions = np.broadcast_to(np.arange(T), (B, T))
    plain = logits(model, tokens_BT)
    assert_close(logits(model, tokens_BT, positions_BT=positions), plain, 0)
    assert_close(logits(model, tokens_BT, positions_BT=positions + 100), plain, 1e-4)
    stretched = np.asarray(logits(model, tokens_BT, positions_BT=positions * 2))
    assert np.abs(stretched - plain).max() > 0.1 * np.abs(plain).max()


def test_the_scan_over_layers_equals_a_loop_over_them(model, tokens_BT):
    """The loop reads one layer's weights at a time; a layer skipped, doubled or out of order shows."""

    @jax.jit
    def loop(model: Transformer, tokens_BT: jax.Array, order: tuple[int, ...]) -> jax.Array:
        rope = rope_table(CONFIG, jnp.broadcast_to(jnp.arange(T), (B, T)))
        x_BTD = model.embed(tokens_BT)
        for layer in order:
            weights = jax.tree.map(lambda w: w[layer], model.layers)  # noqa: B023 (used at once)
            heads = transformer.causal_attention(*weights.qkv(x_BTD, rope, CONFIG.norm_eps), None)
            x_BTD = weights.finish(x_BTD, heads, CONFIG.norm_eps)
        return model.logits(rms_norm(x_BTD, model.norm_D, CONFIG.norm_eps))

    scanned = np.asarray(logits(model, tokens_BT))
    assert_close(loop(model, tokens_BT, (0, 1, 2)), scanned, 1e-5)
    for wrong in ((0, 2, 1), (0, 1), (0, 1, 2, 2)):
        assert np.abs(loop(model, tokens_BT, wrong) - scanned).max() > 0.1 * np.abs(scanned).max()


@pytest.mark.parametrize("policy", ["dots", "attention", "full"])
def test_rematerialisation_changes_neither_loss_nor_gradient(model, tokens_BT, policy: str):
    loss, gradients = loss_and_gradients(model, tokens_BT, FP32)
    again_loss, again_gradients = loss_and_gradients(model, tokens_BT, replace(FP32, remat=policy))
    assert abs(loss - again_loss) <= 1e-6 * abs(loss)
    assert_close(again_gradients, gradients, 2e-6)


def test_rematerialisation_keeps_less_the_more_it_recomputes(model, tokens_BT):
    def kept(policy: str) -> int:
        """Elements that the forward pass hands to the backward pass, weights aside."""
        compute = replace(FP32, remat=policy)
        vjp = jax.eval_shape(lambda model: jax.vjp(lambda m: m(tokens_BT, compute=compute).sum(), model)[1], model)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    none, dots, attention, full = (kept(policy) for policy in ("none", "dots", "attention", "full"))
    assert none > dots > attention > full


def test_grouped_queries_equal_full_heads_with_the_keys_and_values_repeated(model, tokens_BT):
    repeat = partial(jnp.repeat, repeats=CONFIG.n_heads // CONFIG.n_kv_heads, axis=2)
    full_config = replace(CONFIG, n_kv_heads=CONFIG.n_heads)
    tree = {jax.tree_util.keystr(p): w for p, w in jax.tree_util.tree_leaves_with_path(model)}
    for name in (".layers.wk_DKH", ".layers.wv_DKH"):
        tree[name] = repeat(tree[name])
    full = jax.tree_util.tree_map_with_path(lambda p, _: tree[jax.tree_util.keystr(p)], describe(full_config))
    assert_close(logits(full, tokens_BT), logits(model, tokens_BT), 1e-5)


def test_bfloat16_stays_near_float32(model, tokens_BT):
    want = np.asarray(logits(model, tokens_BT))
    got = np.asarray(logits(model, tokens_BT, replace(FP32, dtype="bfloat16")))
    error = np.sqrt(np.mean((got - want) ** 2)) / want.std()
    assert 1e-4 < error < 0.05  # the lower bound: it really ran in bfloat16
    assert got.dtype == np.float32


def test_rotary_embedding_tells_neighbours_apart_beyond_position_256_in_bfloat16():
    """bfloat16 holds 256 and 258 but not 257: positions or angles kept in it would turn both the same way."""
    x_BTNH = jnp.ones((1, 3, 1, CONFIG.head_dim), jnp.bfloat16)
    turned = rotate(x_BTNH, rope_table(CONFIG, jnp.array([[256, 257, 258]])))
    exact = np.asarray(rotate(x_BTNH.astype(jnp.float32), rope_table(CONFIG, jnp.array([[256, 257, 258]]))))
    assert turned.dtype == jnp.bfloat16
    assert np.abs(np.asarray(turned, np.float32) - exact).max() < 2**-7
    assert np.abs(exact[0, 1] - exact[0, 0]).max() > 0.4


def test_norms_are_computed_in_float32():
    """A mean of squares in bfloat16 loses what lies below 1/256 of it: here, the last 2048 of 2049 values."""
    x_D = jnp.concatenate([jnp.full((1,), 64.0), jnp.ones(2048)]).astype(jnp.bfloat16)[None, None]
    got = float(rms_norm(x_D, jnp.ones(2049, jnp.bfloat16), 1e-5)[0, 0, 0])
    assert abs(got - 64 / np.sqrt((4096 + 2048) / 2049)) < 64 / 1.73 * 2**-8
    assert rms_norm(x_D, jnp.ones(2049, jnp.bfloat16), 1e-5).dtype == jnp.bfloat16


def test_transcendental_functions_and_sums_of_the_bfloat16_model_run_in_float32(model, tokens_BT):
    """Softmax (exp), rotary angles (cos, sin) and norms (rsqrt) never see a bfloat16; only the gate's sigmoid may."""

    def operations(jaxpr) -> list[tuple[str, jnp.dtype]]:
        found = []
        for equation in jaxpr.eqns:
            found += [(equation.primitive.name, v.aval.dtype) for v in equation.invars if hasattr(v.aval, "dtype")]
            for inner in jaxprs_in_params(equation.params):
                found += operations(inner)
        return found

    compute = replace(FP32, dtype="bfloat16", attention="xla")
    seen = operations(jax.make_jaxpr(lambda m, t: m(t, compute=compute))(model, tokens_BT).jaxpr)
    exact = {"exp", "cos", "sin", "rsqrt", "sqrt", "log"}
    assert {name for name, _ in seen} >= {"exp", "cos", "sin", "dot_general"}
    assert {dtype for name, dtype in seen if name in exact} == {jnp.dtype("float32")}
    assert jnp.dtype("bfloat16") in {dtype for name, dtype in seen if name == "dot_general"}


def test_initial_weights_do_not_depend_on_the_mesh():
    config = replace(CONFIG, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=128, vocab_size=64)
    key = jax.random.key(11)
    plain = jax.jit(partial(init, config))(key)
    for text in ("fsdp=8", "fsdp=2,tensor=4"):
        layout = shardings(config, make_mesh(text))
        sharded = jax.jit(partial(init, config), out_shardings=layout)(key)
        assert sharded.layers.wq_DNH.sharding == layout.layers.wq_DNH
        for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_initial_weights_have_the_declared_spread_and_no_two_are_equal():
    config = replace(CONFIG, dim=128, ffn_dim=256, vocab_size=512)
    drawn = init(config, jax.random.key(0))
    for p, w in zip(jax.tree.leaves(describe(config)), jax.tree.leaves(drawn), strict=True):
        if p.std is None:
            assert np.all(np.asarray(w) == 1)
        else:
            assert abs(float(jnp.std(w)) / p.std - 1) < 5 / np.sqrt(2 * w.size)
            assert abs(float(jnp.mean(w))) < 5 * p.std / np.sqrt(w.size)
    assert describe(config).layers.w_down_FD.std == pytest.approx(0.02 / np.sqrt(2 * config.n_layers))
    # Layers differ, and so do parameters of one shape.
    assert not np.allclose(drawn.layers.wq_DNH[0], drawn.layers.wq_DNH[1])
    assert not np.allclose(drawn.layers.w_gate_DF, drawn.layers.w_up_DF)
    assert not np.allclose(drawn.layers.wk_DKH, drawn.layers.wv_DKH)


@pytest.mark.parametrize("tied", [False, True])
def test_declarations_shapes_layouts_and_weights_are_one_tree(tied: bool):
    config = replace(CONFIG, tie_embeddings=tied)
    drawn = init(config, jax.random.key(0))
    mesh = make_mesh("fsdp=8")
    trees = (describe(config), abstract(config), abstract(config, mesh), shardings(config, mesh), drawn)
    assert len({jax.tree.structure(tree) for tree in trees}) == 1
    assert [w.shape for w in jax.tree.leaves(drawn)] == [p.shape for p in jax.tree.leaves(describe(config))]
    assert sum(w.size for w in jax.tree.leaves(drawn)) == config.n_params
    assert hasattr(drawn, "head_DV") != tied


def test_tied_embeddings_are_the_head(tokens_BT):
    config = replace(CONFIG, tie_embeddings=True)
    tied = init(config, jax.random.key(0))
    tree = {jax.tree_util.keystr(p): w for p, w in jax.tree_util.tree_leaves_with_path(tied)}
    tree[".head_DV"] = tied.embedding_VD.T
    untied = jax.tree_util.tree_map_with_path(lambda p, _: tree[jax.tree_util.keystr(p)], describe(CONFIG))
    assert_close(logits(tied, tokens_BT), logits(untied, tokens_BT), 1e-6)
    _, gradients = loss_and_gradients(tied, tokens_BT, FP32)
    _, apart = loss_and_gradients(untied, tokens_BT, FP32)
    assert_close(gradients.embedding_VD, apart.embedding_VD + apart.head_DV.T, 1e-5)


def test_a_model_is_a_value(model, tokens_BT):
    """Calls leave it as it was, transforms take it as an argument, and a changed copy is another model."""
    before = jax.tree.map(np.array, model)
    first = logits(model, tokens_BT)
    loss_and_gradients(model, tokens_BT, FP32)
    assert_close(logits(model, tokens_BT), first, 0)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    doubled = jax.tree.map(lambda w: 2 * w, model)
    assert isinstance(doubled, Transformer) and doubled.config == model.config
    assert not np.allclose(logits(doubled, tokens_BT), first)
    _, gradients = loss_and_gradients(model, tokens_BT, FP32)
    assert jax.tree.structure(gradients) == jax.tree.structure(model)


def test_extending_a_cache_piece_by_piece_equals_the_full_forward(model, tokens_BT):
    """Pieces of unequal length, rows of unequal fill: what a row's cache holds beyond its length must not matter."""
    c = CONFIG
    k_LBKSH = jnp.full((c.n_layers, B, c.n_kv_heads, T + 8, c.head_dim), 1e3)
    v_LBKSH = jnp.full_like(k_LBKSH, 1e3)
    length_B = jnp.zeros(B, jnp.int32)
    extend = jax.jit(lambda model, *args: model.extend(*args))
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 17), (17, T)):
        x_BTD, k, v = extend(model, tokens_BT[:, start:stop], k_LBKSH, v_LBKSH, length_B)
        k_LBKSH = k_LBKSH.at[:, :, :, start:stop].set(k)
        v_LBKSH = v_LBKSH.at[:, :, :, start:stop].set(v)
        length_B = length_B + (stop - start)
        parts.append(model.logits(x_BTD))
    assert_close(jnp.concatenate(parts, axis=1), logits(model, tokens_BT), 1e-5)
    # Rows of unequal length: the second row goes on from 9 tokens, the first from 17.
    lengths = np.array([17, 9])
    more = jnp.stack([tokens_BT[row, n : n + 3] for row, n in enumerate(lengths)])
    x_BTD, _, _ = extend(model, more, k_LBKSH, v_LBKSH, jnp.asarray(lengths, jnp.int32))
    want = np.stack([np.asarray(logits(model, tokens_BT))[row, n : n + 3] for row, n in enumerate(lengths)])
    assert_close(model.logits(x_BTD), want, 1e-5)
