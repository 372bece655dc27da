"""A conversation: each answer is a fresh generation from the whole of it, in exactly the reference's ids, whatever happens in between."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.generation import llama as generation
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import prefill
from llama_jax.generation.session import Chat, spoken
from llama_jax.text.chat import Llama2Chat, Message, Plain
from tests.generation.scripted import ScriptedLlama
from tests.parity.numpy_llama import random_weights, to_ours

TAGS = Llama2Chat().tags


def make_engine(tokenizer, context_length: int) -> Llama:
    """Random weights, every token depending on all before it."""
    config = LlamaConfig(
        dim=48,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=80,
        vocab_size=tokenizer.vocab_size,
        head_dim=12,
        context_length=context_length,
    )
    return Llama(to_ours(random_weights(config, seed=0), config), tokenizer)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Llama:
    """A context that holds several turns with their tags, which are bytes to this tokenizer."""
    return make_engine(tokenizer, context_length=160)


@pytest.fixture
def scripted(tokenizer):
    """Makes a conversation with a script of answers; strings are answers of one piece."""

    def make(*answers, context_length: int = 4096, **options) -> Chat:
        pieces = [[answer] if isinstance(answer, str) else answer for answer in answers]
        return Chat(ScriptedLlama(tokenizer, pieces, context_length), options.pop("template", Llama2Chat()), **options)

    return make


def reference_ids(tokenizer, system: str | None, *said: str) -> list[int]:
    """The reference's prompt from its description; `said` are questions and answers in turn, the last a question."""
    said = list(map(str.strip, said))
    if system:
        said[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{said[0]}"
    ids = []
    for question, answer in zip(said[:-1:2], said[1::2], strict=True):
        ids += tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"[INST] {said[-1]} [/INST]", bos=True)


def said_of(history) -> list[str]:
    return [message.content for message in history]


def test_each_answer_is_a_fresh_generation_of_the_whole(engine):
    chat = engine.chat("be brief", temperature=0, max_new_tokens=8)
    said, answers = [], []
    for question in ("the cat", "who sat", "by the door"):
        said.append(question)
        prompt = reference_ids(engine.tokenizer, "be brief", *said)
        fresh = "".join(engine.stream(prompt, temperature=0, max_new_tokens=8)).strip()
        answers.append(chat.send(question))
        assert answers[-1] == fresh
        said.append(fresh)
    assert len(set(answers)) > 1 and chat.forgotten == 0  # not always the same, so that the turns do matter


def test_what_was_said_is_not_read_again_and_changes_no_answer(tokenizer, monkeypatch):
    """Whatever happens between two answers: a stop in the middle of one, another try, another system prompt, a new talk."""
    engine, settings, read = make_engine(tokenizer, context_length=384), {"temperature": 0, "max_new_tokens": 12}, []

    def counting(model, tokens_BT, count_B, cache):
        read.append(int(count_B[0]))
        return prefill(model, tokens_BT, count_B, cache)

    monkeypatch.setattr(generation, "prefill", counting)
    chat, before = engine.chat("be brief", **settings), []

    def ask(question: str) -> None:
        """The answer is a fresh one, and nothing is read that the last prompt and this one begin with."""
        nonlocal before
        said = [*said_of(chat.history)[bool(chat.system) :], question]
        prompt = reference_ids(tokenizer, chat.system, *said)
        fresh = "".join(engine.stream(prompt, **settings)).strip()
        read.clear()
        assert chat.send(question) == fresh
        same = next((n for n, pair in enumerate(zip(before, prompt, strict=False)) if len(set(pair)) > 1), len(before))
        assert 0 < sum(read) <= len(prompt) - same
        before = prompt

    ask("the cat")
    ask("who sat")
    stopped = chat.stream("by the door")
    assert next(stopped)
    stopped.close()
    ask("on the mat")
    last = chat.history[-1].content
    read.clear()
    assert chat.regenerate() == last and read == [1]
    chat.system = "be long"
    ask("so")
    chat.reset()
    ask("the dog")
    chat.system = None
    ask("the dog")


@pytest.mark.parametrize("system", [None, "be brief"])
def test_the_model_gets_the_reference_ids(scripted, tokenizer, system):
    chat = scripted(" the cat ", "the  dog", "", " mat", system=system)
    said = []
    for question, answer in (("who?", "the cat"), (" where? ", "the  dog"), ("and?", ""), ("?", "mat")):
        assert chat.send(question) == answer
        said += [question, answer]
        assert chat.llama.prompts[-1] == reference_ids(tokenizer, system, *said[:-1])
    expected = [Message("system", system)] * bool(system)
    expected += [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    assert chat.history == tuple(expected)


def test_a_plain_conversation_has_no_tags(scripted, tokenizer):
    chat = scripted("the cat", "mat", template=Plain())
    chat.send("who?")
    chat.send("where?")
    pair = tokenizer.encode("who?\nthe cat", bos=True, eos=True)
    assert chat.llama.prompts[-1] == pair + tokenizer.encode("where?\n", bos=True)


def test_a_streamed_answer_is_the_sent_one(engine):
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 3}
    streamed, sent = engine.chat(**settings), engine.chat(**settings)
    for question in ("the cat", "who"):
        pieces = list(streamed.stream(question))
        assert len(pieces) > 2 and "".join(pieces) == sent.send(question)
    assert streamed.history == sent.history


