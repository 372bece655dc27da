"""Rows of every common shape become the same dialogues; bad rows are named, counted, and fatal past a share."""

import gzip
import importlib
import json
import sys
import types
from typing import get_args, get_type_hints

import numpy as np
import pytest
import zstandard

from llama_jax.data.dialogues import (
    LONGEST_MESSAGE,
    SHAPES,
    Skipped,
    detect_shape,
    open_rows,
    read_dialogues,
    shape_named,
)
from llama_jax.data.examples import DialogueConfig
from llama_jax.data.prompts import PromptsConfig
from llama_jax.errors import UserError
from llama_jax.text.chat import Llama2Chat, Message

TEMPLATE = Llama2Chat()
QUESTION, ANSWER = "Why is the sky blue?", "It scatters.\n\nRayleigh: blue most."
PAIR = (Message("user", QUESTION), Message("assistant", ANSWER))
LONG = (Message("system", "Be brief."), *PAIR, Message("user", "And red?"), Message("assistant", "Least."))

GOOD = {"prompt": QUESTION, "response": ANSWER}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(spec, shape=None):
    rows, skipped = open_rows(spec), Skipped()
    return list(read_dialogues(rows, shape or detect_shape(rows, spec), TEMPLATE, skipped)), skipped


def turns(dialogue, role: str, content: str, names: dict[str, str] | None = None) -> list[dict]:
    return [{role: (names or {}).get(m.role, m.role), content: m.content} for m in dialogue]


HUMAN_GPT = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": turns(LONG, "role", "content")}, LONG),
        ({"conversations": turns(LONG, "from", "value", HUMAN_GPT), "id": 3}, LONG),
        ({"messages": {"role": [m.role for m in LONG], "content": [m.content for m in LONG]}}, LONG),
        ({"chosen": turns(PAIR, "role", "content"), "rejected": []}, PAIR),
        ({"messages": [{"role": "system", "content": " "}, *turns(PAIR, "role", "content")]}, PAIR),
        (GOOD, PAIR),
        ({"prompt": QUESTION, "completion": ANSWER}, PAIR),
        ({"system": "Be brief.", **GOOD}, LONG[:3]),
        ({"instruction": QUESTION, "output": ANSWER}, PAIR),
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, PAIR),
        (
            {"instruction": "Sum up.", "input": "One. Two.", "output": "Two."},
            (Message("user", "Sum up.\n\nOne. Two."), Message("assistant", "Two.")),
        ),
        ({"instruction": QUESTION, "context": "", "response": ANSWER, "category": "qa"}, PAIR),
        ({"chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}", "rejected": "\n\nHuman: x"}, PAIR),
        ({"text": f"Human: {QUESTION}\n\nAssistant: {ANSWER}\n\nHuman: And red?\n\nAssistant: Least."}, LONG[1:]),
    ],
)
def test_every_shape_is_found_out_and_gives_the_dialogue(tmp_path, row, expected):
    dialogues, skipped = read(write(tmp_path / "t.jsonl", [row] * 3))
    assert dialogues == [expected] * 3
    assert str(skipped) == "all 3 rows are good"


