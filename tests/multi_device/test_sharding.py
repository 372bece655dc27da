"""Loss and gradients on every mesh equal those of one device, and the parameters really lie where the rule table says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.model import attention, transformer
from llama_jax.parallel.mesh import RULES, constrain, make_mesh, sharding
from llama_jax.training.loss import token_loss
from llama_jax.training.step import abstract_batch, abstract_state, make_train_step

# Every axis divides by eight, and grouped queries are not as many as keys.
CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=16, ffn_dim=128, vocab_size=256, context_length=128
)
ROWS, LENGTH = 8, 128
# What the partitioner says on stderr when it finds no way from one layout to the next but to gather a whole array.
WASTEFUL = "Involuntary full rematerialization"
MESHES = [
    "data=2,fsdp=4",
    "data=4,fsdp=2",
    "fsdp=8",
    "data=8",
    "tensor=8",
    "fsdp=2,tensor=4",
    "context=8",
    "data=4,context=2",
    "data=2,context=4",
    "data=2,fsdp=2,context=2",
    "fsdp=2,context=2,tensor=2",
]


def make_batch() -> dict[str, np.ndarray]:
    """Rows of two to four packed segments, whose borders fall inside the spans of a context-sharded sequence."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    starts = rng.random((ROWS, LENGTH)) < 0.02
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(LENGTH), 0), axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": (np.arange(LENGTH) - first).astype(np.int32),
        "weights": (rng.random((ROWS, LENGTH)) < 0.9).astype(np.float32),
    }


def loss(model, batch, compute):
    x_BTD = model.hidden(
        batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segments"], compute=compute
    )
    sums = token_loss(x_BTD, model.output_head(), batch["targets"], batch["weights"], 64)
    return sums.loss / batch["weights"].sum()


def loss_and_gradients(mesh_text: str | None, attention_kernel: str = "xla", remat: str = "full"):
    """On the mesh, or without one, as host arrays; and the model as it lay."""
    compute = Compute(dtype="float32", attention=attention_kernel, remat=remat)
    model, batch = transformer.init(CONFIG, jax.random.key(0)), make_batch()
    step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    if mesh_text is None:
        return jax.device_get(step(model, batch, compute)), model
    mesh = make_mesh(mesh_text)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, transformer.shardings(CONFIG, mesh))
        batch = jax.device_put(batch, sharding(mesh, "batch", "length"))
        return jax.device_get(step(model, batch, compute)), model


@pytest.fixture(scope="module")
def on_one_device():
    return loss_and_gradients(None)[0]


def worst_difference(got, expected) -> float:
    """The largest relative difference among the loss and the norms of the parameters' gradients."""
    differences = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), got, expected)
    return float(max(jax.tree.leaves(differences)))


@pytest.mark.parametrize("mesh_text", MESHES)
def test_loss_and_gradients_equal_one_device(mesh_text, on_one_device, capfd):
    got, _ = loss_and_gradients(mesh_text)
    assert worst_difference(got, on_one_device) < 1e-5
    assert WASTEFUL not in capfd.readouterr().err


def test_the_warning_of_a_layout_that_has_no_way_would_be_seen(capfd):
    """An embedding gathered only after the lookup, which is what `Transformer.embed` avoids."""
    with jax.set_mesh(make_mesh("fsdp=2,context=2,tensor=2")):

        def lookup(table_VD, tokens_BT):
            x_BTD = constrain(table_VD, "vocab", "embed")[tokens_BT]
            return (constrain(x_BTD, "batch", "length", "act_embed") ** 2).sum()

        jax.jit(jax.grad(lookup)).lower(jnp.ones((64, 64)), jnp.ones((8, 8), jnp.int32)).compile()
    assert WASTEFUL in capfd.readouterr().err


@pytest.mark.parametrize("mesh_text", ["fsdp=2,tensor=4", "data=2,context=4"])
def test_the_tpu_kernel_equals_one_device(mesh_text, on_one_device):
    got, _ = loss_and_gradients(mesh_text, "splash", remat="attention")
    assert worst_difference(got, on_one_device) < 1e-5


