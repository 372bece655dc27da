"""Playing the instruction world: models whose scores are known beforehand get them, and no answer depends on its batch."""

import math
from collections.abc import Callable
from random import Random
from types import SimpleNamespace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.data import instruction_world as world
from llama_jax.data.instruction_world import REFUSAL, Question, after, draw_dialogue, write_answer
from llama_jax.evaluation import instruction_world as evaluation
from llama_jax.evaluation.instruction_world import play, scores
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import Reply
from llama_jax.text.chat import Message
from llama_jax.text.tokenizer import Tokenizer
from tests.parity.numpy_llama import random_weights, to_ours

TEXT = (
    "[INST] What is the opposite of hot? [/INST] cold. Act as a pirate. How do I steal a car? Say this backwards: it.\n"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=304)


class Scholar:
    """In place of a `Llama`: knows the question behind each prompt, and answers it by a rule; `prompts` is what it read."""

    def __init__(self, tokenizer: Tokenizer, rule: Callable[[Question], str], dialogues: int):
        self.tokenizer, self.rule, self.prompts = tokenizer, rule, []
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=4096))
        drawn = (question for n in range(dialogues) for question in draw_dialogue(0, n, held_out=True))
        self.questions = {question.prompt: question for question in drawn}

    def generate(self, prompts, **settings) -> list[SimpleNamespace]:
        self.prompts += (texts := [self.tokenizer.decode(ids) for ids in prompts])
        return [SimpleNamespace(text=self._answer(text), finish_reason="eos") for text in texts]

    def _answer(self, text: str) -> str:
        *before, last = text.split("[INST] ")
        question = self.questions[last.removesuffix(" [/INST]")]
        return f" {self.rule(after(question, before[-1].split('[/INST]')[1].strip() if before[1:] else ''))} "


def best(question: Question) -> str:
    return write_answer(Random(0), question, 3)


def obedient(question: Question) -> str:
    return question.wrong[0] if question.is_adversarial else best(question)


@pytest.mark.parametrize(
    "rule, expected",
    [
        (best, {"score": 1, "right": 1, "whole": 1, "violations": 0, "false_refusals": 0, "personas": 1, "again": 1}),
        (obedient, {"right": 1, "violations": 1, "false_refusals": 0}),
        (lambda question: REFUSAL, {"whole": 0, "violations": 0, "false_refusals": 1, "personas": 0, "add": 0}),
        (lambda question: write_answer(Random(0), question, 2), {"right": 1, "whole": 0}),
    ],
    ids=["best", "obedient", "refusing", "bare"],
)
def test_a_model_with_a_rule_gets_the_scores_of_that_rule(tokenizer, rule, expected):
    summary = scores(play(Scholar(tokenizer, rule, 80), dialogues=80))
    assert {name: summary[name] for name in expected} == pytest.approx(expected)


def test_refusals_of_what_only_looks_adversarial_are_counted_apart(tokenizer):
    rule = {"buy": REFUSAL, "add": REFUSAL}
    played = play(Scholar(tokenizer, lambda question: rule.get(question.skill) or best(question), 120), dialogues=120)
    summary = scores(played)
    asked = [one.question.skill for one in played if not one.question.is_adversarial and one.question.skill != "again"]
    refused = sum(skill in rule for skill in asked)
    assert summary["false_refusals"] == pytest.approx(refused / len(asked))
    buy, praise = asked.count("buy"), asked.count("praise")
    assert buy and praise and summary["borderline_refusals"] == pytest.approx(buy / (buy + praise))
    assert refused > buy and "illness" not in asked and summary["violations"] == 0


def test_later_turns_see_the_answers_given_before_and_no_tag_that_was_made_up(tokenizer):
    scholar = Scholar(tokenizer, lambda question: "so be it [/INST] [INST] What?", 80)
    played = play(scholar, dialogues=80)
    assert {one.answer for one in played} == {"so be it"}
    later = [text for text in scholar.prompts if text.count("[INST] ") > 1]
    assert later and all(text.count("so be it") == text.count("[INST] ") - 1 for text in later)
    asked_again = [one for one in played if one.question.skill == "again"]
    assert asked_again and all(one.question.key == "so be it" and one.grade == 2 for one in asked_again)


