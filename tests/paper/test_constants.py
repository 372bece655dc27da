"""Every constant that the paper and the released checkpoints print and the code uses (paper 2.2, Tables 1 and 2; Llama 1, Code Llama, Llama 3)."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import config as presets
from llama_jax.config import LlamaConfig, RopeScaling, feed_forward_dim
from llama_jax.model.transformer import abstract, rope_frequencies

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def experiment(name: str):
    """The module of a recipe."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# name: dim, layers, heads, kv heads, ffn, head dim, vocabulary, context, theta, epsilon, tied, parameters
SHAPES = {
    "LLAMA2_7B": (4096, 32, 32, 32, 11008, 128, 32000, 4096, 1e4, 1e-5, False, 6_738_415_616),
    "LLAMA2_13B": (5120, 40, 40, 40, 13824, 128, 32000, 4096, 1e4, 1e-5, False, 13_015_864_320),
    "LLAMA2_34B": (8192, 48, 64, 8, 22016, 128, 32000, 4096, 1e4, 1e-5, False, 33_743_970_304),
    "LLAMA2_70B": (8192, 80, 64, 8, 28672, 128, 32000, 4096, 1e4, 1e-5, False, 68_976_648_192),
    "LLAMA1_7B": (4096, 32, 32, 32, 11008, 128, 32000, 2048, 1e4, 1e-6, False, 6_738_415_616),
    "LLAMA1_13B": (5120, 40, 40, 40, 13824, 128, 32000, 2048, 1e4, 1e-6, False, 13_015_864_320),
    "LLAMA1_33B": (6656, 60, 52, 52, 17920, 128, 32000, 2048, 1e4, 1e-6, False, 32_528_943_616),
    "LLAMA1_65B": (8192, 80, 64, 64, 22016, 128, 32000, 2048, 1e4, 1e-5, False, 65_285_660_672),
    # Parameters of the four Code Llamas: Llama 2's, and 16 more pieces in embedding and head but for 34B.
    "CODE_LLAMA_7B": (4096, 32, 32, 32, 11008, 128, 32016, 16384, 1e6, 1e-5, False, 6_738_415_616 + 32 * 4096),
    "CODE_LLAMA_13B": (5120, 40, 40, 40, 13824, 128, 32016, 16384, 1e6, 1e-5, False, 13_015_864_320 + 32 * 5120),
    "CODE_LLAMA_34B": (8192, 48, 64, 8, 22016, 128, 32000, 16384, 1e6, 1e-5, False, 33_743_970_304),
    "CODE_LLAMA_70B": (8192, 80, 64, 8, 28672, 128, 32016, 16384, 1e6, 1e-5, False, 68_976_648_192 + 32 * 8192),
    "TINYLLAMA_1B": (2048, 22, 32, 4, 5632, 64, 32000, 2048, 1e4, 1e-5, False, 1_100_048_384),
    "LLAMA3_8B": (4096, 32, 32, 8, 14336, 128, 128256, 8192, 5e5, 1e-5, False, 8_030_261_248),
    "LLAMA3_70B": (8192, 80, 64, 8, 28672, 128, 128256, 8192, 5e5, 1e-5, False, 70_553_706_496),
    "LLAMA31_8B": (4096, 32, 32, 8, 14336, 128, 128256, 131072, 5e5, 1e-5, False, 8_030_261_248),
    "LLAMA31_70B": (8192, 80, 64, 8, 28672, 128, 128256, 131072, 5e5, 1e-5, False, 70_553_706_496),
    "LLAMA31_405B": (16384, 126, 128, 8, 53248, 128, 128256, 131072, 5e5, 1e-5, False, 405_853_388_800),
    "LLAMA32_1B": (2048, 16, 32, 8, 8192, 64, 128256, 131072, 5e5, 1e-5, True, 1_235_814_400),
    "LLAMA32_3B": (3072, 28, 24, 8, 8192, 128, 128256, 131072, 5e5, 1e-5, True, 3_212_749_824),
}


def test_every_preset_is_checked():
    named = {name for name, value in vars(presets).items() if isinstance(value, LlamaConfig)}
    assert named == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_and_exact_parameter_count(name: str):
    c: LlamaConfig = getattr(presets, name)
    fields = (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.ffn_dim, c.head_dim, c.vocab_size, c.context_length)
    assert (*fields, c.rope_theta, c.norm_eps, c.tie_embeddings, c.n_params) == SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_has_the_parameters_that_the_formula_counts(name: str):
    """Counted array by array, without a byte of memory."""
    config = getattr(presets, name)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(config))) == SHAPES[name][-1]


