"""Model configurations: what they refuse, what they count, and that JSON keeps them."""

import json
from dataclasses import asdict, fields, replace

import pytest

from llama_jax import config as presets
from llama_jax.config import LLAMA2_7B, LLAMA31_8B, LlamaConfig, feed_forward_dim, llama_config_from_json
from llama_jax.errors import UserError

SMALL = LlamaConfig(
    dim=8, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=12, vocab_size=10, context_length=16, head_dim=6
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, r"n_kv_heads is 3, which does not divide n_heads 4; it may be one of \[1, 2, 4\]"),
        ({"n_kv_heads": 8}, r"n_kv_heads is 8, which does not divide n_heads 4"),
        ({"head_dim": 5}, "head_dim is 5; rotary embedding needs an even number"),
        ({"n_layers": 0}, "n_layers is 0; it must be at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1; it must be at least 1"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0; it must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused_with_the_reason(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


def test_parameters_and_flops_counted_by_hand():
    # A block: q 8x24, k and v 8x12 each, o 24x8, three of 8x12, two norms of 8.
    block = 192 + 96 + 96 + 192 + 3 * 96 + 16
    assert SMALL.n_params == 2 * block + 2 * 10 * 8 + 8
    assert replace(SMALL, tie_embeddings=True).n_params == 2 * block + 10 * 8 + 8
    # Two FLOPs per weight of every matmul: blocks without norms, and one head, tied or not.
    assert SMALL.matmul_flops_per_token() == 2 * (2 * (block - 16) + 80)
    assert replace(SMALL, tie_embeddings=True).matmul_flops_per_token() == SMALL.matmul_flops_per_token()


def test_causal_attention_flops_are_the_sum_over_positions():
    # Scores and values: each a multiply and an add per key and head element.
    length = 16
    every = sum(2 * 2 * SMALL.n_heads * SMALL.head_dim * (position + 1) for position in range(length)) * SMALL.n_layers
    assert SMALL.causal_attention_flops_per_token(length) * length == every


def test_feed_forward_rule_rounds_as_the_reference_does():
    assert feed_forward_dim(4096) == 11008  # 10922 up to the next 256
    assert feed_forward_dim(96) == 256
    assert feed_forward_dim(8192, 4096, 1.3) == 28672  # int(1.3 * 21845) = 28398
    assert feed_forward_dim(768, 64) == 2048  # already a multiple


@pytest.mark.parametrize("name", [name for name, value in vars(presets).items() if isinstance(value, LlamaConfig)])
def test_json_keeps_a_configuration(name: str):
    config = getattr(presets, name)
    assert llama_config_from_json(json.loads(json.dumps(asdict(config)))) == config


def test_json_with_an_unknown_or_missing_field_is_not_taken():
    with pytest.raises(TypeError):
        llama_config_from_json({**asdict(LLAMA2_7B), "dropout": 0.1})
    with pytest.raises(TypeError):
        llama_config_from_json({k: v for k, v in asdict(LLAMA31_8B).items() if k != "dim"})


def test_configurations_are_values():
    assert hash(replace(SMALL)) == hash(SMALL) and replace(SMALL) == SMALL
    for field in fields(SMALL):
        with pytest.raises(AttributeError):
            setattr(SMALL, field.name, 1)
