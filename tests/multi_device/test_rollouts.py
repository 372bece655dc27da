"""Generating over a mesh: the weights that were trained, gathered once, and the tokens of one device."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.generation import rollouts
from llama_jax.generation.cache import init_cache
from llama_jax.generation.llama import Llama
from llama_jax.generation.rollouts import make_gather, sample_rollouts
from llama_jax.generation.sampler import Decoding, Sampling, decode
from llama_jax.model.lora import LoraConfig, adapt, describe_adapters, init_adapters
from llama_jax.model.quantize import quantize_model
from llama_jax.model.transformer import Transformer, shardings
from llama_jax.parallel.mesh import GATHERED_TO_GENERATE, generation_layout, make_mesh, sharding
from llama_jax.training.batches import to_devices
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.step import Batch, abstract_state, make_train_step, new_state
from tests.parity.numpy_llama import random_weights, to_ours

CONFIG = LlamaConfig(
    dim=32, n_layers=1, n_heads=8, n_kv_heads=4, ffn_dim=64, vocab_size=128, head_dim=8, context_length=64
)
MESHES = ["data=2,fsdp=4", "fsdp=2,tensor=4"]
rng = np.random.default_rng(0)
PROMPTS = [[1, *rng.integers(3, 128, n).tolist()] for n in (3, 20, 1, 9, 5, 14, 2)]
EOS = 2


class Ids:
    """Stands for a tokenizer where no text is read or written."""

    bos_id, eos_id, vocab_size = 1, EOS, 128


@pytest.fixture(scope="module")
def model() -> Transformer:
    """With a louder EOS, so that answers end at different lengths."""
    model = to_ours(random_weights(CONFIG, seed=0), CONFIG)
    return jax.tree_util.tree_map_with_path(
        lambda path, w: w.at[:, EOS].multiply(2) if jax.tree_util.keystr(path) == ".head_DV" else w, model
    )


def draw(model: Transformer):
    return sample_rollouts(
        Llama(model, Ids(), "float32"), PROMPTS, seeds=range(7), max_new_tokens=30, temperature=0.9, rows=4
    )


@pytest.fixture(scope="module")
def alone(model):
    return draw(model)


@pytest.mark.parametrize(("text", "copies"), [(MESHES[0], False), (MESHES[1], False), (MESHES[1], True)])
def test_a_mesh_draws_what_one_device_draws(model, alone, text: str, copies: bool, monkeypatch):
    """Seven prompts through four rows, or through eight where a mesh has as many parts; with layers apart too, as on GPUs."""
    monkeypatch.setattr(rollouts, "scan_copies", lambda layout: copies)
    sharded = jax.device_put(model, shardings(CONFIG, make_mesh(text)))
    meshed = draw(make_gather(sharded, "float32")(sharded))
    assert len({len(one.ids) for one in alone}) > 3 and {one.ended for one in alone} == {True, False}
    assert [one.ids for one in meshed] == [one.ids for one in alone]
    for one, other in zip(alone, meshed, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def gathered_sizes(compiled: str) -> list[int]:
    """How many elements each all-gather of a compiled program gives."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", compiled)
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def decoding_program(model: Transformer, rows: int) -> str:
    """The compiled text of decoding so many rows with weights that lie as these."""
    with jax.set_mesh(model.embedding_VD.sharding.mesh):
        none_B = jnp.zeros(rows, jnp.int32)
        state = Decoding(
            init_cache(CONFIG, rows, 64, jnp.dtype("float32")),
            none_B,
            none_B,
            jax.random.split(jax.random.key(0), rows),
        )
        return decode.lower(model, state, Sampling(1.0, 1.0, 0), EOS, steps=4).compile().as_text()


@pytest.mark.parametrize("text", MESHES)
def test_decoding_gathers_no_weight(model, text: str):
    """Where the layout of training would gather every matrix for every token."""
    trained = jax.device_put(model, shardings(CONFIG, make_mesh(text)))
    smallest = min(CONFIG.dim * CONFIG.n_kv_heads * CONFIG.head_dim, CONFIG.dim * CONFIG.ffn_dim)
    split = smallest // trained.layers.wk_DKH.sharding.mesh.shape["tensor"]
    rows = 8
    assert max(gathered_sizes(decoding_program(trained, rows))) >= split
    # Over `tensor`, the logits are gathered to be drawn from.
    left = gathered_sizes(decoding_program(make_gather(trained, "float32")(trained), rows))
    logits = rows * CONFIG.vocab_size if "tensor" in text else 0
    assert max(left, default=0) <= logits


