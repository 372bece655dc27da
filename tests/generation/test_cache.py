"""The cache: what is read back through it is what the full forward pass sees, and it is written where it lies."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import Compute, LlamaConfig
from llama_jax.generation import cache as cache_module
from llama_jax.generation.cache import Cache, Kept, extend, init_cache, widen, write
from llama_jax.generation.sampler import Decoding, Sampling, decode, prefill
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer, abstract, layers_apart
from tests.parity.numpy_llama import random_weights, to_ours

GQA = LlamaConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=96, vocab_size=131, head_dim=12)
MHA = replace(GQA, n_kv_heads=8)
FP32 = Compute(dtype="float32", remat="none")
TOLERANCE = 1e-5

LENGTHS = np.array([29, 13, 1, 22])
# How many tokens of each row every call brings: some rows are ahead, some get nothing, and from the fourth call on they come one by one.
PIECES = [np.array([7, 5, 1, 0]), np.array([0, 4, 0, 8]), np.array([9, 0, 0, 8])]
PIECES += [(sum(PIECES) + i < LENGTHS).astype(int) for i in range(13)]


@cache
def problem(config: LlamaConfig) -> tuple[Transformer, np.ndarray, np.ndarray]:
    """A model whose every path carries signal, tokens, and the logits of the full forward pass."""
    model = to_ours(random_weights(config, seed=0), config)
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (len(LENGTHS), LENGTHS.max()))
    return model, tokens_BT, np.asarray(jax.jit(lambda m, t: m(t, compute=FP32))(model, tokens_BT))


def teacher_forced_error(config: LlamaConfig, slots: int = 32, apart: bool = False) -> float:
    """Largest relative error of any position's logits when the tokens come in `PIECES`."""
    model, tokens_BT, want_BTV = problem(config)
    model = layers_apart(model) if apart else model

    @jax.jit  # anew for each call, so that what a test replaced is traced
    def extend(tokens_BT, count_B, cache):
        x_BTD, cache = cache_module.extend(model, tokens_BT, count_B, cache)
        return cache, model.logits(x_BTD)

    # Not zeros: what was left in a slot by another use must not matter either.
    cache = jax.tree.map(lambda x: x + 3, init_cache(config, len(LENGTHS), slots, jnp.float32, apart))
    cache, done_B, worst = cache._replace(length_B=cache.length_B - 3), np.zeros(len(LENGTHS), int), 0.0
    for count_B in PIECES:
        T = 9 if count_B.max() > 1 else 1
        piece_BT = np.array(
            [np.resize(row[n : n + T], T) for row, n in zip(np.pad(tokens_BT, ((0, 0), (0, 9))), done_B, strict=True)]
        )
        cache, logits_BTV = extend(piece_BT, count_B, cache)
        for row, (n, count) in enumerate(zip(done_B, count_B, strict=True)):
            if count:
                got, want = np.asarray(logits_BTV[row, :count]), want_BTV[row, n : n + count]
                worst = max(worst, float(np.max(np.abs(got - want).max(-1) / np.abs(want).max(-1))))
        done_B = done_B + count_B
    assert (done_B == LENGTHS).all()
    return worst


@pytest.mark.parametrize(("config", "slots"), [(GQA, 32), (GQA, 29), (MHA, 29)], ids=["8/2", "8/2 full", "8/8 full"])
@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
def test_every_position_equals_the_full_forward(config: LlamaConfig, slots: int, apart: bool):
    assert teacher_forced_error(config, slots, apart) < TOLERANCE


@pytest.mark.parametrize(("module", "apart"), [(transformer, False), (cache_module, True)], ids=["stacked", "apart"])
def test_decoded_tokens_one_position_off_are_caught(monkeypatch, module, apart: bool):
    right = module.rope_table
    monkeypatch.setattr(module, "rope_table", lambda c, p_BT: right(c, p_BT + (p_BT.shape[1] == 1)))
    assert teacher_forced_error(GQA, apart=apart) > 100 * TOLERANCE


def test_attention_to_unfilled_slots_is_caught(monkeypatch):
    right = transformer.attend_with_cache
    monkeypatch.setattr(transformer, "attend_with_cache", lambda *a: right(*a[:5], jnp.full_like(a[5], a[3].shape[2])))
    assert teacher_forced_error(GQA) > 100 * TOLERANCE
    right_apart = cache_module.attend_to_cache
    monkeypatch.setattr(cache_module, "attend_to_cache", lambda *a: right_apart(*a[:3], a[3] + 1))
    assert teacher_forced_error(GQA, apart=True) > 100 * TOLERANCE


WRONG_WRITES = {
    "padding counted as tokens": lambda cache, k, v, count_B: write(cache, k, v, jnp.full_like(count_B, k.shape[3])),
    "one slot too late": lambda cache, k, v, count_B: write(
        cache._replace(length_B=cache.length_B + 1), k, v, count_B
    )._replace(length_B=cache.length_B + count_B),
    "one slot too early": lambda cache, k, v, count_B: write(
        cache._replace(length_B=cache.length_B - 1), k, v, count_B
    )._replace(length_B=cache.length_B + count_B),
    "all rows where the first one is": lambda cache, k, v, count_B: write(
        cache._replace(length_B=jnp.full_like(cache.length_B, cache.length_B[0])), k, v, count_B
    )._replace(length_B=cache.length_B + count_B),
    "keys for values": lambda cache, k, v, count_B: write(cache, v, k, count_B),
}


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("wrong", WRONG_WRITES)
def test_a_cache_written_wrongly_is_caught(monkeypatch, wrong: str, apart: bool):
    monkeypatch.setattr(cache_module, "write", WRONG_WRITES[wrong])
    assert teacher_forced_error(GQA, slots=48, apart=apart) > 100 * TOLERANCE


