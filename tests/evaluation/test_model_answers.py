"""A model's answers to a file of prompts: each prompt's own, the same after a stop, and ready to be compared."""

import json

import pytest

from llama_jax import cli
from llama_jax.evaluation.answer_files import read_answers
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import Reply
from tests.stories260k import FOLDER

ROWS = [
    {"id": "a", "prompt": "What barks?", "category": "animals", "note": 1},
    {"id": "b", "dialogue": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"}]},
    {"id": "c", "prompt": "What flies?", "system": "Be brief."},
]  # fmt: skip


@pytest.fixture
def command(shared, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = []

    def reply_to(llama, dialogues, template, *, seeds, **settings):
        asked.append((len(dialogues), settings))
        return [
            Reply(f"{dialogue[-1].content} {seed % 97}", "whole")
            for dialogue, seed in zip(dialogues, seeds, strict=True)
        ]

    monkeypatch.setattr("llama_jax.evaluation.safety_model.reply_to", reply_to)
    out = tmp_path / "ours.jsonl"
    words = [
        "compare",
        "answer",
        str(shared / FOLDER),
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(out),
        "--batch",
        "2",
    ]
    return [*words, "--max-new-tokens", "40"], out, asked


def test_answers_stand_in_the_rows_they_answer(command):
    words, out, asked = command
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "answer"} for row in rows] == ROWS
    assert [row["answer"].rsplit(" ", 1)[0] for row in rows] == ["What barks?", "Why?", "What flies?"]
    assert [count for count, _ in asked] == [2, 1]
    assert asked[0][1] == {"max_new_tokens": 40, "temperature": 0.6, "top_p": 0.9}
    answers = read_answers([str(out)])
    assert [prompt.category for prompt in answers.prompts] == ["animals", "", ""] and not list(
        out.parent.glob("*.partial")
    )
    before = out.read_bytes()
    assert cli.main([*words, "--batch", "3"]) == 0 and out.read_bytes() == before  # a batch changes nothing


def test_a_prompt_without_room_or_without_words_is_named(command, capsys, monkeypatch):
    words, out, asked = command
    assert cli.main([*words, "--max-new-tokens", "505"]) == 2
    assert "prompts.jsonl, line 1: the prompt has" in capsys.readouterr().err
    (out.parent / "prompts.jsonl").write_text('{"id": "a", "question": "What?"}\n')
    monkeypatch.setattr(Llama, "load", lambda *args, load=Llama.load, **more: load(*args, **more))
    assert cli.main(words) == 2
    assert "expected `prompt`, or `dialogue`, a list of turns" in capsys.readouterr().err
    assert not out.exists() and asked == []