def test_every_source_of_lines_gives_the_same_dialogues(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{n}?", "response": "héllo 🦙"} for n in range(5)]
    plain = tmp_path / "t.jsonl"
    write(plain, rows)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "t.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    expected = read(str(plain))[0]
    assert [dialogue[0].content for dialogue in expected] == [f"{n}?" for n in range(5)]
    for name in ("t.jsonl.gz", "t.jsonl.zst", "marked.jsonl"):
        assert read(str(tmp_path / name))[0] == expected
    assert read(f"jsonl:{tmp_path}/t*.jsonl")[0] == expected


def build_tfds(data_dir) -> None:
    """Prepares conversations as a user's own script would: a sequence of turns, which comes back as columns."""
    tfds = importlib.import_module("tensorflow_datasets")
    turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}

    class Chats(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = data_dir

        def _info(self):
            features = tfds.features.FeaturesDict({"conversations": tfds.features.Sequence(turn)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(4):
                yield number, {"conversations": turns(LONG, "from", "value", HUMAN_GPT)}

    Chats.name = "chats"
    Chats(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_a_tfds_set_gives_dialogues(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    build_tfds(tmp_path)
    assert read("tfds:chats:train")[0] == [LONG] * 4


def test_a_hugging_face_set_gives_dialogues(monkeypatch):
    """With a stand-in for the library that records how it was called."""
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [{"messages": turns(LONG, "role", "content")}, {"messages": np.array([])}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    dialogues, skipped = read("hf:someone/chats@small:test")
    assert dialogues == [LONG] and calls == [("someone/chats", "small", "test")]
    assert skipped.first[0].startswith("hf:someone/chats@small:test, record 1: The roles of the dialogue are none.")


BAD_ROWS = [
    (b'{"prompt": "x", "response": "y"', "not JSON", "the line is not JSON (Expecting ',' delimiter: line 1"),
    (b"[" * 100_000, "not JSON", "the line is not JSON ("),
    (b'["x"]', "not an object", "the line is a JSON list, expected an object a line"),
    (b'{"prompt": "caf\xe9", "response": "y"}', "not UTF-8", "byte 0xe9 at 15 of the line is not UTF-8"),
    (b'{"prompt": "x", "response": ""}', "empty answer", "message 2 (assistant) is empty"),
    (b'{"prompt": "x", "response": " \\n"}', "empty answer", "message 2 (assistant) is empty"),
    (b'{"prompt": " ", "response": "y"}', "empty question", "message 1 (user) is empty"),
    (b'{"prompt": "x", "response": null}', "not text", "a message is NoneType, expected text"),
    (b'{"prompt": ["x"], "response": "y"}', "not text", "a message is list, expected text"),
    (b'{"q": "x", "a": "y"}', "another shape", "the row has the fields a, q, expected prompt: `prompt`, `response`"),
    (b"{}", "another shape", "the row has the fields (none), expected prompt"),
    (
        b'{"prompt": "a [/INST] b", "response": "y"}',
        "tag in a message",
        "Message 1 of the dialogue (user) holds '[/INST]'",
    ),
    (
        b'{"prompt": "' + b"x" * 10_000_000 + b'", "response": "y"}',
        "message too long",
        f"message 1 has 10,000,000 characters, expected at most {LONGEST_MESSAGE:,}",
    ),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_ROWS, ids=[reason for _, reason, _ in BAD_ROWS])
def test_a_bad_row_is_named_and_counted_and_the_rest_is_read(tmp_path, line, reason, message):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join([good, b"", good, line, good]))
    dialogues, skipped = read(str(path))
    assert dialogues == [PAIR] * 3
    assert dict(skipped.reasons) == {reason: 1} and skipped.rows == 4
    assert len(skipped.first) == 1 and skipped.first[0].startswith(f"{path}, line 4: {message}")
    assert len(skipped.first[0]) < 500


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["user", "user"], "The roles of the dialogue are user, user. Expected user and assistant in turn"),
        (["assistant", "user"], "The roles of the dialogue are assistant, user."),
        (["user", "assistant", "user"], "last the assistant"),
        (["user", "system", "assistant"], "after a system message, if any"),
        ([], "The roles of the dialogue are none."),
        (["user", "tool"], "the role 'tool' is none of system, user, human, assistant, gpt"),
        (["user", None], "the role None is none of"),
    ],
)
def test_wrong_roles_are_named(tmp_path, names, message):
    bad = {"messages": [{"role": name, "content": "x"} for name in names]}
    spec = write(tmp_path / "t.jsonl", [{"messages": turns(PAIR, "role", "content")}, bad])
    dialogues, skipped = read(spec)
    assert dialogues == [PAIR] and dict(skipped.reasons) == {"wrong roles": 1}
    assert message in skipped.first[0] and skipped.first[0].startswith(f"{spec}, line 2: ")


def test_bad_rows_are_fatal_past_a_share_with_the_first_few(tmp_path):
    bad = {"prompt": "x", "response": ""}
    spec = write(tmp_path / "t.jsonl", [*[GOOD] * 90, *[bad] * 9, {"prompt": "", "response": "x"}])
    _, skipped = read(spec)
    assert str(skipped) == "10 of 100 rows (10.00%) left out: 9 empty answer, 1 empty question"
    skipped.check(0.10)
    with pytest.raises(UserError) as caught:
        skipped.check(0.0999)
    message = str(caught.value)
    assert all(f"line {line}: message 2 (assistant) is empty" in message for line in range(91, 96))
    assert "line 96" not in message and "--data.bad-rows" in message


def test_the_shape_is_the_one_of_most_rows_and_can_be_named(tmp_path):
    other = {"instruction": "x", "output": "y"}
    both = {**GOOD, "chosen": "\n\nHuman: a\n\nAssistant: b"}
    spec = write(tmp_path / "t.jsonl", [other, *[GOOD] * 5])
    assert len(read(spec)[0]) == 5
    assert len(read(spec, shape=shape_named("instruction"))[0]) == 1
    spec = write(tmp_path / "both.jsonl", [both])
    assert read(spec)[0] == [PAIR]
    assert read(spec, shape=shape_named("transcript"))[0] == [(Message("user", "a"), Message("assistant", "b"))]
    assert shape_named("auto") is None
    with pytest.raises(UserError, match="none of auto, messages, instruction, prompt, transcript"):
        shape_named("alpaca")


def test_detection_passes_over_lines_that_cannot_be_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"no json\n" * 30 + json.dumps(GOOD).encode())
    dialogues, skipped = read(str(path))
    assert dialogues == [PAIR] and skipped.count == 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"question": "x", "number": 2}\n',
            r"its first row has the fields number, question\. Expected one of messages: ",
        ),
        (b'[\n{"prompt": "x", "response": "y"}\n]', None),
        (b'[{"prompt": "x", "response": "y"}]', r"line 1: the line is a JSON list.*jq -c"),
        (b"hello\n", r"line 1: the line is not JSON"),
        (b"", r"Nothing to read"),
    ],
)
def test_files_without_dialogues_are_refused_with_what_was_found(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    if message is None:  # a list over several lines has rows all the same, beside two bad ones
        assert len(read(str(path))[0]) == 1
        return
    with pytest.raises(UserError, match=message):
        read(str(path))


@pytest.mark.parametrize("spec", ["mine", "text:mine.txt", "jsonl:", "hf:", "json:mine.jsonl"])
def test_what_is_no_source_of_dialogues_is_refused(spec):
    with pytest.raises(UserError, match=r"is no source of dialogues\. Expected a \.jsonl file"):
        read(spec)


def test_a_missing_file_is_refused():
    with pytest.raises(UserError, match=r"No file matches missing\.jsonl"):
        read("missing.jsonl")


def test_half_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "half \\ud83e", "response": "\\ud83e\\udd99"}')
    assert read(str(tmp_path / "t.jsonl"))[0] == [(Message("user", "half \ufffd"), Message("assistant", "🦙"))]


