"""`Llama`: batches, streams, ends and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.errors import UserError
from llama_jax.generation import llama as llama_module
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import Sampling, log_probs, prefill
from llama_jax.model.transformer import layers_apart, shardings
from llama_jax.parallel.mesh import make_mesh
from tests.stories260k import FOLDER

PROMPTS = ["the cat sat", "who", "", "the dog sat by the door and the cat on the mat"]
WARM = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Llama:
    return Llama(model, tokenizer)


@pytest.fixture(scope="module")
def full_forward(model):
    """Logits (T, V) of one sequence of ids, without a cache."""
    compute = Compute(dtype="float32", remat="none")
    run = jax.jit(lambda model, tokens_BT: model(tokens_BT, compute=compute))

    def logits(ids: list[int]) -> np.ndarray:
        padded = np.array([ids + [0] * (64 - len(ids))], np.int32)  # causal: what follows changes nothing
        return np.asarray(run(model, padded))[0, : len(ids)]

    return logits


def test_greedy_equals_argmax_over_full_forwards(engine, tokenizer, full_forward):
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, temperature=0, max_new_tokens=50), strict=True):
        ids = tokenizer.encode(prompt)
        for token in completion.ids:
            assert token == full_forward(ids)[-1].argmax()
            ids.append(token)
        assert (
            len(completion.ids) == min(50, 64 - len(tokenizer.encode(prompt)))
            or full_forward(ids)[-1].argmax() == tokenizer.eos_id
        )
        assert completion.log_probs == [0.0] * len(completion.ids)


@pytest.mark.parametrize("settings", [WARM, {**WARM, "top_k": 20}, {**WARM, "temperature": 1.5, "top_p": 1.0}])
def test_log_probabilities_are_those_of_the_full_forward(engine, tokenizer, full_forward, settings):
    sampling = Sampling(settings["temperature"], settings["top_p"], settings.get("top_k", 0))
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, **settings), strict=True):
        ids = tokenizer.encode(prompt) + completion.ids
        logits_TV = full_forward(ids)[len(ids) - len(completion.ids) - 1 : -1]
        want = np.asarray(log_probs(jnp.asarray(logits_TV), sampling))[np.arange(len(completion.ids)), completion.ids]
        np.testing.assert_allclose(completion.log_probs, want, atol=1e-4)


@pytest.mark.parametrize("settings", [{"temperature": 0, "max_new_tokens": 40}, WARM])
def test_a_row_does_not_depend_on_the_others(engine, settings):
    seeds = [5, 6, 7, 8]
    together = engine.generate(PROMPTS, seed=seeds, **settings)
    shuffled = engine.generate(PROMPTS[::-1], seed=seeds[::-1], **settings)[::-1]
    for prompt, seed, a, b in zip(PROMPTS, seeds, together, shuffled, strict=True):
        alone = engine.generate([prompt], seed=seed, **settings)[0]
        assert alone.ids == a.ids == b.ids and alone.finish_reason == a.finish_reason
        np.testing.assert_allclose(alone.log_probs, a.log_probs, atol=1e-4)


def test_equal_prompts_differ_and_equal_seeds_repeat(engine):
    first = engine.generate(["the cat"] * 4, seed=1, **WARM)
    assert len({tuple(c.ids) for c in first}) == 4
    assert engine.generate(["the cat"] * 4, seed=1, **WARM) == first
    assert all(a.ids != b.ids for a, b in zip(engine.generate(["the cat"] * 4, seed=2, **WARM), first, strict=True))


def test_draws_of_one_row_are_independent(engine, speller, tokenizer):
    """A model whose distribution is the same at every step must not repeat one draw: the key advances."""
    flat = speller([tokenizer.eos_id])
    flat = jax.tree.map(jnp.zeros_like, flat)
    ids = Llama(flat, tokenizer).generate([""], temperature=1.0, top_p=1.0, max_new_tokens=60, seed=3)[0].ids
    assert len(set(ids)) > 40


@pytest.mark.parametrize(("name", "size"), [("DECODE_CHUNK", 1), ("DECODE_CHUNK", 7), ("PREFILL_CHUNK", 4)])
def test_the_size_of_a_dispatch_changes_nothing(engine, monkeypatch, name: str, size: int):
    before = engine.generate(PROMPTS, seed=4, **WARM)
    monkeypatch.setattr(llama_module, name, size)
    after = engine.generate(PROMPTS, seed=4, **WARM)
    assert [c.ids for c in after] == [c.ids for c in before]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_is_the_generated_text_in_pieces(engine, prompt: str):
    for seed in (0, 1, 2):
        pieces = list(engine.stream(prompt, seed=seed, **WARM))
        assert "".join(pieces) == engine.generate([prompt], seed=seed, **WARM)[0].text
        assert len(pieces) > 5 and all(pieces)


def test_characters_are_never_split(speller, tokenizer):
    text = "\N{LLAMA}\u00e9\N{SNOWMAN}"
    ids = [i for i in tokenizer.encode(text, bos=False) if tokenizer.decode([i]) not in (" ", "")]
    assert len(ids) == 9  # four, two and three bytes
    model = speller([*ids, tokenizer.eos_id])
    assert list(Llama(model, tokenizer).stream("", temperature=0)) == list(text)
    cut = Llama(model, tokenizer).generate([""], temperature=0, max_new_tokens=6 - 1)[0]
    assert (cut.text, len(cut.ids), cut.finish_reason) == ("\N{LLAMA}\ufffd", 5, "length")
    assert list(Llama(model, tokenizer).stream("", temperature=0, max_new_tokens=5)) == ["\N{LLAMA}", "\ufffd"]


def test_eos_ends_and_is_trimmed(speller, tokenizer):
    ids = tokenizer.encode("who sat", bos=False)
    engine = Llama(speller([*ids, tokenizer.eos_id]), tokenizer)
    done = engine.generate([""], temperature=0)[0]
    assert (done.text, done.ids, done.finish_reason) == ("who sat", ids, "eos") and len(done.log_probs) == len(ids)
    assert "".join(engine.stream("", temperature=0)) == "who sat"
    # One token short of EOS, and exactly at it.
    assert engine.generate([""], temperature=0, max_new_tokens=len(ids))[0].finish_reason == "length"
    assert engine.generate([""], temperature=0, max_new_tokens=len(ids) + 1)[0].finish_reason == "eos"
    # A row that ended goes on neither in text nor in log-probabilities while another one does.
    early, late = engine.generate([ids[:-1], ids[:1]], temperature=0)
    assert (early.ids, late.ids) == (ids[-1:], ids[1:]) and len(early.log_probs) == 1


def test_a_continuation_keeps_its_leading_space(speller, tokenizer):
    ids = tokenizer.encode("the cat", bos=False)
    engine = Llama(speller([*ids, tokenizer.eos_id]), tokenizer)
    assert engine.generate([""], temperature=0)[0].text == "the cat"
    split = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]) == "the")
    assert engine.generate([ids[:split]], temperature=0)[0].text == " cat"


def test_every_prompt_begins_with_bos(engine, tokenizer):
    settings = {"temperature": 0, "max_new_tokens": 12}
    ids = tokenizer.encode("the cat", bos=False)
    text, bare, whole, _ = engine.generate(["the cat", ids, [tokenizer.bos_id, *ids], ""], **settings)
    assert text == bare == whole
    empty, none, bos, _ = engine.generate(["", [], [tokenizer.bos_id], "the"], **settings)
    assert empty == none == bos


def test_generation_ends_with_the_context(engine, tokenizer):
    rng = np.random.default_rng(0)
    for length, room in ((64, 0), (63, 1), (58, 6)):
        ids = [tokenizer.bos_id, *rng.integers(3, 300, length - 1).tolist()]
        long, short, *_ = engine.generate([ids, ids[:10], [], []], temperature=0, max_new_tokens=20)
        assert len(long.ids) <= room and (long.finish_reason == "eos" or len(long.ids) == room)
        # Full to the last slot, the row is still what it is with room to spare.
        assert short == engine.generate([ids[:10]], temperature=0, max_new_tokens=20)[0]


def test_the_last_slots_hold_what_they_should(engine, tokenizer, full_forward):
    ids = [tokenizer.bos_id, *np.random.default_rng(1).integers(3, 300, 39).tolist()]
    completion = engine.generate([ids], temperature=0, max_new_tokens=500)[0]
    for token in completion.ids:
        assert token == full_forward(ids)[-1].argmax()
        ids.append(token)
    assert len(ids) == 64 or completion.finish_reason == "eos"


def test_nothing_asked_for_is_nothing_given(engine):
    assert engine.generate([]) == []
    assert [c.ids for c in engine.generate(["the", ""], max_new_tokens=0)] == [[], []]
    assert list(engine.stream("the", max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"max_new_tokens": -1}, "--max-new-tokens is -1"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(engine, settings, message: str):
    with pytest.raises(UserError, match=message):
        engine.stream("the", **settings)
    with pytest.raises(UserError, match=message):
        engine.generate(["the"], **settings)


def test_bad_prompts_are_refused(engine, model, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"prompt has 65 tokens and the model's context 64"):
        engine.stream([5] * 64)
    with pytest.raises(UserError, match="token 304 is outside the vocabulary, 0 to 303"):
        engine.generate([[5, 304]])
    with pytest.raises(UserError, match="2 seeds for 1 texts"):
        engine.generate(["the"], seed=[1, 2])
    other = type(tokenizer).train(["some other text of few words"] * 4, tmp_path / "t.model", vocab_size=275)
    with pytest.raises(UserError, match="model has 304 tokens and the tokenizer 275"):
        Llama(model, other)


@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "context=2,tensor=2,data=2"])
def test_a_mesh_changes_nothing(model, tokenizer, layout: str):
    """Three prompts, which do not divide over these meshes."""
    sharded = jax.device_put(model, shardings(model.config, make_mesh(layout)))
    alone = Llama(model, tokenizer).generate(PROMPTS[:3], seed=9, **WARM)
    meshed = Llama(sharded, tokenizer).generate(PROMPTS[:3], seed=9, **WARM)
    assert [c.ids for c in meshed] == [c.ids for c in alone]
    for a, b in zip(meshed, alone, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    with jax.set_mesh(make_mesh(layout)):  # as in a training loop
        assert "".join(Llama(sharded, tokenizer).stream(PROMPTS[0], seed=9, **WARM)) == meshed[0].text


@pytest.mark.parametrize("layout", [None, "data=2,fsdp=2,tensor=2"], ids=["one device", "mesh"])
def test_samples_of_one_reading_are_those_of_a_reading_each(model, tokenizer, engine, layout):
    """Of three prompts of unequal length, which do not divide over the mesh either; seeds are one for all, or each its own."""
    sharded = jax.device_put(model, shardings(model.config, make_mesh(layout))) if layout else model
    copied = [prompt for prompt in PROMPTS[1:] for _ in range(5)]
    settings = WARM | {"top_p": 1.0}  # a token at the edge of the support is in or out by a rounding
    for seed in (9, list(range(20, 35))):
        apart = engine.generate(copied, seed=seed, **settings)
        together = Llama(sharded, tokenizer).generate(PROMPTS[1:], seed=seed, samples=5, **settings)
        assert [c.ids for c in together] == [c.ids for c in apart] and len({c.text for c in apart}) == 15
        for a, b in zip(together, apart, strict=True):
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_a_prompt_is_read_once_for_all_its_samples(engine, monkeypatch):
    read = []
    monkeypatch.setattr(
        llama_module, "prefill", lambda model, tokens, *rest: read.append(tokens.shape) or prefill(model, tokens, *rest)
    )
    assert len(engine.generate(PROMPTS[:2], samples=6, max_new_tokens=3)) == 12
    assert read == [(2, 16)]
    assert len(engine.generate(PROMPTS[:2], samples=6, max_new_tokens=0)) == 12
    with pytest.raises(UserError, match="samples is 0; it must be 1 or more"):
        engine.generate(PROMPTS, samples=0)


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_loaded_is_taken_apart_and_nothing_is_left_twice(shared, monkeypatch, int8):
    """A 7B in 8 bits would else take most of a T4 twice over."""
    stacked = []

    def taken(model, **settings):
        stacked.extend(jax.tree.leaves(model.layers))
        return layers_apart(model, **settings)

    monkeypatch.setattr(llama_module, "layers_apart", taken)
    llama = Llama.load(shared / FOLDER, int8=int8)
    assert len(llama.model.layers) == 5 and stacked and all(leaf.is_deleted() for leaf in stacked)
    assert llama.generate(["Once"], temperature=0, max_new_tokens=4)[0].text


def test_weights_are_cast_once(model, tokenizer):
    same = Llama(model, tokenizer).model
    assert same.embedding_VD is model.embedding_VD and same.head_DV is model.head_DV
    # On a single CPU each layer's weights are arrays of their own.
    assert len(same.layers) == 2 and np.array_equal(same.layers[1].wq_DNH, model.layers.wq_DNH[1])
    half = Llama(model, tokenizer, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.model)} == {jnp.dtype(jnp.bfloat16)}
    assert len(half.generate([""], temperature=0, max_new_tokens=8)[0].ids) == 8
