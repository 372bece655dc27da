"""A model's answers to a file of prompts: each prompt's own, the same after a stop, and ready to be compared."""

import json
import os
import signal

import pytest

from llama_jax import cli
from llama_jax.evaluation.answer_files import read_answers
from llama_jax.evaluation.engine import Answers
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to
from llama_jax.text.chat import Llama2Chat, Message
from tests.stories260k import FOLDER

ROWS = [
    {"id": "a", "prompt": "What barks?", "category": "animals", "note": 1},
    {"id": "b", "dialogue": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"}]},
    {"id": "c", "prompt": "What flies?", "system": "Be brief."},
    {"id": "d", "prompt": "What barks?", "note": 2},
]  # fmt: skip


@pytest.fixture
def command(shared, tmp_path):
    """Its words, and the file that it writes."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "ours.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["compare", "answer", str(shared / FOLDER), str(prompts), "--out", str(out)]
    return [*words, "--rows", "2", "--max-new-tokens", "10"], out


def test_answers_stand_in_the_rows_they_answer(command, shared):
    words, out = command
    assert cli.main([*words, "--temperature", "0"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "answer"} for row in rows] == ROWS
    barks, flies = Message("user", "What barks?"), Message("user", "What flies?")
    turns = [Message(turn["role"], turn["content"]) for turn in ROWS[1]["dialogue"]]
    dialogues = [[barks], turns, [Message("system", "Be brief."), flies], [barks]]
    settings = {"max_new_tokens": 10, "temperature": 0, "seeds": [0] * 4}
    told = reply_to(Llama.load(shared / FOLDER), dialogues, Llama2Chat(), **settings)
    assert [row["answer"] for row in rows] == [one.text for one in told] and len({one.text for one in told}) == 3
    assert [prompt.category for prompt in read_answers([str(out)]).prompts] == ["animals", "", "", ""]
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # nothing is left beside it


def test_what_was_stopped_goes_on_with_the_same_model_and_settings_alone(command, shared, capsys, monkeypatch):
    words, out = command
    assert cli.main([*words, "--rows", "3"]) == 0
    whole, put, asked = out.read_bytes(), Answers.put, []
    out.unlink()

    def stopped(self, key, answer):
        put(self, key, answer)
        asked.append(key)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Answers, "put", stopped)
    assert cli.main(words) == 42 and not out.exists()
    assert "3 answers are kept; start it again to go on" in capsys.readouterr().err
    meta = str(shared / "stories260K_meta_fp16")
    others = {"temperature: 0.6 there, 0.5 here": [*words, "--temperature", "0.5"], "int8": [*words, "--int8"]}
    for name, command in (others | {"checkpoint": [*words[:2], meta, *words[3:]]}).items():
        assert cli.main(command) == 2
        assert "was begun with another recipe" in (said := capsys.readouterr().err) and f"  {name}" in said
    assert cli.main(words) == 0 and out.read_bytes() == whole
    assert len(asked) == len(set(asked)) == 4


def test_a_prompt_without_room_or_without_words_is_named(command, capsys):
    words, out = command
    for flags, message in (
        (["--max-new-tokens", "505"], "prompts.jsonl, line 1: the prompt has"),
        (["--max-new-tokens", "0"], "answers of 0 tokens are asked for; it must be 1 or more"),
        (["--rows", "0"], "--rows is 0; it must be 1 or more"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be 0 (the likeliest token) or more"),
    ):
        assert cli.main([*words, *flags]) == 2  # as nothing is answered, what was wrong before is not held against it
        assert message in capsys.readouterr().err
    (out.parents[1] / "prompts.jsonl").write_text('{"id": "a", "question": "What?"}\n')
    assert cli.main(words) == 2
    assert "expected `prompt`, or `dialogue`, a list of turns" in capsys.readouterr().err
    assert not out.exists()