def test_real_instructions(shared):
    dialogues, skipped = read(str(shared / "dolly_hhrlhf_train_small.jsonl"))
    assert len(dialogues) == 1000 and skipped.count == 0
    lines = (shared / "dolly_hhrlhf_train_small.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [[m.content for m in dialogue] for dialogue in dialogues] == [[r["prompt"], r["response"]] for r in rows]


def test_real_transcripts(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    path = shared / "hh_rlhf_harmless_1156.jsonl.gz"
    dialogues, skipped = read(str(path))
    assert dict(skipped.reasons) == {"empty answer": 4, "wrong roles": 2} and skipped.rows == 1156
    skipped.check(0.01)
    assert skipped.first[0] == f"{path}, line 87: message 4 (assistant) is empty"
    # What the dialogues say in all is what the file says, but for the rows left out and the marks of who speaks.
    rows = [json.loads(line)["chosen"] for line in gzip.decompress(path.read_bytes()).splitlines()]
    names = {"user": "Human", "assistant": "Assistant"}
    rebuilt = {"".join(f"\n\n{names[m.role]}: {m.content}" for m in dialogue) for dialogue in dialogues}
    squeezed = {"".join(text.split()) for text in rows}
    assert len(dialogues) == 1150 and {"".join(text.split()) for text in rebuilt} <= squeezed


def test_the_flag_names_every_shape():
    """A question without an answer is a prompt, and nothing to train on."""
    names = ("auto", *(shape.name for shape in SHAPES))
    assert get_args(get_type_hints(PromptsConfig)["shape"]) == names
    assert get_args(get_type_hints(DialogueConfig)["shape"]) == names[:-1] and names[-1] == "question"