def test_layers_that_are_gathered_apart_lie_as_they_did_together(model, monkeypatch):
    sharded = jax.device_put(model, shardings(CONFIG, make_mesh("fsdp=2,tensor=4")))
    together = make_gather(sharded, "float32")(sharded)
    monkeypatch.setattr(rollouts, "scan_copies", lambda layout: True)
    (layer,) = make_gather(sharded, "float32")(sharded).layers
    for name, weight in vars(together.layers).items():
        if isinstance(weight, jax.Array):
            apart = getattr(layer, name)
            assert np.array_equal(apart, weight[0]), name
            assert apart.sharding.shard_shape(apart.shape) == weight.sharding.shard_shape(weight.shape)[1:], name


def test_what_is_gathered_is_what_was_just_trained(model):
    """To the bit; and by the function that was made before the step."""
    mesh, dtype = make_mesh("fsdp=2,tensor=4"), "bfloat16"
    optimizer = make_optimizer(OptimizerConfig(1e-2, 0), CONFIG, total_steps=10)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, optimizer, mesh))
    with jax.set_mesh(mesh):
        begun = jax.jit(lambda model: new_state(model, optimizer), out_shardings=layout)(model)
        gather = make_gather(begun.model, dtype)
        before = jax.device_get(gather(begun.model))
        ids_BT = rng.integers(3, 128, (8, 32)).astype(np.int32)
        places_BT = np.broadcast_to(np.arange(32, dtype=np.int32), ids_BT.shape)
        batch = to_devices(mesh, Batch(ids_BT, ids_BT, places_BT, places_BT * 0, places_BT >= 0), 8)
        step = make_train_step(optimizer, Compute("float32", remat="none"), layout=layout)
        state, _ = step(begun, batch)
    after, trained = gather(state.model), jax.device_get(state.model)
    for old, new, weight in zip(*map(jax.tree.leaves, (before, after, trained)), strict=True):
        assert new.dtype == dtype and np.array_equal(new, weight.astype(dtype)) and not np.array_equal(new, old)
        whole = {axis for part in new.sharding.spec for axis in (part if isinstance(part, tuple) else (part,))}
        assert not whole & {*GATHERED_TO_GENERATE}
    # Kept apart over `tensor`, whole otherwise.
    parts = mesh.shape["tensor"]
    assert after.layers.w_gate_DF.addressable_shards[0].data.shape == (1, 32, 64 // parts)


def test_the_narrow_type_is_what_travels(model):
    """Half precision, since CPUs widen bfloat16 to move it."""
    trained = jax.device_put(model, shardings(CONFIG, make_mesh("fsdp=8")))
    compiled = make_gather(trained, "float16").lower(trained).compile().as_text()
    assert {*re.findall(r"= (\w+)\[[^=]* all-gather\(", compiled)} == {"f16"}


def test_adapters_and_quantised_weights_are_gathered_too(model):
    mesh, lora = make_mesh("fsdp=4,tensor=2"), LoraConfig(rank=4)
    layout = jax.tree.map(lambda p: sharding(mesh, *p.axes), describe_adapters(CONFIG, lora))
    adapters = jax.device_put(init_adapters(CONFIG, lora, jax.random.key(0)), layout)
    frozen = quantize_model(jax.device_put(model, shardings(CONFIG, mesh)))
    adapted = adapt(frozen, adapters, lora)
    gathered = make_gather(adapted, "float32")(adapted)
    for got, want in zip(*map(jax.tree.leaves, (gathered, adapted)), strict=True):
        assert got.dtype == want.dtype and np.array_equal(got, want)
    w_gate = gathered.layers.w_gate_DF
    shapes = [x.addressable_shards[0].data.shape for x in (w_gate.base.values, w_gate.a, w_gate.b)]
    assert shapes == [(1, 32, 32), (1, 32, 4), (1, 4, 32)]


def test_a_layout_to_generate_is_the_one_of_training_without_its_gathered_axes():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert generation_layout(sharding(mesh, "layer", "embed", "ffn")) == sharding(mesh, "layer", None, "ffn")
