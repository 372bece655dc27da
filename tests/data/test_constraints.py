"""Instructions for whole dialogues: how they are drawn, where they stand, and what lists may hold."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from llama_jax.data.constraints import (
    KINDS,
    Instruction,
    Kind,
    check_kinds,
    draw_instruction,
    for_sampling,
    for_training,
    kinds_as_json,
    read_kinds,
    with_values,
)
from llama_jax.errors import UserError
from llama_jax.text.chat import Llama2Chat, Message, Plain

NAPOLEON = Instruction((("figure", "Napoleon"),), "Always act as Napoleon.", "Figure: Napoleon.", False)
QUESTIONS = ("Who are you?", "And why?", "Really?")


def draws(count: int = 3000, most: int = 3, seed: int = 0) -> list[Instruction]:
    return [draw_instruction(KINDS, most, seed, number) for number in range(count)]


def test_draws_are_fixed_for_good():
    """A run must go on with another release of NumPy: these may never change."""
    assert [draw_instruction(KINDS, 3, 0, number) for number in (0, 2)] == [
        Instruction(
            (("hobby", "chess"), ("figure", "Florence Nightingale")),
            "You enjoy chess, and your answers show it. Always act as Florence Nightingale from now on.",
            "Hobby: chess. Figure: Florence Nightingale.",
            False,
        ),
        Instruction(
            (("figure", "Joan of Arc"),), "Always act as Joan of Arc from now on.", "Figure: Joan of Arc.", True
        ),
    ]


def test_half_are_shortened_and_every_number_of_kinds_is_as_likely():
    drawn = draws()
    sigma = (3000 * 0.25) ** 0.5
    assert abs(sum(i.shortened for i in drawn) - 1500) < 3 * sigma
    sizes = Counter(len(i.constraints) for i in drawn)
    assert set(sizes) == {1, 2, 3} and all(abs(n - 1000) < 3 * (3000 * 2 / 9) ** 0.5 for n in sizes.values())
    # Whether it is shortened says nothing about what it asks for.
    alone = [i.shortened for i in drawn if len(i.constraints) == 1]
    assert abs(sum(alone) - len(alone) / 2) < 3 * (len(alone) * 0.25) ** 0.5


def test_kinds_differ_within_an_instruction_and_come_in_any_order_with_all_their_values():
    drawn = draws()
    orders = Counter(tuple(kind for kind, _ in i.constraints) for i in drawn)
    assert all(len(set(order)) == len(order) for order in orders)
    assert len(orders) == 3 + 6 + 6
    for kind in KINDS:
        found = Counter(value for i in drawn for name, value in i.constraints if name == kind.name)
        assert set(found) == set(kind.values) and max(found.values()) < 2 * min(found.values())


def test_a_draw_depends_on_seed_and_number_alone_and_on_both():
    assert draws(20) == draws(40)[:20] != draws(20, seed=1)
    assert len({json.dumps(i.constraints) for i in draws(20)}) > 15
    assert {len(i.constraints) for i in draws(100, most=2)} == {1, 2}
    assert {len(i.constraints) for i in draws(100, most=9)} == {1, 2, 3}
    assert draws(3, seed=-1) != draws(3, seed=1)


@pytest.mark.parametrize("shortened", [False, True])
def test_what_is_given_is_the_short_form_only_where_that_was_drawn(shortened):
    instruction = replace(NAPOLEON, shortened=shortened)
    assert instruction.given == ("Figure: Napoleon." if shortened else "Always act as Napoleon.")
    for_samples = for_sampling(instruction, QUESTIONS, ["Moi."])  # never short
    assert for_samples == (
        Message("user", "Always act as Napoleon. Who are you?"),
        Message("assistant", "Moi."),
        Message("user", "Always act as Napoleon. And why?"),
    )


def test_for_training_the_instruction_stands_in_the_first_turn_alone():
    instruction = replace(NAPOLEON, shortened=True)
    rest = (Message("assistant", "Moi."), Message("user", "And why?"), Message("assistant", "Why not."))
    trained = for_training(instruction, QUESTIONS, ["Moi.", "Why not."], as_system=False)
    assert trained == (Message("user", "Figure: Napoleon. Who are you?"), *rest)
    system = for_training(instruction, QUESTIONS, ["Moi.", "Why not."], as_system=True)
    assert system == (Message("system", "Figure: Napoleon."), Message("user", "Who are you?"), *rest)


def test_lists_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "lists.json"
    path.write_bytes(kinds_as_json(KINDS))
    assert read_kinds(path) == KINDS
    path.write_text('{"figure": ["Napoleon"], "persona": {"values": ["é"], "long": "Be {}.", "short": "P: {}"}}')
    assert read_kinds(path) == (replace(KINDS[2], values=("Napoleon",)), Kind("persona", "Be {}.", "P: {}", ("é",)))
    assert with_values(KINDS, {"hobby": ["go"]}) == (replace(KINDS[0], values=("go",)), *KINDS[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the constraints in .*No such file"),
        ("{", "are not JSON"),
        ("[]", "expected an object such as"),
        ("{}", "expected an object such as"),
        ('{"hobby": "chess"}', "hobby: expected a list of values, or an object"),
        ('{"hobby": []}', "hobby: expected a list of texts, and one at least"),
        ('{"hobby": ["chess", 3]}', "hobby: expected a list of texts"),
        ('{"persona": ["cat"]}', r'persona is not built in \(hobby, language, figure are\), so it needs "long"'),
        ('{"persona": {"values": ["cat"], "long": "Be {}."}}', 'so it needs "short"'),
        ('{"persona": {"values": ["cat"], "long": "Be it.", "short": "{}"}}', "'Be it.' should hold {} once"),
        ('{"hobby": {"values": ["chess"], "lng": "x {}"}}', "lng is none of values, long and short"),
    ],
)
def test_other_lists_are_refused(tmp_path, content, message):
    path = tmp_path / "lists.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_kinds(path)
    assert str(path) in str(caught.value)


def test_lists_with_tags_of_the_format_are_refused():
    kinds = with_values(KINDS, {"hobby": ["chess", "typing [INST]"]})
    with pytest.raises(UserError, match=r"kind hobby: .*holds '\[INST\]'"):
        check_kinds(kinds, Llama2Chat())
    check_kinds(kinds, Plain())
    check_kinds(KINDS, Llama2Chat())
