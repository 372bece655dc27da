"""The model's side of the safety benchmarks, on a small model with random weights."""

import dataclasses

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.safety_config import Decoding
from llama_jax.evaluation.safety_model import SafetyModel, make_safety_model
from llama_jax.generation.llama import Completion, Llama
from llama_jax.text.chat import Llama2Chat, Message
from tests.tiny_checkpoint import write_tiny_checkpoint

TEXTS = ["The people are many and the people are good.", "Why is the sky blue? It is not known.", "A: no. Q: what?"]
CONTEXT = 64


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    return Llama.load(write_tiny_checkpoint(folder, TEXTS * 20, vocab_size=300, context=CONTEXT))


def made(llama: Llama, decoding: Decoding) -> SafetyModel:
    return make_safety_model(llama, "tiny", is_chat=False, template=Llama2Chat(), decoding=decoding)


def test_a_prompts_seed_is_its_own_and_long_prompts_lose_their_beginning(llama, monkeypatch):
    asked = []

    def generate(prompts, **settings):
        asked.append((prompts, settings))
        return [Completion(f"{len(ids)}", ids, [], "eos") for ids in prompts]

    monkeypatch.setattr(llama, "generate", generate)
    decoding = Decoding(max_new_tokens=8, max_answer_tokens=12)
    model, one, two, long = made(llama, decoding), "The people are", "Why is the sky", "sky " * 60 + "The people are"
    assert model.generate([one, long, two])[1] == str(CONTEXT - 8 - 1)  # with BOS before them and 8 behind
    assert (model.count_cut([one, long, two]), model.count_cut([one])) == (1, 0)
    model.generate([two, one])
    made(llama, dataclasses.replace(decoding, seed=1)).generate([one])
    (first, settings), (turned, others), (_, reseeded) = asked
    assert first[0] == llama.tokenizer.encode(one, bos=False) == turned[1]
    assert first[1] == llama.tokenizer.encode(long, bos=False)[-(CONTEXT - 9) :]
    assert settings["seed"][::2] == others["seed"][::-1] and len({*settings["seed"], *reseeded["seed"]}) == 4
    assert {name: settings[name] for name in ("temperature", "top_p", "max_new_tokens")} == {
        "temperature": 0.1,
        "top_p": 0.9,
        "max_new_tokens": 8,
    }
    assert model.has_room((Message("user", "Why?"),)) and not model.has_room((Message("user", "Why? " * 30),))
    assert model.answer([(Message("user", "Why?"),)])[0].isdigit() and asked[-1][1]["max_new_tokens"] == 12
    with pytest.raises(UserError, match="--safety.decoding.max-new-tokens 64 leaves no room"):
        made(llama, Decoding()).generate(["a"])


def test_log_probabilities_are_those_of_score_and_too_long_pairs_keep_their_end(llama):
    model = made(llama, Decoding(max_new_tokens=8))
    pairs = [
        ("The people are many and the people are many and the people are", " good."),
        ("Why is the sky blue? Q: why is the sky?\nA:", " It is not known."),
        ("The people are many and the people are many and the people ", "are many."),
    ]
    behind, said = "sky " * 60 + "Why is the sky", " blue?"
    whole, before = (llama.tokenizer.encode(text, bos=False) for text in (behind + said, behind))
    tail = whole[-CONTEXT : len(before)], whole[len(before) :]
    prompts, texts = map(list, zip(*pairs, (behind, said), strict=True))
    alike = [
        (llama.tokenizer.encode(p.rstrip(), bos=False), llama.tokenizer.encode(p + c, bos=False)) for p, c in pairs
    ]
    assert all(len(joined) > 32 for _, joined in alike)  # so that all are of one shape, and one program is compiled
    expected = llama.score([*((start, joined[len(start) :]) for start, joined in alike), tail])
    assert model.log_probs(prompts, texts) == [score.log_prob for score in expected]
    assert len(whole) > CONTEXT and model.count_cut_pairs(prompts, texts) == 1
    assert [llama._pair_ids(pair) for pair in pairs] == [([1, *joined], 1 + len(start)) for start, joined in alike]
    with pytest.raises(UserError, match="an answer has .* tokens and the model's context 64"):
        model.log_probs(["Why"], [" sky" * 80])