jitted_write = jax.jit(write)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=3, max_size=3), st.sampled_from([(1, 2), (2, 1)])
)
def test_write_equals_a_loop_and_drops_what_does_not_fit(rows: list[tuple[int, int]], heads: tuple[int, int]):
    length_B, count_B = np.array(rows, np.int32).T
    K, H = heads
    old_LBKSH = np.arange(2 * 3 * 8 * 2, dtype=np.float32).reshape(2, 3, K, 8, H)
    new_LBKTH = -1 - np.arange(2 * 3 * 4 * 2, dtype=np.float32).reshape(2, 3, K, 4, H)
    cache = jitted_write(Cache(old_LBKSH, 2 * old_LBKSH, length_B), new_LBKTH, 3 * new_LBKTH, count_B)
    want = old_LBKSH.copy()
    want_v = 2 * want
    for b, (length, count) in enumerate(rows):
        for t in range(min(count, 8 - length)):
            want[:, b, :, length + t] = new_LBKTH[:, b, :, t]
            want_v[:, b, :, length + t] = 3 * new_LBKTH[:, b, :, t]
    np.testing.assert_array_equal(cache.k_LBKSH, want)
    np.testing.assert_array_equal(cache.v_LBKSH, want_v)
    np.testing.assert_array_equal(cache.length_B, length_B + count_B)


def compiled(name: str, apart: bool, rows: int = 4, slots: int = 96) -> jax.stages.Compiled:
    """`prefill` or `decode` for shapes alone."""
    model, cache = abstract(GQA), jax.eval_shape(lambda: init_cache(GQA, rows, slots, jnp.float32, apart))
    model = jax.eval_shape(layers_apart, model) if apart else model
    count_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if name == "prefill":
        return prefill.lower(model, jax.ShapeDtypeStruct((rows, 16), jnp.int32), count_B, cache).compile()
    key_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    return decode.lower(model, Decoding(cache, count_B, count_B, key_B), Sampling(), 2, int(name[-1])).compile()


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("name", ["prefill", "decode 1", "decode 8"])
def test_the_donated_cache_is_written_in_place(name: str, apart: bool):
    """The output lies in the input's memory, and no instruction copies, transposes or selects an array of the cache's shape."""
    program = compiled(name, apart)
    buffers = GQA.n_layers if apart else 1
    shape = (GQA.n_layers // buffers, 4, GQA.n_kv_heads, 96, GQA.head_dim)
    assert program.memory_analysis().alias_size_in_bytes >= 2 * 4 * buffers * np.prod(shape)
    made_by = re.findall(rf"= f32\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(", program.as_text())
    assert {"parameter", "dynamic-update-slice"} <= set(made_by)
    # The only fusions are those that update a slice.
    assert set(made_by) <= {"parameter", "dynamic-update-slice", "fusion", "get-tuple-element", "bitcast"}
    assert made_by.count("fusion") == made_by.count("dynamic-update-slice") == 2 * buffers


def test_the_search_for_copies_finds_them(monkeypatch):
    """A scatter over rows, which has the cache transposed, is caught by the same search."""

    def scattered(cache, k_LBKTH, v_LBKTH, count_B):
        put = jax.vmap(
            lambda old, new, slot_T: old.at[:, :, slot_T].set(new, mode="drop"), in_axes=(1, 1, 0), out_axes=1
        )
        slots_BT = cache.length_B[:, None] + jnp.arange(k_LBKTH.shape[3])
        return Cache(
            put(cache.k_LBKSH, k_LBKTH, slots_BT), put(cache.v_LBKSH, v_LBKTH, slots_BT), cache.length_B + count_B
        )

    monkeypatch.setattr(cache_module, "write", scattered)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_the_donated_cache_is_written_in_place("decode 1", apart=False)
    monkeypatch.undo()
    jax.clear_caches()


def test_what_is_kept_is_what_both_begin_with_and_the_cache_holds():
    """The last token drawn is known and not in the cache; and of a prompt that is known whole one token is read again."""
    filled = init_cache(GQA, rows=1, slots=8, dtype=jnp.float32)._replace(length_B=jnp.array([4]))
    for ids, same in (
        ([1, 2, 3, 4, 5, 6], 4),
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4], 3),
        ([1, 2, 9, 4, 5], 2),
        ([9, 2], 0),
        ([1], 0),
    ):
        kept = Kept([1, 2, 3, 4, 5], filled)
        taken, known = kept.take(ids)
        assert (known, taken.length_B.tolist()) == (same, [same])
        assert kept.take(ids) == (None, 0)  # it is with the one who took it


def test_a_widened_cache_holds_the_same():
    filled = init_cache(GQA, rows=1, slots=8, dtype=jnp.float32)
    _, filled = extend(problem(GQA)[0], jnp.array([[3, 1, 4]]), jnp.array([3]), filled)
    wide = widen(filled, 12)
    assert wide.slots == 12 and wide.length_B.tolist() == [3]
    assert (wide.k_LBKSH[:, :, :, :8] == filled.k_LBKSH).all() and (wide.v_LBKSH[:, :, :, :8] == filled.v_LBKSH).all()
