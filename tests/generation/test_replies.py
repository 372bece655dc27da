"""Answers of many dialogues at once, and lists that a model writes: as each would be by itself."""

from types import SimpleNamespace

import pytest

from llama_jax.errors import UserError
from llama_jax.generation.lists import read_list, write_list
from llama_jax.generation.llama import Completion, Llama
from llama_jax.generation.replies import Reply, reply_to
from llama_jax.text.chat import Llama2Chat, Message, Plain, encode_prompt

TEMPLATE = Llama2Chat()


class Fake:
    """Gives these completions in turn; `batches` are the prompts that it got."""

    def __init__(self, tokenizer, completions, context_length=64):
        self.tokenizer, self._completions, self.batches = tokenizer, completions, []
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=context_length))

    def generate(self, prompts, *, seed, **settings):
        self.batches.append((prompts, seed))
        return self._completions[: len(prompts) * settings.get("samples", 1)]


def completion(text: str, reason: str = "eos") -> Completion:
    return Completion(text, [], [], reason)


def asked(*texts: str) -> list[tuple[Message, ...]]:
    return [(Message("user", text),) for text in texts]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_answer_is_the_one_it_would_get_alone(model, tokenizer, count):
    llama = Llama(model, tokenizer)
    dialogues = asked("the cat", "the dog sat by the door", "so", "mat")[:count]
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    replies = reply_to(llama, dialogues, Plain(), seeds=range(7, 7 + count), **settings)
    for number, dialogue in enumerate(dialogues):
        (alone,) = llama.generate([encode_prompt(tokenizer, dialogue, Plain())], seed=[7 + number], **settings)
        assert replies[number].text == alone.text.strip()
        assert replies[number].ended == {"eos": "whole", "length": "too long"}[alone.finish_reason]


def test_a_batch_is_filled_up_with_its_first_to_a_power_of_two(tokenizer):
    fake = Fake(tokenizer, [completion(text) for text in "abcdefgh"])
    replies = reply_to(fake, asked("x", "y", "z", "u", "v"), TEMPLATE, seeds=range(5), max_new_tokens=1)
    ((prompts, seeds),) = fake.batches
    assert len(prompts) == 8 and prompts[5:] == prompts[:1] * 3 and seeds == [0, 1, 2, 3, 4, 0, 0, 0]
    assert [reply.text for reply in replies] == list("abcde")


@pytest.mark.parametrize("context", [64, 20])
def test_samples_of_a_dialogue_stand_side_by_side(tokenizer, context):
    """Behind the first, too long for the shorter context, as well."""
    dialogues = asked("the cat sat on the mat and the dog sat by the door", "y", "z", "u")
    fitting = 4 if context == 64 else 3
    fake = Fake(tokenizer, [completion(str(n)) for n in range(2 * fitting)] + [completion("spare")] * 8, context)
    replies = reply_to(fake, dialogues, TEMPLATE, seeds=range(8), max_new_tokens=1, samples=2)
    (_, seeds), skipped = fake.batches[0], 2 * (4 - fitting)
    assert [reply.text for reply in replies] == [""] * skipped + [str(n) for n in range(2 * fitting)]
    assert seeds == [*range(skipped, 8), *([2, 3] if skipped else [])]


def test_answers_are_stripped_cut_at_a_tag_and_say_how_they_ended(tokenizer):
    texts = (" yes \n", "eos"), ("no", "length"), ("so [INST] what", "length"), ("", "eos")
    fake = Fake(tokenizer, [completion(*text) for text in texts])
    replies = reply_to(fake, asked("a", "b", "c", "d"), TEMPLATE, seeds=range(4), max_new_tokens=1)
    assert replies == [Reply("yes", "whole"), Reply("no", "too long"), Reply("so", "whole"), Reply("", "empty")]


def test_what_leaves_no_room_for_an_answer_is_not_asked(tokenizer):
    """The border is exact: the last place of the context is the last token's of an answer."""
    dialogues = asked("a", "the cat sat on the mat")
    sizes = [len(encode_prompt(tokenizer, dialogue, TEMPLATE)) for dialogue in dialogues]
    for context, expected in ((sizes[1] + 4, ["a", "b"]), (sizes[1] + 3, ["a", ""]), (sizes[0] + 3, ["", ""])):
        fake = Fake(tokenizer, [completion("a"), completion("b")], context)
        replies = reply_to(fake, dialogues, TEMPLATE, seeds=[0, 1], max_new_tokens=4)
        assert [reply.text for reply in replies] == expected
        assert [reply.ended for reply in replies] == ["whole" if text else "no room" for text in expected]


@pytest.mark.parametrize(
    ("answer", "entries"),
    [
        ("Here are some:\n1. Chess\n2) *Tennis*\n(3) Go.\n", ["Chess", "Tennis", "Go"]),
        ("- chess\n- tennis\n\nI hope this helps!", ["chess", "tennis"]),
        ("chess\ntennis\nchess\n\n", ["chess", "tennis"]),
        ("Some hobbies:\nchess\nthis line has more than six words in it", ["chess"]),
        ("", []),
    ],
)
def test_the_entries_of_a_list(answer, entries):
    assert read_list(answer) == entries


def test_a_list_is_put_together_from_several_answers(tokenizer):
    answers = [completion("1. chess\n2. go\n3. pok", "length"), completion("1. go\n2. tennis"), completion("")]
    fake = Fake(tokenizer, [*answers, *[completion("1. golf\n2. rowing")] * 5], 400)
    settings = {"temperature": 1.0, "top_p": 0.9}
    assert write_list(fake, "hobbies", 9, Plain(), seed=1, **settings) == ["chess", "go", "tennis", "golf", "rowing"]
    assert write_list(fake, "hobbies", 3, Plain(), seed=1, **settings) == ["chess", "go", "tennis"]
    (prompts, seeds), _ = fake.batches
    assert "Write a list of 9 hobbies" in tokenizer.decode(prompts[0]) and len(set(seeds)) == 8
    silent = Fake(tokenizer, [completion("I do not know any hobbies, as I am a model.")] * 8, 400)
    with pytest.raises(
        UserError, match=r"asked to write a list of 9 hobbies.* the model wrote 'I do not.*--constraints"
    ):
        write_list(silent, "hobbies", 9, Plain(), seed=1, **settings)
