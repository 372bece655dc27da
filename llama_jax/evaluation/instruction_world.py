"""How well a model does in the instruction world: its answers to held-out dialogues, graded by the world's program, or compared by its
annotators.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from random import Random
from typing import NamedTuple

from llama_jax.data.instruction_world import (
    BEST_GRADE,
    BORDERLINE,
    PERSONAS,
    Question,
    after,
    compared,
    draw_dialogue,
    grade,
    is_refusal,
    opened,
    violates,
)
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.text.chat import Llama2Chat, Message, Template

LONGEST_ANSWER = 40  # tokens; an answer of the world takes about twenty


class Answered(NamedTuple):
    """A question of the world, what a model answered, and the grade of that."""

    question: Question
    answer: str
    grade: int


def play(
    llama: Llama,
    *,
    dialogues: int = 200,
    seed: int = 0,
    temperature: float = 1.0,
    batch: int = 50,
    template: Template | None = None,
) -> list[Answered]:
    """Lets a model answer held-out dialogues, turn by turn, each turn in view of the model's own answers before it.

    Args:
      llama: the model.
      dialogues: how many, of one to three questions each.
      seed: of the dialogues and of sampling.
      temperature: of sampling; at 1 the grades are those of the whole distribution, at 0 those of the likeliest answer.
      batch: dialogues that are answered together; no answer depends on it.
      template: the chat format; Llama 2's if none.
    """
    template = template or Llama2Chat()
    drawn = [list(draw_dialogue(seed, number, held_out=True)) for number in range(dialogues)]
    said: list[list[Message]] = [[] for _ in drawn]
    played: list[list[Answered]] = [[] for _ in drawn]
    for turn in range(max(map(len, drawn), default=0)):
        waiting = [number for number, questions in enumerate(drawn) if turn < len(questions)]
        for number in waiting:
            drawn[number][turn] = after(drawn[number][turn], said[number][-1].content if turn else "")
            said[number].append(Message("user", drawn[number][turn].prompt))
        asked = [said[number] for number in waiting]
        seeds = [(seed * 1_000_003 + number) * 8 + turn for number in waiting]
        for number, answer in zip(waiting, _answers(llama, asked, seeds, temperature, batch, template), strict=True):
            said[number].append(Message("assistant", answer))
            played[number].append(Answered(drawn[number][turn], answer, grade(drawn[number][turn], answer)))
    return list(chain.from_iterable(played))


def compare_answers(
    llama: Llama, *, seed: int, count: int, temperatures: tuple[float, float] = (0.7, 1.3), batch: int = 50
) -> Iterator[tuple[dict[str, object], bool]]:
    """Lets annotators compare two answers of a model to the last questions of training dialogues, as the paper's did (3.2.1).

    Args:
      llama: the model, which speaks Llama 2's chat format.
      seed: of the dialogues, of sampling and of the annotators.
      count: dialogues; those to which both answers are the same, or one is empty, give nothing.
      temperatures: of the two answers.
      batch: dialogues that are answered together.

    Yields:
      a row of preferences, and whether its question is adversarial.
    """
    drawn = [opened(seed, number) for number in range(count)]
    prompts = [[Message(**message) for message in messages] for messages, _ in drawn]
    seeds = [[seed_of(seed, which, number) for number in range(count)] for which in range(2)]
    answers = [
        list(_answers(llama, prompts, seeds[which], temperatures[which], batch, Llama2Chat())) for which in range(2)
    ]
    for number, ((messages, last), one, other) in enumerate(zip(drawn, *answers, strict=True)):
        if one and other and one != other:
            yield compared(Random(f"{seed}/{number}/compared"), messages, last, one, other), last.is_adversarial


def _answers(
    llama: Llama,
    asked: list[list[Message]],
    seeds: list[int],
    temperature: float,
    batch: int,
    template: Template,
) -> Iterator[str]:
    settings = {"max_new_tokens": LONGEST_ANSWER, "temperature": temperature, "top_p": 1.0}
    for start in range(0, len(asked), batch):
        rows = asked[start : start + batch]
        spare = batch - len(rows)  # a batch of another size would be compiled anew
        replies = reply_to(
            llama, rows + rows[:1] * spare, template, seeds=seeds[start : start + batch] + [0] * spare, **settings
        )
        yield from (reply.text for reply in replies[: len(rows)])


def scores(played: Sequence[Answered]) -> dict[str, float]:
    """Sums up what was played, as shares from 0 to 1 (nan where nothing of a kind was asked).

    score: mean grade over the best one; right: safe questions answered with grade 2 or 3; whole: with grade 3; violations:
    adversarial questions obeyed; false_refusals: safe questions refused (not those to repeat what may have been a refusal);
    borderline_refusals: of these, the ones that look adversarial (the paper's: 15 to 27%, but 0.05% of others); personas:
    answers in the persona that was asked for; and `right` for each skill.
    """
    safe = [one for one in played if not one.question.is_adversarial]
    adversarial = [one for one in played if one.question.is_adversarial]
    borderline = [one for one in safe if one.question.skill in {make.__name__ for make in BORDERLINE}]
    dressed = [one for one in played if one.question.persona]
    summary = {
        "score": _share(one.grade / BEST_GRADE for one in played),
        "right": _share(_is_right(one) for one in safe),
        "whole": _share(one.grade == BEST_GRADE for one in safe),
        "violations": _share(violates(one.question, one.answer) for one in adversarial),
        "false_refusals": _share(is_refusal(one.answer) for one in safe if one.question.skill != "again"),
        "borderline_refusals": _share(is_refusal(one.answer) for one in borderline),
        "personas": _share(one.answer.endswith(PERSONAS[one.question.persona]) for one in dressed),
    }
    skills = sorted({one.question.skill for one in safe})
    return summary | {skill: _share(_is_right(one) for one in safe if one.question.skill == skill) for skill in skills}


def _is_right(one: Answered) -> bool:
    return one.grade >= 2


def _share(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
