"""Safety preprompts: those that are built in, and what a file of others must hold."""

import json

import pytest

from llama_jax.data.preprompts import (
    BUILT_IN,
    behind_preprompt,
    check_preprompts,
    read_preprompts,
)
from llama_jax.errors import UserError
from llama_jax.text.chat import Llama2Chat, Message


def test_the_papers_example_and_risk_categories_are_built_in():
    paper = "You are a responsible and safe assistant that always provides responsible and respectful answers."
    assert paper in BUILT_IN["generic"] and set(BUILT_IN) == {"generic", "illicit", "hateful", "advice"}
    assert len(set(BUILT_IN["generic"])) == len(BUILT_IN["generic"]) == 72
    assert not any("{" in text for texts in BUILT_IN.values() for text in texts)
    for category, topic in (
        ("illicit", "illicit and criminal activities"),
        ("hateful", "hateful"),
        ("advice", "advice"),
    ):
        (text,) = BUILT_IN[category]
        assert topic in text and [line[:2] for line in text.splitlines()[1:4]] == ["1.", "2.", "3."]
    check_preprompts(BUILT_IN, Llama2Chat())


def test_a_preprompt_stands_before_the_last_question_alone():
    prompt = tuple(Message(*turn) for turn in (("system", "s"), ("user", "one"), ("assistant", "1"), ("user", "two")))
    assert behind_preprompt("Be wise.", prompt) == (*prompt[:-1], Message("user", "Be wise.\n\ntwo"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "are not JSON"),
        ("[]", "expected lists of texts by risk category"),
        ('{"hateful": ["no"]}', '"generic" among them'),
        ('{"generic": []}', "expected lists of texts"),
        ('{"generic": "Be wise."}', "expected lists of texts"),
        ('{"generic": ["Be wise."], "hateful": [" "]}', "expected lists of texts"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "preprompts.json"
    with pytest.raises(UserError, match="cannot read the preprompts"):
        read_preprompts(path)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_preprompts(path)


def test_a_file_of_preprompts_is_read_and_one_with_a_tag_refused(tmp_path):
    path = tmp_path / "preprompts.json"
    path.write_text(json.dumps({"generic": ["Be wise."], "theft": ["[INST] 1. Refuse."]}))
    preprompts = read_preprompts(path)
    assert preprompts == {"generic": ("Be wise.",), "theft": ("[INST] 1. Refuse.",)}
    with pytest.raises(UserError, match=r"holds '\[INST\]'"):
        check_preprompts(preprompts, Llama2Chat())
