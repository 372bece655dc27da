"""Dialogues to ids: against the format written out by hand, Hugging Face's template, and the answers themselves."""

import functools
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text.chat import (
    DEFAULT_SYSTEM_PROMPT,
    BadDialogue,
    Encoded,
    Llama2Chat,
    Llama3Chat,
    Message,
    Plain,
    encode_dialogue,
    encode_prompt,
    shown,
    with_system,
)
from llama_jax.text.tokenizer import Tokenizer

SENTENCES = (
    "The quick brown fox jumped over 12345 lazy dogs.\n",
    "    def fox(dogs):\n        return dogs * 2  # [twice]\n",
    "[INST] what [/INST] is /INST and <<SYS>> for?\n",
    "吾輩は猫である。名前はまだ無い。\n",
)
LLAMA2 = Llama2Chat()
LLAMA3 = Llama3Chat(bos=1, start_header=401, end_header=402, end_of_turn=403)
PLAIN = Plain()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(SENTENCES * 20, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=400)


def random_text(rng: random.Random) -> str:
    """Words, code, spaces of every kind at either end, characters without a piece; pieces of tags, but no whole tag."""
    fragments = (
        *("fox", "dogs ", " lazy", "[", "]", "/INST", "INST]", "<<", ">>", "<s>", "</s>", "12345", "def", "  ", " "),
        *("\n", "\n\n", "\t", "\u00a0", "\u3000", "猫", "🦙", "é", "\u2581", "\u2581\u2581a", "", "."),
    )
    text = "".join(rng.choices(fragments, k=rng.randrange(8)))
    return text if not any(tag in text for tag in LLAMA2.tags) else "fox"


def random_dialogue(rng: random.Random) -> tuple[Message, ...]:
    messages = [Message("system", random_text(rng))] if rng.random() < 0.4 else []
    for _ in range(rng.randrange(1, 5)):
        messages += [Message("user", random_text(rng)), Message("assistant", random_text(rng))]
    return tuple(messages)


DIALOGUES = [random_dialogue(random.Random(seed)) for seed in range(500)]


def written_out(tokenizer, messages) -> list[int]:
    """Llama 2's format from its description: strings put together and encoded, each pair by itself."""
    turns = [[message.role, message.content] for message in messages]
    if turns[0][0] == "system":
        turns[1][1] = "<<SYS>>\n" + turns[0][1] + "\n<</SYS>>\n\n" + turns[1][1]
        del turns[0]
    ids = []
    for i in range(0, len(turns) - 1, 2):
        pair = f"[INST] {turns[i][1].strip()} [/INST] {turns[i + 1][1].strip()} "
        ids += tokenizer.encode(pair, bos=True, eos=True)
    if len(turns) % 2:
        ids += tokenizer.encode(f"[INST] {turns[-1][1].strip()} [/INST]", bos=True, eos=False)
    return ids


