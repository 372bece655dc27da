"""The model's side of the safety benchmarks, on a small model with random weights."""

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.engine import Answers, Engine
from llama_jax.evaluation.safety_config import Decoding
from llama_jax.evaluation.safety_model import SafetyModel, make_safety_model
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to
from llama_jax.text.chat import Llama2Chat, Message
from tests.tiny_checkpoint import write_tiny_checkpoint

TEXTS = ["The people are many and the people are good.", "Why is the sky blue? It is not known.", "A: no. Q: what?"]
CONTEXT = 64


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    return Llama.load(write_tiny_checkpoint(folder, TEXTS * 20, vocab_size=300, context=CONTEXT))


def made(llama: Llama, decoding: Decoding) -> SafetyModel:
    engine = Engine(llama, Answers(None), rows=2, seed=5)
    return make_safety_model(engine, "tiny", is_chat=False, template=Llama2Chat(), decoding=decoding)


def test_greedy_continuations_and_answers_are_those_of_generate_and_of_a_conversation(llama):
    model = made(llama, Decoding(temperature=0, max_new_tokens=8, max_answer_tokens=12))
    texts = [*TEXTS, "The people are ", "Why is"]
    assert model.generate(texts, "x") == [one.text for one in llama.generate(texts, max_new_tokens=8, temperature=0)]
    dialogues = [(Message("user", text),) for text in ("Why?", "What is it?", "The people")]
    settings = {"max_new_tokens": 12, "temperature": 0, "seeds": [0] * 3}
    assert model.answer(dialogues, "x") == [one.text for one in reply_to(llama, dialogues, Llama2Chat(), **settings)]


def test_an_answer_ends_before_the_templates_first_tag_and_has_no_white_space_around_it(llama, monkeypatch):
    monkeypatch.setattr(Engine, "_text", lambda self, ids: " \n It is so. <<SYS>> [INST] And why?")
    assert made(llama, Decoding(max_answer_tokens=12)).answer([(Message("user", "Why?"),)], "x") == ["It is so."]


def test_long_prompts_lose_their_beginning_and_keep_bos(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(Engine, "complete", lambda _, ids, **more: asked.append((ids, more)) or [""] * len(ids))
    model, one = made(llama, Decoding(max_new_tokens=8, max_answer_tokens=12)), "The people are"
    long, encode = "sky " * 60 + one, llama.tokenizer.encode
    model.generate([one, long], "toxigen")
    (ids, settings), bos = asked[0], llama.tokenizer.bos_id
    assert ids == [encode(one), [bos, *encode(long, bos=False)[-(CONTEXT - 8 - 1) :]]]  # 8 have room behind it
    assert settings == {"max_new_tokens": 8, "sampling": (0.1, 0.9, 0), "what": "toxigen"}
    assert (model.count_cut([one, long, one]), model.count_cut([one]), model.seed) == (1, 0, 5)
    model.answer([(Message("user", "Why?"),)], "x")
    assert asked[1][1]["max_new_tokens"] == 12 and asked[1][1]["sampling"] == (0.1, 0.9, 0)
    assert model.has_room((Message("user", "Why?"),)) and not model.has_room((Message("user", "Why? " * 30),))
    with pytest.raises(UserError, match="--safety.decoding.max-new-tokens 64 leaves no room"):
        made(llama, Decoding()).generate(["a"], "x")


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
    expected = [score.log_prob for score in llama.score([*pairs, tail])]
    assert model.log_probs(prompts, texts, "x") == pytest.approx(expected, rel=1e-6)
    assert len(whole) > CONTEXT and model.count_cut_pairs(prompts, texts) == 1
    with pytest.raises(UserError, match="an answer has .* tokens and the model's context 64"):
        model.log_probs(["Why"], [" sky" * 80], "x")
