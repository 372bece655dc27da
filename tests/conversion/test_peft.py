"""Adapters in PEFT's form, with `peft` itself as the oracle: it loads what is written here, and what it wrote is loaded."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.conversion.peft import CONFIG as CONFIG_FILE
from llama_jax.conversion.peft import WEIGHTS, read_peft, write_peft
from llama_jax.conversion.safetensors_file import SafetensorsReader
from llama_jax.errors import UserError
from llama_jax.model.lora import MATRICES, Adapter, Adapters, LoraConfig, abstract_adapters, adapt, init_adapters
from llama_jax.parallel.mesh import make_mesh
from tests.conversion.checkpoints import write_safetensors, write_torch
from tests.parity.make_golden import hf_config
from tests.parity.numpy_llama import halves_from_neighbours, random_weights, to_hf, to_ours
from tests.training.tiny import assert_same

# Queries and outputs are square matrices, so that a factor taken for the other would fit.
CONFIG = LlamaConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=96, head_dim=12)
LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.1)
SOME = LoraConfig(rank=2, alpha=4.0, targets=("wq_DNH", "w_down_FD"))
FP32 = Compute(dtype="float32", attention="xla", remat="none")
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 24))
TOLERANCE = 1e-4
Tensors = dict[str, np.ndarray]
# PEFT asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def peft():
    reason = "no peft to compare with; install peft, torch and transformers"
    pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    return pytest.importorskip("peft", reason=reason)


@cache
def trained(lora: LoraConfig) -> Adapters:
    rng = np.random.default_rng(2)
    fresh = init_adapters(CONFIG, lora, jax.random.key(1))
    return {name: Adapter(x.a, jnp.asarray(rng.normal(size=x.b.shape) / 2, jnp.float32)) for name, x in fresh.items()}


def our_logits(adapters: Adapters, lora: LoraConfig) -> np.ndarray:
    model = to_ours(random_weights(CONFIG, seed=0), CONFIG)
    return np.asarray(jax.jit(lambda m, a: adapt(m, a, lora)(TOKENS, compute=FP32))(model, adapters), np.float64)


def hf_model():
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(hf_config(CONFIG)).float().eval()
    weights = to_hf(random_weights(CONFIG, seed=0), CONFIG)
    model.load_state_dict({name: torch.tensor(w, dtype=torch.float32) for name, w in weights.items()}, strict=True)
    return model


def their_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS), use_cache=False).logits.double().numpy()


def worst(got_BTV: np.ndarray, want_BTV: np.ndarray) -> float:
    """The largest relative error of any position."""
    return float(np.max(np.abs(got_BTV - want_BTV).max(-1) / np.abs(want_BTV).max(-1)))


@pytest.mark.parametrize("lora", [LORA, SOME], ids=["all matrices", "some"])
def test_peft_computes_our_logits_from_what_we_wrote(peft, tmp_path, lora):
    write_peft(tmp_path / "out", trained(lora), lora, CONFIG, base="a/model")
    loaded = peft.PeftModel.from_pretrained(hf_model(), tmp_path / "out")
    assert worst(our_logits(trained(lora), lora), their_logits(loaded)) < TOLERANCE
    assert worst(their_logits(hf_model()), their_logits(loaded)) > 0.1, "the adapters do something"
    settings = loaded.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (lora.rank, lora.alpha, lora.dropout)
    assert settings.base_model_name_or_path == "a/model"


@pytest.fixture(scope="module")
def theirs(peft, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A folder that PEFT wrote, with factors of which none is zero, and its logits."""
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(hf_model(), settings)
    model.save_pretrained(folder)
    return folder, their_logits(model)


def test_we_compute_the_logits_of_what_peft_wrote(theirs):
    folder, want = theirs
    adapters, lora = read_peft(folder, CONFIG)
    assert lora == LoraConfig(3, 7.0, 0.1, MATRICES)
    assert worst(our_logits(adapters, lora), want) < TOLERANCE


def test_rank_stabilised_adapters_are_scaled_as_peft_scales_them(peft, tmp_path):
    settings = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_rslora=True
    )
    model = peft.get_peft_model(hf_model(), settings)
    model.save_pretrained(tmp_path)
    adapters, lora = read_peft(tmp_path, CONFIG)
    assert lora.scale == pytest.approx(1.5) and set(adapters) == {"layers.wq_DNH", "layers.wv_DKH"}
    assert worst(our_logits(adapters, lora), their_logits(model)) < TOLERANCE


def rewrite(folder: Path, to: Path, change: Callable[[Tensors], None] = lambda t: None, **fields: object) -> Path:
    """A copy of an adapter folder with other tensors or settings."""
    reader = SafetensorsReader(folder / WEIGHTS)
    tensors = {name: np.array(reader.read(name)) for name in reader.specs}
    change(tensors)
    to.mkdir(exist_ok=True)
    write_safetensors(to / WEIGHTS, tensors)
    settings = json.loads((folder / CONFIG_FILE).read_text()) | fields
    (to / CONFIG_FILE).write_text(json.dumps({name: value for name, value in settings.items() if value != "left out"}))
    return to