def trained_runs(encoded: Encoded) -> list[list[int]]:
    """The trained ids, one list for each unbroken run."""
    runs, before = [], False
    for i, trained in zip(*encoded, strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(i)
        before = trained
    return runs


def as_decoded(text: str) -> str:
    """What a text comes back as: U+2581 is SentencePiece's space."""
    return text.replace("\u2581", " ")


def decoded_within(tokenizer, ids: list[int]) -> str:
    """The text of ids that follow others: `decode` alone would take their leading space for the dummy one."""
    return tokenizer.decode(tokenizer.encode("x", bos=False) + ids)[1:]


def assert_llama2(tokenizer, messages, encoded: Encoded) -> None:
    """Every id is the reference's, and the trained ones are the answers, each with its EOS, and nothing else."""
    assert encoded.ids == written_out(tokenizer, messages)
    answers = [content for role, content in messages if role == "assistant"]
    runs = trained_runs(encoded)
    assert [run[-1] for run in runs] == [tokenizer.eos_id] * len(answers)
    assert [decoded_within(tokenizer, run) for run in runs] == [as_decoded(f" {answer.strip()} ") for answer in answers]
    assert encoded.ids.count(tokenizer.eos_id) == len(answers)


def test_llama2_ids_and_masks_of_random_dialogues(tokenizer):
    for messages in DIALOGUES:
        assert_llama2(tokenizer, messages, encode_dialogue(tokenizer, messages, LLAMA2))
        assert encode_prompt(tokenizer, messages[:-1], LLAMA2) == written_out(tokenizer, messages[:-1])


def shifted(encoded: Encoded) -> Encoded:
    return Encoded(encoded.ids, [False, *encoded.answer_mask[:-1]])


def without_eos(encoded: Encoded) -> Encoded:
    return Encoded(encoded.ids, [trained and i != 2 for i, trained in zip(*encoded, strict=True)])


def from_the_start(encoded: Encoded) -> Encoded:
    return Encoded(encoded.ids, [i != 1 for i in encoded.ids])


def one_early(encoded: Encoded) -> Encoded:
    mask = encoded.answer_mask
    return Encoded(encoded.ids, [a or b for a, b in zip(mask, [*mask[1:], False], strict=True)])


@pytest.mark.parametrize("mutant", [shifted, without_eos, from_the_start, one_early])
def test_wrong_masks_are_noticed(tokenizer, mutant):
    messages = (Message("system", "lazy"), Message("user", "what"), Message("assistant", "the quick fox"))
    encoded = encode_dialogue(tokenizer, messages, LLAMA2)
    assert_llama2(tokenizer, messages, encoded)
    with pytest.raises(AssertionError):
        assert_llama2(tokenizer, messages, mutant(encoded))


class WithoutTrailingSpace(Tokenizer):
    def encode_continued(self, text, continuation):
        return super().encode_continued(text, continuation.removesuffix(" "))


class AnswerApart(Tokenizer):
    def encode_continued(self, text, continuation):
        first = self.encode(text, bos=False)
        return first + self.encode(continuation, bos=False), len(first)


@pytest.mark.parametrize("mutant", [WithoutTrailingSpace, AnswerApart])
def test_wrong_ids_are_noticed(tokenizer, mutant):
    messages = (Message("user", "what"), Message("assistant", "the quick fox"))
    with pytest.raises(AssertionError):
        assert_llama2(tokenizer, messages, encode_dialogue(mutant(tokenizer.model_bytes), messages, LLAMA2))


@pytest.mark.parametrize("template", [LLAMA2, LLAMA3, PLAIN])
def test_training_goes_on_exactly_where_generation_begins(tokenizer, template):
    """Behind the ids of the prompt stands nothing but trained ids: all that the model has to write by itself."""
    for messages in DIALOGUES:
        ids, mask = encode_dialogue(tokenizer, messages, template)
        prompt = encode_prompt(tokenizer, messages[:-1], template)
        assert ids[: len(prompt)] == prompt
        assert not mask[len(prompt) - 1] and all(mask[len(prompt) :])
        assert len(mask) == len(ids)


@pytest.mark.parametrize("template", [LLAMA2, LLAMA3, PLAIN])
def test_the_last_answer_alone_is_all_that_follows_the_prompt_of_the_last_turn(tokenizer, template):
    """Whatever the turns before it hold, their answers are prompt to the last."""
    for messages in DIALOGUES:
        encoded = encode_dialogue(tokenizer, messages, template, answers="last")
        assert encoded.ids == encode_dialogue(tokenizer, messages, template).ids
        prompt = len(encode_prompt(tokenizer, messages[:-1], template))
        assert encoded.answer_mask == [False] * prompt + [True] * (len(encoded.ids) - prompt)


def test_llama3_ids_and_masks(tokenizer):
    def text(words):
        return tokenizer.encode(words, bos=False)

    messages = (Message("system", " Be kind. "), Message("user", "Hi\n"), Message("assistant", " Hello! "))
    header = {role: [401, *text(role), 402, *text("\n\n")] for role in ("system", "user", "assistant")}
    prompt = [1, *header["system"], *text("Be kind."), 403, *header["user"], *text("Hi"), 403, *header["assistant"]]
    answer = [*text("Hello!"), 403]
    assert encode_prompt(tokenizer, messages[:2], LLAMA3) == prompt
    expected = prompt + answer, [False] * len(prompt) + [True] * len(answer)
    assert encode_dialogue(tokenizer, messages, LLAMA3) == expected
    assert Llama3Chat() == Llama3Chat(128000, 128006, 128007, 128009)


def test_llama3_trains_the_answers_of_every_turn(tokenizer):
    for messages in DIALOGUES:
        runs = trained_runs(encode_dialogue(tokenizer, messages, LLAMA3))
        expected = [content.strip() for role, content in messages if role == "assistant"]
        assert [run[-1] for run in runs] == [403] * len(expected)
        assert [run[:-1] for run in runs] == [tokenizer.encode(text, bos=False) for text in expected]


def test_plain_pairs_are_one_text_each_with_nothing_stripped(tokenizer):
    for messages in DIALOGUES:
        system = messages[0].content + "\n" if messages[0].role == "system" else ""
        turns = [content for role, content in messages if role != "system"]
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        pairs[0] = (system + pairs[0][0], pairs[0][1])
        encoded = encode_dialogue(tokenizer, messages, PLAIN)
        assert encoded.ids == [i for q, a in pairs for i in tokenizer.encode(f"{q}\n{a}", eos=True)]
        runs = trained_runs(encoded)
        assert [decoded_within(tokenizer, run) for run in runs] == [as_decoded(a) for _, a in pairs]


def test_what_is_shown_is_the_format_with_the_answers_marked(tokenizer):
    for messages in DIALOGUES[:100]:
        if messages[0].role != "system":
            encoded = encode_dialogue(tokenizer, messages, LLAMA2)
            turns = [as_decoded(content.strip()) for _, content in messages]
            pairs = zip(turns[::2], turns[1::2], strict=True)
            expected = "".join(f"<s> [INST] {q} [/INST]{{ {a} </s>}}" for q, a in pairs)
            assert shown(tokenizer, encoded, ("{", "}")) == expected


any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=300, deadline=None)
@given(any_text, any_text)
def test_the_border_of_two_texts_is_exact_for_any_text(tokenizer, text, continuation):
    ids, border = tokenizer.encode_continued(text, continuation)
    assert ids == tokenizer.encode(text + continuation, bos=False)
    # What lies before the border is the first text up to the token that holds both; what lies behind has all the rest.
    before, behind = (b"".join(surfaces(tokenizer)[i] for i in part) for part in (ids[:border], ids[border:]))
    first, second = (as_decoded(part).encode() for part in (text, continuation))
    assert (b" " + first).startswith(before) and behind.endswith(second)
    if before != b" " + first and text and continuation:  # then one token holds both, and it comes first
        assert len(before) + len(surfaces(tokenizer)[ids[border]]) > 1 + len(first)
    if not continuation and text:
        assert border == len(ids)


