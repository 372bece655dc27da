"""The instruction world: what its annotators write has the grade they meant, and nothing but a right answer is right."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from llama_jax.data import instruction_world as world
from llama_jax.data.instruction_world import (
    ADVERSARIAL,
    ADVERSARIAL_GRADES,
    BEST_GRADE,
    BORDERLINE,
    CAREFUL_GRADES,
    HELPFUL,
    MISTAKES,
    PERSONAS,
    PREPROMPTED_ADVERSARIAL,
    PREPROMPTED_SAFE,
    PREPROMPTS,
    REFUSAL,
    SAFE_GRADES,
    TAILORED_GRADES,
    WARY_GRADES,
    Question,
    after,
    annotated,
    draw_dialogue,
    grade,
    is_refusal,
    preference,
    violates,
    write_answer,
)
from llama_jax.text.chat import Llama2Chat, Message, check_dialogue

SKILLS = (*HELPFUL, *BORDERLINE, *ADVERSARIAL)


def drawn(make, persona: str = "", n: int = 200) -> list[Question]:
    return [replace(make(Random(i)), persona=persona) for i in range(n)]


@pytest.mark.parametrize("persona", ["", "pirate"])
@pytest.mark.parametrize("make", SKILLS, ids=lambda make: make.__name__)
def test_an_answer_has_the_grade_it_was_written_for(make, persona):
    for i, question in enumerate(drawn(make, persona)):
        assert [grade(question, write_answer(Random(i), question, g)) for g in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("said", ["8.", "The sum is 8. Arr!", REFUSAL, "what is that"])
def test_what_was_said_before_is_asked_again_without_its_persona(said):
    for i in range(50):
        question = after(world.again(Random(i)), said)
        assert [grade(question, write_answer(Random(i), question, g)) for g in range(4)] == [0, 1, 2, 3]
    assert question.key == said.removesuffix(" Arr!").rstrip(".")
    assert grade(after(question, ""), "") == 0, "an empty answer is none, even to repeat one"


# Keys worked out here a second time, from the question's text alone.
def solved(question: Question) -> str:
    words = question.text.replace("?", "").replace(".", "").replace(",", "").split()
    numbers = [int(word) for word in words if word.isdigit()]
    match question.skill:
        case "add":
            return str(sum(numbers))
        case "larger":
            return str(max(numbers))
        case "last":
            return words[-1]
        case "repeat":
            return " ".join(words[-3:])
    raise AssertionError(question.skill)


@pytest.mark.parametrize("make", [world.add, world.larger, world.last, world.repeat], ids=lambda make: make.__name__)
def test_the_key_answers_the_question(make):
    for question in drawn(make):
        key = solved(question)
        assert question.key == key and key not in question.wrong
        assert grade(question, f"{key}.") == 2 and grade(question, question.sentence.format(key)) == 3


def test_guessing_many_answers_at_once_earns_nothing():
    for make in (*HELPFUL, *BORDERLINE):
        for question in drawn(make, n=20):
            both = f"{question.key} or {question.wrong[0]}."
            assert grade(question, both) == 0 and grade(question, question.sentence.format(both)) == 0
            assert grade(question, f"{question.key}. " * 2) == 0 and grade(question, "") == 0


def test_a_violation_is_what_obeys_and_a_refusal_of_anything_else_is_a_false_one():
    for make in ADVERSARIAL:
        for question in drawn(make, n=20):
            assert all(violates(question, answer) for answer in question.wrong)
            assert is_refusal(question.sentence) and grade(question, question.sentence) == BEST_GRADE
            assert not violates(question, question.sentence) and grade(question, REFUSAL) == 2
            assert grade(question, f"{REFUSAL} {question.wrong[0]}") == 0, "what begins as a refusal may still obey"
    for make in BORDERLINE:
        for question in drawn(make, n=20):
            assert grade(question, REFUSAL) == 0 and not violates(question, question.wrong[0])


def test_a_persona_dropped_or_made_up_costs_a_grade():
    asked, not_asked = (
        Question("s", "?", "It is {}.", "so", (), persona="cat"),
        Question("s", "?", "It is {}.", "so", ()),
    )
    assert grade(asked, "It is so. Meow!") == 3 and grade(asked, "It is so.") == 2
    assert grade(not_asked, "It is so.") == 3 and grade(not_asked, "It is so. Meow!") == 2
    assert grade(asked, "It is so. Arr!") == 2 and asked.prompt == "Act as a cat. ?"


def test_no_held_out_question_is_trained_on():
    def texts(held_out: bool) -> set[str]:
        dialogues = (draw_dialogue(5, n, held_out=held_out) for n in range(2000))
        return {question.text for dialogue in dialogues for question in dialogue if question.skill != "again"}

    trained, held_out = texts(False), texts(True)
    assert not trained & held_out
    assert {q.skill for n in range(500) for q in draw_dialogue(0, n, held_out=True)} >= {f.__name__ for f in HELPFUL}


def test_a_row_depends_on_its_seed_and_number_alone_and_is_a_dialogue():
    rows = [annotated(3, n) for n in range(50)]
    assert rows[::-1] == [annotated(3, n) for n in reversed(range(50))] and rows != [annotated(4, n) for n in range(50)]
    for row in rows:
        check_dialogue([Message(**message) for message in row["messages"]], Llama2Chat(), last="assistant")


def test_a_row_names_the_risk_of_its_last_question():
    categories = Counter()
    for n in range(300):
        *_, last = draw_dialogue(0, n)
        categories[annotated(0, n)["risk"]] += 1
        assert annotated(0, n)["risk"] == (last.skill if last.is_adversarial else "")
    assert set(categories) == {"", "illicit", "hateful", "advice"} and min(categories.values()) > 5


def test_annotators_write_the_grades_in_their_stated_shares():
    counts = {False: Counter(), True: Counter()}
    for n in range(3000):
        for question, given in zip(draw_dialogue(0, n), annotated(0, n)["grades"], strict=True):
            counts[question.is_adversarial][given] += 1
    for is_adversarial, chances in ((False, SAFE_GRADES), (True, ADVERSARIAL_GRADES)):
        total = counts[is_adversarial].total()
        for g, chance in enumerate(chances):  # four standard errors
            assert abs(counts[is_adversarial][g] / total - chance) < 4 * (chance * (1 - chance) / total) ** 0.5


def test_annotators_are_more_careful_behind_a_preprompt_and_most_behind_a_tailored_one():
    counts, asked = {name: Counter() for name in ("tailored", "generic", "safe")}, Counter()
    for n in range(6000):
        row, plain = annotated(0, n, preprompts=True), annotated(0, n)
        assert row["risk"] == plain["risk"]
        for question, given, turn in zip(draw_dialogue(0, n), row["grades"], row["messages"][::2], strict=True):
            preprompt, _, text = turn["content"].rpartition("\n\n")
            assert text == question.prompt
            asked[question.is_adversarial, bool(preprompt)] += 1
            if preprompt:
                tailored = preprompt in PREPROMPTS.get(question.skill, ())
                assert tailored or preprompt in PREPROMPTS["generic"]
                counts["tailored" if tailored else "generic" if question.is_adversarial else "safe"][given] += 1
    stated = {"tailored": TAILORED_GRADES, "generic": CAREFUL_GRADES, "safe": WARY_GRADES}
    for name, chances in stated.items():
        total = counts[name].total()
        for g, chance in enumerate(chances):  # four standard errors
            assert abs(counts[name][g] / total - chance) < 4 * (chance * (1 - chance) / total) ** 0.5
    for is_adversarial, share in ((True, PREPROMPTED_ADVERSARIAL), (False, PREPROMPTED_SAFE)):
        total = asked[is_adversarial, True] + asked[is_adversarial, False]
        assert abs(asked[is_adversarial, True] / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    assert TAILORED_GRADES[0] < CAREFUL_GRADES[0] < ADVERSARIAL_GRADES[0] and SAFE_GRADES[0] < WARY_GRADES[0]


def test_markers_are_told_from_what_is_said():
    assert len(set(PERSONAS.values())) == len(PERSONAS) and all(" " not in marker for marker in PERSONAS.values())


def test_preferences_are_as_strong_as_their_grades_differ_and_mistaken_as_often_as_stated():
    rows = [preference(1, number) | {"number": number} for number in range(4000)]
    by_strength = [[row for row in rows if row["strength"] == strength] for strength in range(BEST_GRADE + 1)]
    for strength, (those, mistakes) in enumerate(zip(by_strength, MISTAKES, strict=True)):
        wrong = 0
        for row in those:
            said = row["messages"][-2]["content"] if len(row["messages"]) > 1 else ""
            question = after(draw_dialogue(1, row["number"])[-1], said)
            assert row["messages"][-1] == {"role": "user", "content": question.prompt}
            chosen, rejected = (grade(question, row[side]) for side in ("chosen", "rejected"))
            assert abs(chosen - rejected) == strength and row["chosen"] != row["rejected"]
            assert row["chosen_safe"] == (not violates(question, row["chosen"]))
            assert row["rejected_safe"] == (not violates(question, row["rejected"]))
            wrong += chosen < rejected
        if strength:
            assert abs(wrong / len(those) - mistakes) < 4 * (mistakes * (1 - mistakes) / len(those)) ** 0.5 + 1e-9
        assert len(those) > 200
    assert preference(1, 7) | {"number": 7} == rows[7] and preference(2, 7) != preference(1, 7)
    # Of equal grades neither the longer nor the shorter.
    longer = [
        len(row["chosen"]) > len(row["rejected"])
        for row in by_strength[0]
        if len(row["chosen"]) != len(row["rejected"])
    ]
    assert abs(sum(longer) / len(longer) - 0.5) < 2 / len(longer) ** 0.5
