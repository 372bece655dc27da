"""Choices of one prompt, scored from one reading of it, against a text for each and against numbers of choices and devices."""

import jax
import pytest

from llama_jax.generation import choices as choices_module
from llama_jax.generation import llama as llama_module
from llama_jax.generation.choices import score_choices
from llama_jax.generation.llama import Llama
from llama_jax.model.transformer import shardings
from llama_jax.parallel.mesh import make_mesh

PROMPTS = [[1, 5, 9, 12, 4, 7], [1], [1, *range(3, 60)], [1, 8, 8], [1, 5, 9, 12, 4, 7, 3]]
CHOICES = [
    [[5], [6, 7, 8], [9, 9]],  # of one token, of several
    [[3, 4], [4, 3]],
    [[11, 12, 13, 14, 15], [7], [7]],
    [[4, 5, 6]],  # one alone: a text of its own
    [[5, 3, 9, 4, 5, 6], [6]],  # too long to share a reading, as `few_tokens` has it
]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(choices_module, "CHOICE_TOKENS", 5)


@pytest.fixture(scope="module")
def llama(model, tokenizer) -> Llama:
    return Llama(model, tokenizer, "float32")


@pytest.fixture(scope="module")
def alone(llama) -> list:
    return [llama.score([(prompt, choice) for choice in of]) for prompt, of in zip(PROMPTS, CHOICES, strict=True)]


def assert_same(got, want) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert [score.log_prob for score in ours] == pytest.approx([score.log_prob for score in theirs], abs=1e-4)
        assert [score[1:] for score in ours] == [score[1:] for score in theirs]


def test_a_choice_scores_as_behind_its_prompt_alone(llama, alone):
    assert_same(score_choices(llama, PROMPTS, CHOICES), alone)


def test_what_shares_a_batch_changes_nothing(llama, alone):
    order = [4, 2, 0, 3, 1]
    told = {}
    got = score_choices(
        llama, [PROMPTS[i] for i in order], [CHOICES[i] for i in order], batch_tokens=1, on_score=told.__setitem__
    )
    assert_same([got[order.index(i)] for i in range(5)], alone)
    assert [told[place] for place in range(5)] == got


def test_a_prompt_is_read_once_for_its_choices(llama, monkeypatch):
    read = []
    monkeypatch.setattr(
        Llama,
        "read",
        lambda self, prompts, *rest, old=Llama.read: read.append(len(prompts)) or old(self, prompts, *rest),
    )
    score_choices(llama, PROMPTS[:1], [[[3, 4], [4], [5, 6], [7]]])
    assert read == [1]


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_what_all_prompts_begin_with_is_read_once(model, tokenizer, llama, mesh, monkeypatch):
    """Examples before each question: the same scores, and fewer tokens read."""
    sharded = (
        llama if mesh is None else Llama(jax.device_put(model, shardings(model.config, make_mesh(mesh))), tokenizer)
    )
    examples = [1, *(3 + i % 9 for i in range(30))]
    prompts = [[*examples, *end] for end in ([4, 5], [], [4, 9, 9], [6], [5, 5], [8], [3, 9], [10])]
    choices = [[[5, 6], [7]]] * 8
    apart = score_choices(sharded, prompts, choices)
    read = []

    def counted(model, tokens_BT, *rest):
        read.append(tokens_BT.shape)
        return prefill(model, tokens_BT, *rest)

    prefill = llama_module.prefill
    monkeypatch.setattr(llama_module, "prefill", counted)
    monkeypatch.setattr(llama_module, "SHARED_TOKENS", 20)
    assert_same(score_choices(sharded, prompts, choices), apart)
    assert read == [(1 if mesh is None else 4, 32), (8, 16)]


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2"])
def test_a_mesh_changes_nothing(model, tokenizer, alone, mesh):
    sharded = Llama(jax.device_put(model, shardings(model.config, make_mesh(mesh))), tokenizer, "float32")
    assert_same(score_choices(sharded, PROMPTS, CHOICES), alone)


def test_a_first_token_scored_from_the_wrong_place_is_seen(llama, alone, monkeypatch):
    """The mistake this is to catch: a choice that is scored one token late."""
    right = choices_module._first_tokens
    monkeypatch.setattr(choices_module, "_first_tokens", lambda logits, token: right(logits[:, ::-1], token))
    with pytest.raises(AssertionError):
        assert_same(score_choices(llama, PROMPTS, CHOICES), alone)