@functools.cache
def surfaces(tokenizer) -> list[bytes]:
    """The bytes that each id stands for."""
    pieces = [piece for piece, _ in tokenizer.pieces()]
    return [bytes([i - 3]) if 3 <= i < 259 else piece.replace("\u2581", " ").encode() for i, piece in enumerate(pieces)]


def test_a_token_over_the_border_belongs_to_the_answer(tokenizer):
    pieces = [piece for piece, _ in tokenizer.pieces()]
    longest = max(range(259, len(pieces)), key=lambda i: len(pieces[i]))
    word = pieces[longest].removeprefix("\u2581")
    ids, border = tokenizer.encode_continued(f"a {word[:2]}", word[2:])
    assert ids[-1] == longest and border == len(ids) - 1


def test_models_with_unknown_characters_or_a_normaliser(tmp_path):
    """Without byte fallback an id does not tell its text; with another normaliser no place in the text is known."""
    options = {"sentence_iterator": iter(SENTENCES * 20), "model_type": "bpe", "vocab_size": 120, "minloglevel": 2}
    options |= {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "model_prefix": str(tmp_path / "m")}
    sentencepiece.SentencePieceTrainer.train(**options, normalization_rule_name="identity")
    unknowing = Tokenizer.load(tmp_path / "m.model")
    ids, border = unknowing.encode_continued("fox 🦙🦙 fox", " é the")
    assert unknowing.unk_id in ids[:border] and unknowing.unk_id in ids[border:]
    assert unknowing.decode(ids[border:]).strip() == "\u2047  the"
    options["sentence_iterator"] = iter(SENTENCES * 20)
    sentencepiece.SentencePieceTrainer.train(**options, normalization_rule_name="nmt_nfkc")
    with pytest.raises(UserError, match="does not keep its text as it is"):
        Tokenizer.load(tmp_path / "m.model").encode_continued("ｆｏｘ", "fox")


