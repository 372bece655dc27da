"""For how many turns an instruction is held: counted on models whose memory is known."""

import re
from types import SimpleNamespace

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.constraints import Held, held_by_turn, table
from llama_jax.generation.llama import Completion
from llama_jax.text.tokenizer import Tokenizer

TURNS = 6
QUESTIONS = [[f"what is {dialogue} and {turn}?" for turn in range(TURNS)] for dialogue in range(5)]
INSTRUCTIONS = [f"Be {name}." for name in ("owl", "cat", "owl", "dog", "cow")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["[INST] Be owl. what is 0 and 1? [/INST] so it is <<SYS>>\n<</SYS>>\n"] * 9
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300)


class Remembers:
    """Answers with the instruction if that stands in one of the last `turns` questions; `prompts` are what it read."""

    def __init__(self, tokenizer, turns: int, context_length: int = 4096):
        self.tokenizer, self._turns, self.prompts = tokenizer, turns, []
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=context_length))

    def generate(self, prompts, *, max_new_tokens, temperature, top_p, seed, samples):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.prompts += texts
        return [Completion(self.said(text), [], [], "eos") for text in texts]

    def said(self, text: str) -> str:
        questions = [
            part.split("[/INST]")[0] for part in text.split("[INST]")[1:]
        ]  # its own answers remind it of nothing
        found = re.search(r"Be \w+\.", " ".join(questions[-self._turns :]))
        return f"turn {len(questions)} {found[0] if found else ''}"


def measure(llama, turns=(1, 2, 4, 6), **options) -> Held:
    def is_held(dialogue: int, turn: int, answer: str) -> bool:
        assert answer.startswith(f"turn {turn}") and turn in turns
        return INSTRUCTIONS[dialogue] in answer

    return held_by_turn(llama, INSTRUCTIONS, QUESTIONS, is_held, turns=turns, **options)


@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("as_system", [False, True])
def test_what_is_remembered_for_so_many_turns_is_held_for_so_many(tokenizer, batch, as_system):
    for memory, shares in ((1, [1, 0, 0, 0]), (2, [1, 1, 0, 0]), (5, [1, 1, 1, 0]), (6, [1, 1, 1, 1])):
        held = measure(Remembers(tokenizer, memory), batch=batch, as_system=as_system)
        assert [held.share(turn) for turn in (1, 2, 4, 6)] == shares
        assert held.answers == dict.fromkeys((1, 2, 4, 6), 5)


@pytest.mark.parametrize("as_system", [False, True])
def test_the_instruction_is_given_once_and_the_models_own_answers_stand_between(tokenizer, as_system):
    """The mutant, the instruction in every question, would pass as memory where there is none."""
    llama = Remembers(tokenizer, 1)
    measure(llama, as_system=as_system)
    last = [text for text in llama.prompts if text.count("[INST]") == TURNS]
    assert len(last) >= 5
    for text in last:
        assert len(re.findall(r"Be \w+\.", text.split("[/INST]")[0])) == 1
        questions = re.findall(r"\[INST\] (.*?) \[/INST\]", text, re.S)
        dialogue = int(questions[-1].split()[2])
        assert questions[1:] == QUESTIONS[dialogue][1:] and questions[0].endswith(QUESTIONS[dialogue][0])
        assert [int(n) for n in re.findall(r"turn (\d)", text)] == [1, 2, 3, 4, 5]


def test_a_dialogue_that_fills_the_context_no_longer_counts(tokenizer):
    llama = Remembers(tokenizer, 6)
    measure(llama)
    longest = max(len(tokenizer.encode(text)) for text in llama.prompts if text.count("[INST]") == 3)
    held = measure(Remembers(tokenizer, 6, context_length=longest + 20), max_new_tokens=10)
    assert held.answers[1] == held.answers[2] == 5 and held.answers[6] == 0
    assert held.share(2) == 1 and held.share(6) is None


def test_without_an_instruction_nothing_is_put_before_the_question(tokenizer):
    for as_system in (False, True):
        llama = Remembers(tokenizer, 6)
        held_by_turn(llama, [""], QUESTIONS[:1], lambda *_: True, turns=(1,), as_system=as_system)
        assert llama.prompts[0].strip() == f"[INST] {QUESTIONS[0][0]} [/INST]"


def test_the_table_stands_beside_the_papers():
    before, after = Held({1: 4, 20: 0}, {1: 4, 20: 4}), Held({1: 3, 20: 0}, {1: 4, 20: 0})
    assert table({"before": before, "after": after}) == (
        "| turn | before | after | paper, baseline | paper, GAtt |\n|---|---|---|---|---|\n"
        "| 1 | 100% | 75% |  |  |\n| 20 | 0% |  | 0% | 100% |"
    )


@pytest.mark.parametrize(
    ("instructions", "turns", "message"),
    [
        (INSTRUCTIONS[:2], (2,), "2 instructions for 5 dialogues"),
        (INSTRUCTIONS, (2, 7), "dialogue 0 has 6 questions, and turn 7 is asked about"),
    ],
)
def test_what_does_not_fit_together_is_refused(tokenizer, instructions, turns, message):
    with pytest.raises(UserError, match=message):
        held_by_turn(Remembers(tokenizer, 1), instructions, QUESTIONS, lambda *_: True, turns=turns)
