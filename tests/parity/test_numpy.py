"""Our model against an independent float64 one, at weights that give every path signal, and the mistakes that this comparison catches."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig, RopeScaling
from tests.parity.numpy_llama import MUTANTS, forward, random_weights, to_ours

LENGTH = 512
TOLERANCE = 1e-4
FP32 = Compute(dtype="float32", remat="none")
# Not square anywhere: N H != D and F is no multiple of D, so a transposed matrix cannot pass.
GQA = LlamaConfig(dim=96, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=160, vocab_size=211, head_dim=16)
SCALED = replace(GQA, rope_theta=5e5, rope_scaling=RopeScaling(factor=8.0, original_context=64))
CONFIGS = {
    "8/2": GQA,
    "8/8": replace(GQA, n_kv_heads=8),
    "8/1": replace(GQA, n_kv_heads=1),
    "scaled rope": SCALED,
    "tied": replace(GQA, tie_embeddings=True),
    "theta 1e6": replace(GQA, rope_theta=1e6),
    "eps 1e-6": replace(GQA, norm_eps=1e-6),
}
# Embeddings so small that the first norm's epsilon is a third of the mean square it is added to.
SMALL = 0.005


def worst(got_TV: np.ndarray, want_TV: np.ndarray) -> float:
    """The largest relative error of any position: its largest difference over its largest logit."""
    return float(np.max(np.abs(got_TV - want_TV).max(-1) / np.abs(want_TV).max(-1)))


@cache
def problem(name: str, scale: float) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights, tokens, and our logits at them."""
    config = CONFIGS[name]
    weights = random_weights(config, seed=0, embedding_scale=scale)
    tokens_T = np.random.default_rng(1).integers(0, config.vocab_size, LENGTH)
    logits_BTV = jax.jit(lambda model, tokens_BT: model(tokens_BT, compute=FP32))(
        to_ours(weights, config), tokens_T[None]
    )
    return weights, tokens_T, np.asarray(logits_BTV[0], np.float64)


@pytest.mark.parametrize("scale", [1.0, SMALL])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_numpy_models_over_512_positions(name: str, scale: float):
    weights, tokens_T, got = problem(name, scale)
    want = forward(weights, tokens_T, CONFIGS[name])
    assert worst(got, want) < TOLERANCE
    assert np.abs(got - want).max() / np.abs(want).max() < TOLERANCE


# Where each mistake shows. Left: a mistake; right: the configuration and embedding scale under which it changes anything at all.
SHOWS_IN = {
    "rope scaling forgotten": ("scaled rope", 1.0),
    "theta 10000": ("theta 1e6", 1.0),
    "epsilon 1e-6": ("8/2", SMALL),
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_each_mistake_is_far_outside_the_tolerance(wrong: str):
    name, scale = SHOWS_IN.get(wrong, ("8/2", 1.0))
    weights, tokens_T, got = problem(name, scale)
    mutant = forward(weights, tokens_T, CONFIGS[name], wrong)
    assert worst(got, mutant) > 100 * TOLERANCE
    assert np.abs(got - mutant).max() / np.abs(mutant).max() > 100 * TOLERANCE


def test_one_head_layout_cannot_hide_regrouped_heads():
    """At 8/8 and 8/1 regrouping changes nothing: why 8/2 is in the list."""
    for name, shows in (("8/8", False), ("8/1", False), ("8/2", True)):
        weights, tokens_T, got = problem(name, 1.0)
        assert (
            worst(got, forward(weights, tokens_T, CONFIGS[name], "query heads regrouped")) > 100 * TOLERANCE
        ) == shows