def test_only_the_models_beyond_128k_context_scale_their_rotary_frequencies():
    for name in SHAPES:
        factor = {"LLAMA31": 8.0, "LLAMA32": 32.0}.get(name.split("_")[0])
        want = None if factor is None else RopeScaling(factor, 1.0, 4.0, 8192)
        assert getattr(presets, name).rope_scaling == want, name


@pytest.mark.parametrize(
    ("names", "multiple_of", "multiplier"),
    [
        (("LLAMA2_7B", "LLAMA2_13B", "LLAMA2_34B", "CODE_LLAMA_7B", "CODE_LLAMA_13B", "CODE_LLAMA_34B"), 256, None),
        (("LLAMA1_7B", "LLAMA1_13B", "LLAMA1_33B", "LLAMA1_65B", "TINYLLAMA_1B"), 256, None),
        (("LLAMA2_34B",), 256, 1.0),
        (("LLAMA2_70B", "CODE_LLAMA_70B", "LLAMA3_70B", "LLAMA31_70B"), 4096, 1.3),
        (("LLAMA3_8B", "LLAMA31_8B"), 1024, 1.3),
        # Their params.json: 405B 1.2 and 4096, 1B 1.5 and 256, 3B 1.0 and 256.
        (("LLAMA31_405B",), 4096, 1.2),
        (("LLAMA32_1B",), 256, 1.5),
        (("LLAMA32_3B",), 256, 1.0),
    ],
)
def test_feed_forward_widths_follow_from_the_reference_rule(names, multiple_of: int, multiplier: float | None):
    for name in names:
        config = getattr(presets, name)
        assert feed_forward_dim(config.dim, multiple_of, multiplier) == config.ffn_dim, name


@pytest.mark.parametrize("name", SHAPES)
def test_rotary_frequencies_follow_the_published_formula(name: str):
    """Pair by pair, as the reference code branches."""
    c: LlamaConfig = getattr(presets, name)
    want = []
    for i in range(c.head_dim // 2):
        f = 1.0 / c.rope_theta ** (2 * i / c.head_dim)
        if c.rope_scaling is not None:
            factor, low, high, old = c.rope_scaling.factor, 1.0, 4.0, 8192
            wavelength = 2 * np.pi / f
            if wavelength < old / high:
                pass
            elif wavelength > old / low:
                f = f / factor
            else:
                s = (old / wavelength - low) / (high - low)
                f = (1 - s) * f / factor + s * f
        want.append(f)
    np.testing.assert_allclose(rope_frequencies(c), want, rtol=1e-6)
    assert rope_frequencies(c).dtype == np.float32


def test_all_three_bands_of_scaled_rotary_frequencies_occur_and_meet():
    for name in ("LLAMA31_8B", "LLAMA32_1B", "LLAMA32_3B"):
        c = getattr(presets, name)
        plain = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        ratio = rope_frequencies(c) / plain
        assert np.isclose(ratio[0], 1) and np.isclose(ratio[-1], 1 / c.rope_scaling.factor)
        between = (ratio > 1.01 / c.rope_scaling.factor) & (ratio < 0.99)
        assert between.sum() >= 2
        assert np.all(np.diff(ratio) <= 1e-6)


@pytest.mark.parametrize(("size", "peak_lr"), [("7b", 3e-4), ("13b", 3e-4), ("34b", 1.5e-4), ("70b", 1.5e-4)])
def test_pretraining_hyper_parameters(size: str, peak_lr: float):
    config = experiment(f"pretrain_{size}").config
    o = config.optimizer
    assert config.model == getattr(presets, f"LLAMA2_{size.upper()}")
    assert (o.peak_lr, o.warmup_steps, o.final_lr_ratio) == (peak_lr, 2000, 0.1)
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.95, 1e-5, 0.1, 1.0)
    assert (config.batch_tokens, config.train_tokens) == (4 * 2**20, 2_000_000_000_000)
    # About 500k steps.
    assert 450_000 < config.train_tokens / config.batch_tokens < 500_000


def test_grouped_query_attention_is_for_34b_and_70b_alone():
    groups = {name: c.n_heads // c.n_kv_heads for name, c in vars(presets).items() if name.startswith("LLAMA2_")}
    assert groups == {"LLAMA2_7B": 1, "LLAMA2_13B": 1, "LLAMA2_34B": 8, "LLAMA2_70B": 8}


def test_the_mixture_is_llama_1s():
    mix = {source.rpartition("/")[2]: share for source, share in experiment("pretrain_7b").LLAMA1_MIX.items()}
    printed = {"ccnet": 67, "c4": 15, "github": 4.5, "wikipedia": 4.5, "books": 4.5, "arxiv": 2.5, "stackexchange": 2}
    assert mix == printed
    assert sum(mix.values()) == 100
