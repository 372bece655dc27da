"""Prompts: the last question of each dialogue with all before it, each once, and with the risk that its row names."""

import json

import pytest

from llama_jax.data.prompts import PromptsConfig, read_prompts
from llama_jax.errors import UserError
from llama_jax.text.chat import Llama2Chat, Message

TURNS = [("system", "be brief"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]


def messages(turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def write(tmp_path):
    def file(*rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return file


def read(*sources, **settings):
    return read_prompts(PromptsConfig(sources=sources, **settings), Llama2Chat())


@pytest.mark.parametrize("turns", [TURNS, TURNS[:-1]], ids=["answered", "open"])
def test_what_stands_before_the_last_question_stays_and_its_answer_goes(write, turns):
    prompts, note = read(write({"messages": messages(turns)}))
    assert prompts == {tuple(Message(*turn) for turn in TURNS[:-1]): ""}
    assert note.endswith("messages: all 1 rows are good")


def test_a_row_may_be_a_question_alone(write):
    prompts, note = read(write({"prompt": "one"}, {"prompt": "two", "system": "be brief", "risk": "advice"}))
    assert prompts == {
        (Message("user", "one"),): "",
        (Message("system", "be brief"), Message("user", "two")): "advice",
    }
    assert "question: all 2 rows are good" in note


def test_every_shape_has_prompts(write):
    rows = {
        "preferences": {"messages": messages([("user", "why")]), "chosen": "so", "rejected": "no", "strength": 3},
        "pairs": {"prompt": "why", "response": "so"},
        "instructions": {"instruction": "why", "output": "so"},
        "transcripts": {"chosen": "\n\nHuman: why\n\nAssistant: so", "rejected": "\n\nHuman: why\n\nAssistant: no"},
        "open transcripts": {"text": "\n\nHuman: why"},
    }
    for name, row in rows.items():
        prompts, _ = read(write(row, name=f"{name}.jsonl"))
        assert prompts == {(Message("user", "why"),): ""}, name


def test_a_prompt_that_is_there_already_is_counted_and_not_given_again(write):
    one, two = ({"prompt": text, "response": "so"} for text in ("why", "how"))
    sources = write(one, two, one), write({"prompt": "why", "response": "another answer"}, name="more.jsonl")
    prompts, note = read(*sources)
    assert [prompt[-1].content for prompt in prompts] == ["why", "how"]
    assert note.count("; 1 are there already") == 2


def test_bad_rows_are_counted_and_too_many_are_an_error(write):
    bad = {"messages": messages([("user", "[INST] why")])}, {"messages": messages([("assistant", "so")])}
    source = write({"prompt": "why", "response": "so"}, name="good.jsonl"), write(*bad, name="bad.jsonl")
    with pytest.raises(UserError, match="2 of 2 rows .* left out: 1 tag in a message, 1 wrong roles"):
        read(*source)
    with pytest.raises(UserError, match="no dialogue is left to take a question from"):
        read(source[1], bad_rows=1.0)
    assert len(read(*source, bad_rows=1.0)[0]) == 1


def test_a_prompt_has_the_risk_category_that_its_row_names(write):
    categories = {"text": " hateful ", "true": True, "false": False, "null": None, "empty": "", "absent": ...}
    rows = [{"prompt": name, "response": "so", "risk": value} for name, value in categories.items()]
    del rows[-1]["risk"]
    prompts, note = read(write(*rows))
    risks = {prompt[-1].content: risk for prompt, risk in prompts.items()}
    assert risks == {"text": "hateful", "true": "unknown", "false": "", "null": "", "empty": "", "absent": ""}
    assert note.endswith("all 6 rows are good; adversarial: 1 hateful, 1 unknown")
    renamed = [{**row, "hazard": row.get("risk", "")} | {"risk": "none of these"} for row in rows]
    prompts, _ = read(write(*renamed, name="renamed.jsonl"), category="hazard")
    assert {prompt[-1].content: risk for prompt, risk in prompts.items()} == risks


def test_of_a_prompt_that_is_there_twice_the_first_category_counts(write):
    rows = [{"prompt": "why", "response": "so", "risk": value} for value in ("", "hateful", "illicit")]
    assert list(read(write(*rows))[0].values()) == ["hateful"]


def test_a_category_that_is_none_makes_a_bad_row(write):
    source = write({"prompt": "why", "response": "so", "risk": 3}, {"prompt": "how", "response": "so"})
    with pytest.raises(UserError, match="1 no category.*\n.*risk is int, expected text, true or false"):
        read(source)
    assert [prompt[-1].content for prompt in read(source, bad_rows=0.5)[0]] == ["how"]
