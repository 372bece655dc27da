"""Rollouts: what a prompt draws is its own, comes with the trainer's own log-probabilities, and waits for nobody."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute, LlamaConfig
from llama_jax.errors import UserError
from llama_jax.generation import rollouts as rollouts_module
from llama_jax.generation.llama import Llama
from llama_jax.generation.rollouts import _idle, _put, make_gather, sample_rollouts
from llama_jax.generation.sampler import NO_TOKEN, decode
from llama_jax.model.transformer import layers_apart
from llama_jax.training.experience import make_answers
from llama_jax.training.ppo_loss import policy_log_probs

TEXTS = [
    "the cat sat",
    "who",
    "",
    "the dog sat by the door and the cat on the mat",
    "so",
    "that",
    "could",
    "by the mat",
]
SEEDS = [5, 6, 7, 8, 9, 10, 11, 12]
WARM = {"temperature": 0.9, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def ending(model, tokenizer):
    """The model with a louder EOS, so that answers end, and at very different lengths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: w.at[:, tokenizer.eos_id].multiply(3) if jax.tree_util.keystr(path) == ".head_DV" else w, model
    )


@pytest.fixture(scope="module")
def llama(ending, tokenizer) -> Llama:
    return Llama(ending, tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def drawn(llama, prompts):
    """All eight rows at once."""
    return sample_rollouts(llama, prompts, seeds=SEEDS, rows=8, **WARM)


def test_answers_are_those_of_generate(llama, prompts, drawn, tokenizer):
    """Which draws from the same distribution with the same keys, but hides the EOS."""
    completions = llama.generate(prompts, seed=SEEDS, top_p=1.0, **WARM)
    assert {one.finish_reason for one in completions} == {"eos", "length"}
    for one, completion in zip(drawn, completions, strict=True):
        assert one.ended == (completion.finish_reason == "eos")
        assert one.ids == completion.ids + [tokenizer.eos_id] * one.ended
        np.testing.assert_allclose(one.log_probs[: len(completion.ids)], completion.log_probs, atol=1e-5)


@pytest.mark.parametrize(("rows", "order"), [(2, 1), (3, -1)])
def test_an_answer_depends_on_its_prompt_and_seed_alone(llama, prompts, drawn, rows: int, order: int):
    others = sample_rollouts(llama, prompts[::order], seeds=SEEDS[::order], rows=rows, **WARM)[::order]
    assert [one.ids for one in others] == [one.ids for one in drawn]
    for one, other in zip(drawn, others, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_every_token_is_drawn_with_bits_of_its_own(model, tokenizer, prompts):
    """From a distribution that is flat: with the same bits at every place, an answer would be one token again and again."""
    flat = jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.zeros_like(w) if jax.tree_util.keystr(path) == ".head_DV" else w, model
    )
    rows = sample_rollouts(
        Llama(flat, tokenizer), [prompts[0]] * 40, seeds=range(40), rows=40, temperature=1.0, max_new_tokens=24
    )
    before, after = np.concatenate([(one.ids[:-1], one.ids[1:]) for one in rows], axis=1)
    again, expected = int((before == after).sum()), len(before) / tokenizer.vocab_size
    assert again < expected + 5 * expected**0.5, f"{again} tokens are the one before again; {expected:.1f} are expected"
    assert abs(np.corrcoef(before, after)[0, 1]) < 5 / len(before) ** 0.5


def test_seeds_tell_answers_apart_and_repeat_them(llama, prompts):
    seeds = [1, 2, 1, 3]
    drawn = [one.ids for one in sample_rollouts(llama, [prompts[0]] * 4, seeds=seeds, rows=3, **WARM)]
    assert drawn[0] == drawn[2] and len({*map(tuple, drawn)}) == 3
    assert drawn == [one.ids for one in sample_rollouts(llama, [prompts[0]] * 4, seeds=seeds, rows=3, **WARM)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probabilities_are_the_trainers(llama, ending, prompts, temperature: float, tokenizer):
    """Of a forward pass over prompt and answer, padded; EOS counts as any drawn token."""
    drawn = sample_rollouts(llama, prompts, seeds=SEEDS, rows=3, **WARM | {"temperature": temperature})
    assert any(one.ended for one in drawn)
    answers = make_answers(prompts, [one.ids for one in drawn], 64)
    compute = Compute(dtype="float32", remat="none")
    forward = jax.jit(lambda model, a: policy_log_probs(model, a.tokens_BT, a.targets_BT, temperature, compute)[0])
    for want_T, mask_T, one in zip(forward(ending, answers), answers.answer_mask_BT, drawn, strict=True):
        np.testing.assert_allclose(one.log_probs, want_T[mask_T], atol=1e-5)


def test_what_was_drawn_is_not_rewritten(drawn, tokenizer):
    """EOS ends an answer and stands nowhere else; a cut answer gets none."""
    assert {one.ended for one in drawn} == {True, False}
    for one in drawn:
        assert len(one.ids) == len(one.log_probs) and (one.ended or len(one.ids) == WARM["max_new_tokens"])
        assert [token == tokenizer.eos_id for token in one.ids] == [False] * (len(one.ids) - 1) + [one.ended]


def test_an_answer_of_eos_alone_and_of_one_token(speller, tokenizer, llama, prompts, drawn):
    """What ends with its first token never decodes, and its row is free at once."""
    ends = Llama(speller([tokenizer.eos_id]), tokenizer)
    one = sample_rollouts(ends, [[tokenizer.bos_id]] * 5, seeds=SEEDS[:5], rows=2, **WARM)
    assert [(o.ids, o.ended) for o in one] == [([tokenizer.eos_id], True)] * 5
    short = sample_rollouts(llama, prompts, seeds=SEEDS, rows=3, **WARM | {"max_new_tokens": 1})
    assert [o.ids for o in short] == [o.ids[:1] for o in drawn]


def test_a_long_answer_holds_nobody_up(llama, prompts, monkeypatch):
    """Steps are no more than those of rows that are never idle, and those of the longest answer behind them."""
    taken = []

    def counted(*args):
        state, tokens_BT, log_probs_BT = decode(*args)
        taken.append(int((np.asarray(tokens_BT) != NO_TOKEN).any(0).sum()))
        return state, tokens_BT, log_probs_BT

    monkeypatch.setattr(rollouts_module, "decode", counted)
    many, rows = [prompts[n % 8] for n in range(32)], 4
    lengths = [len(one.ids) for one in sample_rollouts(llama, many, seeds=range(32), rows=rows, **WARM)]
    batches = sum(max(lengths[start : start + rows]) for start in range(0, 32, rows))
    # A row's first token is drawn where its prompt is read.
    bound = sum(length - 1 for length in lengths) / rows + max(lengths)
    assert sum(taken) <= bound < 0.9 * batches


def test_refills_wait_for_a_quarter_of_the_rows(llama, prompts, monkeypatch):
    read = []
    monkeypatch.setattr(
        llama, "read", lambda ids, room: read.append(sum(map(bool, ids))) or Llama.read(llama, ids, room)
    )
    sample_rollouts(llama, [prompts[n % 8] for n in range(24)], seeds=range(24), rows=8, **WARM)
    assert sum(read) == 24 and read[:4] == [2, 2, 2, 2] and sum(n == 2 for n in read) >= 10


def test_another_iteration_compiles_nothing(ending, prompts, tokenizer, caplog):
    """Other weights, other prompts of as many tokens or fewer, other seeds and another temperature."""
    gather = make_gather(ending, "float32")

    def iterate(scale: float, texts: list[list[int]], seeds: range, temperature: float) -> None:
        model = jax.tree.map(lambda w: w * np.float32(scale), ending)
        caplog.clear()
        with jax.log_compiles():
            sample_rollouts(
                Llama(gather(model), tokenizer, "float32"),
                texts,
                seeds=seeds,
                max_new_tokens=20,
                temperature=temperature,
                rows=5,
                slots=60,
            )

    iterate(1.0, prompts, range(8), 1.0)
    assert "Compiling" in caplog.text
    iterate(1.01, prompts[::-1], range(8, 16), 0.7)
    assert "Compiling" not in caplog.text


def test_gathered_weights_are_cast_and_apart_and_stay_on_a_single_device(ending):
    half = make_gather(ending, "bfloat16")(ending)
    for got, weight in zip(jax.tree.leaves(half), jax.tree.leaves(layers_apart(ending)), strict=True):
        assert got.dtype == jnp.bfloat16 and got.sharding == weight.sharding
        assert np.array_equal(got, weight.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_new_tokens": 45},
            r"20 tokens and --max-new-tokens 45 do not fit in 64 tokens \(the model's context is 64\)",
        ),
        ({"slots": 32}, "do not fit in 32 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0 and rows 64; both must be 1 or more"),
        ({"rows": 0}, "rows 0"),
        ({"temperature": 0.0}, "--temperature is 0.0; it must be above 0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"seeds": [1, 2]}, "2 seeds for 8 prompts"),
    ],
)
def test_settings_out_of_range_are_refused(llama, prompts, settings, message: str):
    with pytest.raises(UserError, match=message):
        sample_rollouts(llama, prompts, **{"seeds": SEEDS, "max_new_tokens": 20, **settings})


def test_bad_prompts_are_refused_and_none_is_none(llama):
    for ids in ([], [1, 304], [-1]):
        with pytest.raises(UserError, match="outside the vocabulary, 0 to 303"):
            sample_rollouts(llama, [ids], seeds=[0], max_new_tokens=2)
    assert sample_rollouts(llama, [], seeds=[], max_new_tokens=2) == []


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
def test_a_refill_holds_one_cache_only(apart: bool):
    """The rows go into the cache in place: nothing of its size is among the temporaries."""
    config = LlamaConfig(8, 4, 2, 2, 8, vocab_size=16, head_dim=32, context_length=1024)
    state = _idle(config, 8, 1024, jnp.dtype("float32"), apart)
    size = sum(buffer.nbytes for buffer in jax.tree.leaves(state.cache[:2]))
    new = _idle(config, 2, 64, jnp.dtype("float32"), apart)
    memory = _put.lower(state, new, jnp.zeros(2, jnp.int32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size / 100
