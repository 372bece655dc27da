"""A tokenizer with every byte, a small model with random weights, and one that spells what it is told."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.model.transformer import Transformer, abstract
from llama_jax.text.tokenizer import Tokenizer
from tests.parity.numpy_llama import random_weights, to_ours

TEXT = "the cat sat on the mat and the dog sat by the door\nwho would have thought that it could be so\n"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=304)


@pytest.fixture(scope="session")
def model(tokenizer) -> Transformer:
    """Random weights of real strength: every token depends on all before it, and most distributions are broad."""
    config = LlamaConfig(
        dim=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=80,
        vocab_size=tokenizer.vocab_size,
        head_dim=12,
        context_length=64,
    )
    return to_ours(random_weights(config, seed=0), config)


@pytest.fixture(scope="session")
def speller(tokenizer) -> Callable[[list[int]], Transformer]:
    """Makes a model that, after BOS, gives these ids in turn with near certainty (no id twice)."""

    def make(ids: list[int]) -> Transformer:
        V = tokenizer.vocab_size
        config = LlamaConfig(
            dim=V, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=1, vocab_size=V, head_dim=2, context_length=96
        )
        shapes = abstract(config)
        # One-hot embeddings, layers that add nothing, and a head that is the table of successors.
        successors_VV = jnp.zeros((V, V))
        for now, following in zip([tokenizer.bos_id, *ids[:-1]], ids, strict=True):
            successors_VV = successors_VV.at[now, following].set(50.0)
        leaves = {".embedding_VD": jnp.eye(V), ".head_DV": successors_VV, ".norm_D": jnp.ones(V)}
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaves.get(jax.tree_util.keystr(path), jnp.zeros(leaf.shape)), shapes
        )

    return make