def test_another_answer_replaces_the_last(scripted, tokenizer):
    chat = scripted("one", "two", "three", "four", system="be brief")
    chat.send("a?")
    chat.send("b?")
    assert chat.regenerate() == "three"
    assert said_of(chat.history) == ["be brief", "a?", "one", "b?", "three"]
    assert chat.llama.prompts[2] == chat.llama.prompts[1]
    assert len(set(chat.llama.seeds)) == 3  # else the draw would be the same again
    chat.send("c?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, "be brief", "a?", "one", "b?", "three", "c?")


def test_the_old_answer_stays_until_the_new_one_speaks(scripted):
    chat = scripted("one", "two")
    chat.send("a?")
    pieces = chat.stream_again()
    assert said_of(chat.history) == ["a?", "one"]
    next(pieces)
    assert said_of(chat.history) == ["a?", "two"]


def test_there_is_nothing_to_answer_again_at_first(scripted):
    with pytest.raises(UserError, match="say something first"):
        scripted().regenerate()


def test_the_seed_decides(engine):
    def answers(seed: int) -> list[str]:
        chat = engine.chat(temperature=1.0, top_p=1.0, max_new_tokens=8, seed=seed)
        return [chat.send("the cat"), chat.regenerate()]

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 2


def test_reset_keeps_the_system_prompt_alone(scripted, tokenizer):
    chat = scripted("one", "two", system="be brief")
    chat.send("a?")
    chat.reset()
    assert said_of(chat.history) == ["be brief"] and chat.context == (0, 4096)
    chat.send("b?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, "be brief", "b?")


def test_the_system_prompt_can_be_changed_between_answers(scripted, tokenizer):
    chat = scripted("one", "two", "three", system="be brief")
    chat.send("a?")
    chat.system = "be long"
    chat.send("b?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, "be long", "a?", "one", "b?")
    chat.system = ""
    chat.send("c?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, None, "a?", "one", "b?", "two", "c?")


@pytest.mark.parametrize("system", [None, "be brief"])
def test_the_oldest_turns_are_forgotten_first(scripted, tokenizer, system):
    """Each prompt is the longest tail of the conversation that leaves 30 of 120 tokens free, after the system prompt."""
    chat = scripted(*["the cat sat"] * 8, context_length=120, system=system)
    said, forgotten = [], []
    for i in range(8):
        said.append(f"who sat {i}")
        chat.send(said[-1])
        tails = [reference_ids(tokenizer, system, *said[2 * n :]) for n in range(i + 1)]
        fitting = [n for n, ids in enumerate(tails) if len(ids) <= 90]
        assert chat.forgotten == fitting[0] and chat.llama.prompts[-1] == tails[fitting[0]]
        forgotten.append(chat.forgotten)
        said.append("the cat sat")
    assert forgotten == sorted(forgotten) and forgotten[0] == 0 and forgotten[-1] > 3
    assert said_of(chat.history) == [system] * bool(system) + said  # what is forgotten can still be read and saved
    assert chat.context[0] < 120


def test_a_short_answer_needs_less_room(scripted):
    forgotten = {}
    for room in (1, None):
        chat = scripted(*["the cat sat"] * 4, context_length=120, max_new_tokens=room)
        for _ in range(4):
            chat.send("who sat")
        forgotten[room] = chat.forgotten
    assert forgotten[1] < forgotten[None]


def test_a_message_beyond_the_context_changes_nothing(scripted):
    chat = scripted("one", "two", context_length=100, system="be brief")
    chat.send("a?")
    before = chat.history, chat.forgotten
    with pytest.raises(UserError, match=r"and the system prompt take \d+ tokens.* context of 100.* shorten"):
        chat.send("\N{SNOWMAN}" * 30)
    assert (chat.history, chat.forgotten) == before
    assert chat.send("b?") == "two"


@pytest.mark.parametrize("tag", TAGS)
def test_tags_are_refused(scripted, tag):
    chat = scripted("one")
    with pytest.raises(UserError, match="chat format"):
        chat.stream(f"end {tag} now")  # at once, before anything is read
    with pytest.raises(UserError, match="chat format"):
        chat.system = tag
    with pytest.raises(UserError, match="chat format"):
        scripted(system=tag)
    assert chat.history == () and chat.llama.prompts == []
    assert chat.send("a?") == "one"


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"top_p": 2}, {"top_k": -1}, {"max_new_tokens": -1}])
def test_wrong_settings_are_refused_at_once(engine, setting):
    with pytest.raises(UserError, match="--" + next(iter(setting)).replace("_", "-")):
        engine.chat(**setting)


def test_the_users_turn_is_not_the_models_to_take(scripted, tokenizer):
    chat = scripted(["the", " cat [IN", "ST] who?", " [/INST]"], "mat")
    assert chat.send("a?") == "the cat"
    chat.send("b?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, None, "a?", "the cat", "b?")


def test_an_interrupted_answer_stays_as_far_as_it_came(scripted, tokenizer):
    chat = scripted(["the", " cat", " sat"], "mat")
    pieces = chat.stream("who?")
    assert [next(pieces), next(pieces)] == ["the", " cat"]
    pieces.close()
    assert said_of(chat.history) == ["who?", "the cat"]
    chat.send("b?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, None, "who?", "the cat", "b?")


def test_an_interrupt_inside_the_model_leaves_what_was_said(scripted):
    def interrupted():
        yield "the"
        raise KeyboardInterrupt

    chat = scripted(interrupted(), "mat")
    with pytest.raises(KeyboardInterrupt):
        chat.send("who?")
    assert said_of(chat.history) == ["who?", "the"]
    assert chat.send("b?") == "mat"


def test_a_question_without_a_word_of_answer_is_taken_back(scripted, tokenizer):
    chat = scripted(["the", " cat"], "mat")
    chat.stream("who?").close()
    assert chat.history == ()
    chat.send("b?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, None, "b?")


def test_what_a_question_drove_out_comes_back_with_it_gone(scripted, tokenizer):
    chat = scripted("one", "two", "three", context_length=120)
    chat.send("a?")
    chat.stream("\N{SNOWMAN}" * 20).close()
    assert len(chat.llama.prompts[-1]) > 60 and chat.forgotten == 0
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, None, "\N{SNOWMAN}" * 20)
    chat.send("b?")
    assert chat.llama.prompts[-1] == reference_ids(tokenizer, None, "a?", "one", "b?")


def test_an_old_answer_does_not_come_into_a_new_conversation(scripted):
    chat = scripted(["the", " cat"], "mat")
    pieces = chat.stream("who?")
    next(pieces)
    chat.reset()
    assert list(pieces) == [" cat"]
    assert chat.history == ()


def test_a_saved_conversation_goes_on_as_it_would_have(engine, tmp_path):
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 5}
    chat = engine.chat("be brief", **settings)
    for question in ("the cat \N{LLAMA}", "who", "the dog", "sat", "by the door"):
        chat.send(question)
    assert chat.forgotten > 0
    chat.save(tmp_path / "talk.json")
    other = engine.chat("another", **settings)
    other.send("something else")
    other.load(tmp_path / "talk.json")
    assert (other.history, other.forgotten, other.context) == (chat.history, chat.forgotten, chat.context)
    assert other.send("and the mat") == chat.send("and the mat")
    assert other.history == chat.history


def test_a_saved_conversation_is_a_line_of_training_data(scripted, tmp_path):
    chat = scripted("one", system="be brief")
    chat.send("a\nb \N{LLAMA}")
    chat.save(tmp_path / "talk.json")
    (line,) = (tmp_path / "talk.json").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb \N{LLAMA}"},
        {"role": "assistant", "content": "one"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no conversation"),
        (b"\xff", "no conversation"),
        (b"[]", "no conversation"),
        (b'{"messages": [{"role": "user"}]}', "no conversation"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "no conversation"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "no conversation"),
        (b'{"messages": [], "answers_drawn": -1}', "no conversation"),
        (b'{"messages": [], "answers_drawn": "a"}', "no conversation"),
        (b'{"messages": [{"role": "user", "content": "a?"}]}', "roles"),
        (b'{"messages": [{"role": "user", "content": "[INST]"}, {"role": "assistant", "content": ""}]}', "chat format"),
        (None, "No such file"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(scripted, tmp_path, content, message):
    chat = scripted("one", system="be brief")
    chat.send("a?")
    before = chat.history
    if content is not None:
        (tmp_path / "talk.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        chat.load(tmp_path / "talk.json")
    assert chat.history == before


def test_a_place_that_cannot_be_written_is_bad_input(scripted, tmp_path):
    with pytest.raises(UserError, match="cannot write the conversation"):
        scripted().save(tmp_path / "none" / "talk.json")


@given(
    st.lists(st.sampled_from(["[", "[INST", "]", "[INST]", "[/INST]", "<<", "<</", "SYS>>", " ", "\n", "\u3000", "a"])),
    st.integers(1, 5),
)
def test_spoken_text_does_not_depend_on_the_pieces(parts, size):
    text = "".join(parts)
    expected = text[: min((text.find(tag) for tag in TAGS if tag in text), default=len(text))].strip()
    pieces = list(spoken((text[i : i + size] for i in range(0, len(text), size)), TAGS))
    assert "".join(pieces) == expected and all(pieces)


def test_pieces_do_not_wait_longer_than_they_must():
    given_out = []

    def pieces():
        for piece, before in (("the", ""), (" ", "the"), ("cat", "the"), (" [", "the cat"), ("a", "the cat")):
            assert "".join(given_out) == before
            yield piece

    for piece in spoken(pieces(), TAGS):
        given_out.append(piece)
    assert "".join(given_out) == "the cat [a"
