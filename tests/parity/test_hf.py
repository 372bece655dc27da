"""Our model against Hugging Face's LlamaForCausalLM: live where PyTorch is installed, and everywhere against golden values it gave."""

import json
from functools import cache
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from llama_jax.config import Compute, llama_config_from_json
from llama_jax.model.transformer import Transformer
from llama_jax.training.loss import token_loss
from tests.parity.make_golden import CASES, GOLDEN, hf_run, inputs
from tests.parity.numpy_llama import hf_to_ours, to_ours

TOLERANCE = 1e-4
FP32 = Compute(dtype="float32", remat="none", loss_chunk=100)

LAYER_NAMES = {
    "attention_norm_D": "input_layernorm",
    "wq_DNH": "self_attn.q_proj",
    "wk_DKH": "self_attn.k_proj",
    "wv_DKH": "self_attn.v_proj",
    "wo_NHD": "self_attn.o_proj",
    "ffn_norm_D": "post_attention_layernorm",
    "w_gate_DF": "mlp.gate_proj",
    "w_up_DF": "mlp.up_proj",
    "w_down_FD": "mlp.down_proj",
}

with_torch = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None,
    reason="no PyTorch and transformers to compare with; install them with pip install -e '.[torch]'",
)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over largest value."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def worst(got_BTV: np.ndarray, want_BTV: np.ndarray) -> float:
    """The largest relative error of any position."""
    return float(np.max(np.abs(got_BTV - want_BTV).max(-1) / np.abs(want_BTV).max(-1)))


def ours(model: Transformer, tokens: np.ndarray) -> tuple[np.ndarray, float, Transformer]:
    """Logits, mean cross-entropy and its gradient, as `hf_run` gives them; the loss is the trainer's own."""

    @jax.jit
    def run(model, inputs_BT, targets_BT):
        def loss(model):
            x_BTD = model.hidden(inputs_BT, compute=FP32)
            weights_BT = np.full(targets_BT.shape, 1 / targets_BT.size, np.float32)
            return token_loss(x_BTD, model.output_head(), targets_BT, weights_BT, FP32.loss_chunk).loss

        return model(inputs_BT, compute=FP32), *jax.value_and_grad(loss)(model)

    logits, loss, gradients = run(model, tokens[:, :-1], tokens[:, 1:])
    return np.asarray(logits, np.float64), float(loss), gradients


@cache
def live(name: str, length: int) -> tuple:
    """Both sides of one case: ours and Hugging Face's logits, loss and gradients."""
    config = CASES[name]
    weights, tokens = inputs(config, length)
    return ours(to_ours(weights, config), tokens), hf_run(config, weights, tokens)


@with_torch
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_over_512_positions(name: str):
    (logits, loss, _), (want, want_loss, _) = live(name, 512)
    assert worst(logits, want) < TOLERANCE
    assert abs(loss - want_loss) / want_loss < 1e-5


@with_torch
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_every_parameter_equals_transformers(name: str):
    (_, _, gradients), (_, _, want) = live(name, 512)
    want = hf_to_ours(want, CASES[name])
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(want), strict=True):
        assert relative(g, np.asarray(w)) < TOLERANCE, jax.tree_util.keystr(path)


@with_torch
@pytest.mark.parametrize("name", CASES)
def test_golden_values_are_what_transformers_gives(name: str):
    config = CASES[name]
    logits, loss, gradients = hf_run(config, *inputs(config))
    golden = np.load(GOLDEN / f"{name}.npz")
    assert worst(logits, golden["logits"]) < 1e-5
    assert abs(loss - golden["loss"]) < 1e-5
    for parameter, g in gradients.items():
        assert abs(np.linalg.norm(g) / golden[f"norm.{parameter}"] - 1) < 1e-5, parameter


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_the_golden_values(name: str):
    config = CASES[name]
    golden = np.load(GOLDEN / f"{name}.npz")
    weights, tokens = inputs(config)
    logits, loss, gradients = ours(to_ours(weights, config), tokens)
    assert worst(logits, golden["logits"]) < TOLERANCE
    assert abs(loss / golden["loss"] - 1) < TOLERANCE
    for i in range(config.n_layers):
        for ours_name, hf_name in LAYER_NAMES.items():
            got = np.linalg.norm(getattr(gradients.layers, ours_name)[i])
            assert abs(got / golden[f"norm.model.layers.{i}.{hf_name}.weight"] - 1) < TOLERANCE, (i, ours_name)
    assert abs(np.linalg.norm(gradients.embedding_VD) / golden["norm.model.embed_tokens.weight"] - 1) < TOLERANCE
    assert abs(np.linalg.norm(gradients.norm_D) / golden["norm.model.norm.weight"] - 1) < TOLERANCE
    if not config.tie_embeddings:
        assert abs(np.linalg.norm(gradients.head_DV) / golden["norm.lm_head.weight"] - 1) < TOLERANCE


def test_golden_files_belong_to_the_cases_they_are_compared_in():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(CASES)
    for name, config in CASES.items():
        about = json.loads(str(np.load(GOLDEN / f"{name}.npz")["about"]))
        assert llama_config_from_json(about["case"]) == config