@pytest.mark.parametrize("roles", ["", "s", "a", "asua", "uu", "uaa", "su", "usa", "uasua", "uau"])
def test_dialogues_of_wrong_order_are_refused(tokenizer, roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [Message(names[role], "fox") for role in roles]
    with pytest.raises(BadDialogue, match=r"Expected user and assistant in turn.* last the assistant") as caught:
        encode_dialogue(tokenizer, messages, LLAMA2)
    assert caught.value.reason == "wrong roles"


def test_a_prompt_ends_with_the_user(tokenizer):
    with pytest.raises(BadDialogue, match=r"roles of the dialogue are user, assistant\..* last the user"):
        encode_prompt(tokenizer, DIALOGUES[0][-2:], LLAMA2)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", range(3))
def test_tags_in_any_message_are_refused(tokenizer, tag, place):
    messages = [Message("system", "fox"), Message("user", "fox"), Message("assistant", "fox")]
    messages[place] = Message(messages[place].role, f"a{tag}b")
    with pytest.raises(BadDialogue) as caught:
        encode_dialogue(tokenizer, messages, LLAMA2)
    assert f"Message {place + 1} of the dialogue ({messages[place].role}) holds {tag!r}" in str(caught.value)
    assert encode_dialogue(tokenizer, messages, PLAIN).ids  # where it is text like any other


def test_a_system_message_is_added_only_where_there_is_none():
    dialogue = (Message("user", "Hi"), Message("assistant", "Hello"))
    own = (Message("system", "Be brief."), *dialogue)
    assert with_system(dialogue) == (Message("system", DEFAULT_SYSTEM_PROMPT), *dialogue)
    assert with_system(own) == own and with_system(dialogue, "") == dialogue


# The format of Llama 2's chat template in Hugging Face's repositories, written down anew.
JINJA = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = none %}{% endif %}"
    "{% for m in turns %}{% if loop.first and system is not none %}"
    "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set text = m['content'] %}"
    "{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory):
    """The same vocabulary through transformers, with its own chat template mechanism."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face's chat template is the other side")
    from llama_jax.conversion.tokenizer_json import tokenizer_config, tokenizer_json

    folder = tmp_path_factory.mktemp("hugging_face")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    config = tokenizer_config(tokenizer, 512) | {"chat_template": JINJA}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


def theirs(hugging_face, messages) -> list[int]:
    return hugging_face.apply_chat_template([message._asdict() for message in messages], tokenize=True)["input_ids"]


def test_llama2_ids_are_those_of_the_hugging_face_template(tokenizer, hugging_face):
    """It differs in one thing, tested below: "<s>" and "</s>" in a message become BOS and EOS, not text."""
    compared = 0
    for messages in DIALOGUES:
        if not any("<s>" in m.content or "</s>" in m.content for m in messages):
            assert theirs(hugging_face, messages) == encode_dialogue(tokenizer, messages, LLAMA2).ids
            assert theirs(hugging_face, messages[:-1]) == encode_prompt(tokenizer, messages[:-1], LLAMA2)
            compared += 1
    assert compared > 150


def test_the_hugging_face_template_lets_a_message_end_the_turn_and_the_reference_does_not(tokenizer, hugging_face):
    messages = (Message("user", "fox </s> dogs"), Message("assistant", "lazy"))
    assert theirs(hugging_face, messages).count(tokenizer.eos_id) == 2
    assert encode_dialogue(tokenizer, messages, LLAMA2).ids.count(tokenizer.eos_id) == 1