def name_of(module: str, layer: int, factor: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"


def exchange(first: tuple, second: tuple, transposed: bool = False) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        a, b = tensors[name_of(*first)], tensors[name_of(*second)]
        tensors[name_of(*first)], tensors[name_of(*second)] = (b.T, a.T) if transposed else (b, a)

    return change


def neighbours(tensors: Tensors) -> None:
    key = name_of("self_attn.q_proj", 0, "B")
    tensors[key] = halves_from_neighbours(tensors[key], CONFIG.n_heads)


Q, OUT, GATE, UP = "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"
MUTANTS = {
    "A and B swapped": exchange((Q, 0, "A"), (Q, 0, "B"), transposed=True),
    "A and B swapped in the output": exchange((OUT, 1, "A"), (OUT, 1, "B"), transposed=True),
    "layers swapped": exchange((UP, 0, "A"), (UP, 1, "A")),
    "gate and up swapped": exchange((GATE, 0, "B"), (UP, 0, "B")),
    "query rows in another order": neighbours,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_factors_in_another_place_are_seen(theirs, tmp_path, mutant):
    folder, want = theirs
    adapters, lora = read_peft(rewrite(folder, tmp_path, MUTANTS[mutant]), CONFIG)
    assert worst(our_logits(adapters, lora), want) > 100 * TOLERANCE


def test_a_missing_scale_is_seen(theirs, tmp_path):
    folder, want = theirs
    adapters, lora = read_peft(rewrite(folder, tmp_path, lora_alpha=3), CONFIG)
    assert worst(our_logits(adapters, lora), want) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    write_peft(folder, trained(LORA), LORA, CONFIG)
    return folder


def test_a_round_trip_keeps_every_bit_and_goes_onto_a_mesh(ours):
    mesh = make_mesh("fsdp=4,tensor=2")
    for where in (None, mesh):
        adapters, lora = read_peft(ours, CONFIG, where)
        assert lora == LORA
        assert_same(adapters, trained(LORA))
    for leaf, like in zip(
        jax.tree.leaves(adapters), jax.tree.leaves(abstract_adapters(CONFIG, LORA, mesh)), strict=True
    ):
        assert leaf.sharding == like.sharding


def test_adapters_of_sixteen_bits_and_in_a_torch_file_are_read(ours, tmp_path):
    def halve(tensors: Tensors) -> None:
        tensors.update({name: array.astype(np.float16) for name, array in tensors.items()})

    half, _ = read_peft(rewrite(ours, tmp_path, halve), CONFIG)
    for name, adapter in half.items():
        assert adapter.a.dtype == jnp.float32
        np.testing.assert_array_equal(adapter.b, np.asarray(trained(LORA)[name].b).astype(np.float16))
    reader = SafetensorsReader(ours / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    write_torch(tmp_path / "adapter_model.bin", {name: np.array(reader.read(name)) for name in reader.specs})
    assert_same(read_peft(tmp_path, CONFIG)[0], trained(LORA))


def without(tensors: Tensors) -> None:
    del tensors[name_of(UP, 1, "B")]


def with_head(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 48), np.float32)


def other_rank(tensors: Tensors) -> None:
    tensors[name_of(UP, 1, "A")] = np.zeros((4, 48), np.float32)


def as_integers(tensors: Tensors) -> None:
    tensors[name_of(UP, 1, "A")] = np.zeros((3, 48), np.int8)


def nothing(tensors: Tensors) -> None:
    tensors.clear()


REFUSED = {
    "other weights saved": ({"modules_to_save": ["lm_head"]}, None, r'modules_to_save to \["lm_head"\]'),
    "biases": ({"bias": "all"}, None, 'bias to "all"'),
    "DoRA": ({"use_dora": True}, None, "use_dora"),
    "ranks of their own": ({"rank_pattern": {"q_proj": 8}}, None, "rank_pattern"),
    "scales of their own": ({"alpha_pattern": {"q_proj": 8}}, None, "alpha_pattern"),
    "some layers": ({"layers_to_transform": [0]}, None, "layers_to_transform"),
    "a field of the future": ({"quaternions": 4}, None, "quaternions to 4.*merge_and_unload"),
    "another method": ({"peft_type": "IA3"}, None, "peft_type 'IA3'"),
    "a changed base": ({"init_lora_weights": "pissa"}, None, "'pissa' changes the base"),
    "no rank": ({"r": "left out"}, None, "does not say r"),
    "a rank of text": ({"r": "3"}, None, "has r '3'"),
    "all dropped": ({"lora_dropout": 1}, None, "lora.dropout is 1"),
    "a missing factor": ({}, without, "lacks .*layers.1.mlp.up_proj.lora_B.weight"),
    "an adapted head": ({}, with_head, "holds base_model.model.lm_head.lora_A.weight too many"),
    "another rank": ({}, other_rank, r"layers.1.mlp.up_proj.lora_A.weight has shape \(4, 48\)"),
    "integers": ({}, as_integers, "lora_A.weight is int8"),
    "no factors": ({}, nothing, "lacks "),
    "no factors of no matrices": ({"target_modules": "all-linear"}, nothing, "no adapters in it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_of_this_model_is_refused_by_name(ours, tmp_path, case):
    fields, change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read_peft(rewrite(ours, tmp_path, change or (lambda tensors: None), **fields), CONFIG)


def test_missing_files_are_named_and_nothing_is_overwritten(ours, tmp_path):
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        read_peft(tmp_path, CONFIG)
    (tmp_path / CONFIG_FILE).write_bytes((ours / CONFIG_FILE).read_bytes())
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        read_peft(tmp_path, CONFIG)
    with pytest.raises(UserError, match="already holds adapter_config.json"):
        write_peft(tmp_path, trained(LORA), LORA, CONFIG)
