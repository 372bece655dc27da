"""What is compiled, and when: nothing for another setting, and no second cache in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.generation.cache import init_cache
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import Decoding, Sampling, begin, decode, prefill
from llama_jax.model.transformer import init, layers_apart

DEEP = LlamaConfig(
    dim=32, n_layers=8, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=61, head_dim=8, context_length=1024
)


def test_another_setting_or_prompt_compiles_nothing(model, tokenizer):
    """Whole numbers too, which would be traced as integers."""
    engine = Llama(model, tokenizer)

    def programs() -> list[int]:
        return [step._cache_size() for step in (prefill, begin, decode)]

    engine.generate(["the cat", "who"], max_new_tokens=40)
    before = programs()
    for settings in (
        {"temperature": 0},
        {"temperature": 1, "top_p": 1},
        {"temperature": 1.3, "top_p": 0.5, "top_k": 7, "seed": 2**31},
        {"max_new_tokens": 37, "seed": [3, 4]},
    ):
        engine.generate(["that", "the dog sat"], **{"max_new_tokens": 40, **settings})
    assert programs() == before
    # The count does grow where the shapes are others (five rows, as in no other test).
    engine.generate(["the"] * 5, max_new_tokens=40)
    assert programs() == [n + 1 for n in before]


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("steps", [1, 4])
def test_decode_holds_one_cache_only(steps: int, apart: bool):
    """The old one is its memory, and no copy of keys or of values is among the temporaries."""
    rows, slots = 4, 1024
    cache = init_cache(DEEP, rows, slots, jnp.dtype("float32"), apart)
    buffers = jax.tree.leaves(cache[:2])
    size = sum(buffer.nbytes for buffer in buffers)
    last_B = jnp.zeros(rows, jnp.int32)
    state = Decoding(cache, last_B, last_B + steps, jax.random.split(jax.random.key(0), rows))
    model = init(DEEP, jax.random.key(0))
    model = layers_apart(model) if apart else model
    compiled = decode.lower(model, state, Sampling(), 2, steps=steps).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    # On CPU a scan copies a layer's keys and values as it reads them: an eighth here, and less in a deeper model.
    assert memory.temp_size_in_bytes < (size / 16 if apart else size / 4)
    after = compiled(model, state, Sampling(0.0), 2)[0].cache
    assert all(buffer.is_deleted() for buffer in buffers)
    assert np.array_equal(after.length_B, [steps] * rows)
    assert all(
        buffer[:, :, :, :steps].any() and not buffer[:, :, :, steps:].any() for buffer in jax.tree.leaves(after[:2])
    )