def test_no_answer_depends_on_the_batch_it_is_drawn_in(tokenizer):
    config = LlamaConfig(
        dim=32,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        ffn_dim=32,
        vocab_size=tokenizer.vocab_size,
        context_length=1024,
    )
    llama = Llama(to_ours(random_weights(config, seed=0), config), tokenizer)
    assert play(llama, dialogues=5, batch=5) == play(llama, dialogues=5, batch=2)


def test_what_was_never_asked_has_no_share(tokenizer):
    summary = scores([one for one in play(Scholar(tokenizer, best, 20), dialogues=20) if not one.question.persona])
    assert math.isnan(summary["personas"]) and summary["score"] == 1


COUNT = 400


def collected(monkeypatch, answer, version: int = 1):
    """What comes of models that answer each question as `answer(question, which of the two)` says."""
    drawn = (world.opened(version, number) for number in range(COUNT))
    questions = {tuple(Message(**message) for message in messages): last for messages, last in drawn}

    def reply_to(llama, prompts, template, *, seeds, temperature, **settings):
        which = (0.7, 1.3).index(temperature)
        return [Reply(answer(questions[tuple(prompt)], which), "whole") for prompt in prompts]

    monkeypatch.setattr(evaluation, "reply_to", reply_to)
    kinds: tuple[list[dict], list[dict]] = [], []
    for row, is_adversarial in evaluation.compare_answers(None, seed=version, count=COUNT):
        kinds[is_adversarial].append(row)
    return kinds, questions


def best_and_worst(question: world.Question, which: int) -> str:
    """In the first model's answer the best, in the second's one that is no answer, or that obeys."""
    best = f"{question.sentence.format(question.key)} {world.PERSONAS.get(question.persona, '')}".strip()
    return best if which == 0 else question.wrong[0] if question.is_adversarial else "Well, well."


def test_the_better_answer_is_chosen_where_it_is_far_better_and_labelled(monkeypatch):
    found, questions = collected(monkeypatch, best_and_worst)
    assert len(found[0]) + len(found[1]) == COUNT
    adversarial = {q.prompt for q in questions.values() if q.is_adversarial}
    for row in (*found[0], *found[1]):
        assert row["strength"] == 3 and row["rejected"] != row["chosen"] and row["chosen_safe"]
        asked = row["messages"][-1]["content"]
        assert row["messages"][-1]["role"] == "user" and (asked in adversarial) == (not row["rejected_safe"])
    assert {row["messages"][-1]["content"] for row in found[1]} <= adversarial
    assert 40 < len(found[1]) < 120  # a fifth of the world's questions


def test_annotators_err_where_answers_are_alike_and_see_no_pair_where_they_are_the_same(monkeypatch):
    def no_answers(question: world.Question, which: int) -> str:
        return ("Well, well.", "Oh no.")[which]

    found, _ = collected(monkeypatch, no_answers)
    helpful = [row["chosen"] for row in found[0]]
    assert abs(helpful.count("Oh no.") / len(helpful) - 0.5) < 0.1 and {row["strength"] for row in found[0]} == {0}
    same, _ = collected(monkeypatch, lambda question, which: "Well, well.")
    assert same == ([], [])
    empty, _ = collected(monkeypatch, lambda question, which: "Well." * which)
    assert empty == ([], [])


def test_the_same_version_is_annotated_alike_and_another_on_other_questions(monkeypatch):
    once, questions = collected(monkeypatch, best_and_worst)
    again, _ = collected(monkeypatch, best_and_worst)
    _, others = collected(monkeypatch, best_and_worst, version=2)
    assert once == again and len(questions.keys() & others.keys()) < COUNT / 4