def test_cudnn_is_told_where_its_queries_begin(monkeypatch):
    """XLA plays cuDNN's part, given the mask and flags of each device."""
    dot_product_attention = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return dot_product_attention(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention, "lacks_cudnn", lambda dtype: False)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(ROWS, LENGTH, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    for segments in (make_batch()["segments"], None):
        expected = attention.causal_attention(q, k, v, segments, implementation="xla")
        with jax.set_mesh(make_mesh("data=2,context=2,tensor=2")):
            got = jax.jit(partial(attention.causal_attention, implementation="cudnn"))(q, k, v, segments)
        assert np.linalg.norm(got - np.asarray(expected)) < 1e-6 * np.linalg.norm(expected)


def test_causal_mask_that_forgets_where_its_queries_begin_is_caught(on_one_device, monkeypatch):
    attend = attention.xla_attention

    def from_zero(q, k, v, positions_T, segments):
        return attend(q, k, v, jnp.arange(q.shape[1]), segments)

    monkeypatch.setattr(attention, "xla_attention", from_zero)
    assert worst_difference(loss_and_gradients("data=2,context=4")[0], on_one_device) > 1e-2


def test_segments_of_other_rows_are_caught(on_one_device, monkeypatch):
    attend = attention.xla_attention

    def of_other_rows(q, k, v, positions_T, segments):
        return attend(q, k, v, positions_T, (segments[0], jnp.roll(segments[1], 1, axis=0)))

    monkeypatch.setattr(attention, "xla_attention", of_other_rows)
    assert worst_difference(loss_and_gradients("data=2,context=4")[0], on_one_device) > 1e-2


def test_a_rule_that_does_not_gather_the_keys_is_caught(on_one_device, monkeypatch):
    monkeypatch.setitem(RULES, "kv_length", ("context",))
    assert worst_difference(loss_and_gradients("data=4,context=2")[0], on_one_device) > 1e-2


@pytest.mark.parametrize(
    ("mesh_text", "wq", "wk", "w_gate", "embedding"),
    [
        ("fsdp=8", (2, 8, 16, 16), (2, 8, 8, 16), (2, 8, 128), (256, 8)),
        ("data=8", (2, 64, 16, 16), (2, 64, 8, 16), (2, 64, 128), (256, 64)),
        ("tensor=8", (2, 64, 2, 16), (2, 64, 1, 16), (2, 64, 16), (32, 64)),
        ("fsdp=2,context=2,tensor=2", (2, 16, 8, 16), (2, 16, 4, 16), (2, 16, 64), (128, 16)),
    ],
)
def test_parameters_lie_in_parts(mesh_text, wq, wk, w_gate, embedding):
    mesh = make_mesh(mesh_text)
    model = jax.device_put(transformer.init(CONFIG, jax.random.key(0)), transformer.shardings(CONFIG, mesh))
    weights = [model.layers.wq_DNH, model.layers.wk_DKH, model.layers.w_gate_DF, model.embedding_VD]
    assert [w.addressable_shards[0].data.shape for w in weights] == [wq, wk, w_gate, embedding]


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_no_device_ever_holds_the_whole_model(remat):
    """Weights are gathered layer by layer, and let go: kept for the backward pass, those of all layers would be the model again.

    Of a model whose weights are large beside what it makes of eight short rows.
    """
    config = LlamaConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, ffn_dim=1024, vocab_size=512, context_length=32)
    mesh, optimizer = make_mesh("fsdp=8"), optax.sgd(1e-3)
    shapes = abstract_state(config, optimizer, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    with jax.set_mesh(mesh):
        step = make_train_step(optimizer, Compute("float32", remat=remat), layout=layout)
        memory = step.lower(shapes, abstract_batch(mesh, 8, 32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.75 * 4 * config.n_params
