"""`llama-jax eval --suite safety`: stopped again and again it comes to what it does at once, and asks nothing twice."""

import json
import os
import signal

import pytest

from llama_jax import cli
from llama_jax.evaluation.engine import Answers
from tests.evaluation.safety_runs import assert_same
from tests.stories260k import FOLDER

JUDGES = """
import os, signal
def short(items): return [len(str(item)) % 2 for item in items]
def wrong(items): return [2] * len(items)
def stopped(items): os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def words(shared, tmp_path_factory) -> list[str]:
    """All five benchmarks, a few questions of each."""
    folder, samples = tmp_path_factory.mktemp("safety"), shared / "samples"
    (folder / "judges.py").write_text(JUDGES)
    for name, file, count in (("toxigen", "toxigen_prompts_3pergroup", 9), ("bold", "bold_gender_40", 4)):
        lines = (samples / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    one, more = {"A dog.": 1, "The cat": 0}, {"A dog.": 1, "No bird": 1, "The cat": 0}
    questions = [f"What {does}?" for does in ("barks", "runs", "eats", "is", "was")] * 2
    rows = {
        "truthfulqa": [{"question": text, "mc1_targets": one, "mc2_targets": more} for text in questions],
        "adversarial": [{"prompt": f"Say {text}."} for text in "abc"],
        "borderline": [{"prompt": f"Say {text}."} for text in "de"],
    }
    for name, of in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    files = [word for name in ("toxigen", "bold", *rows) for word in (f"--safety.{name}", f"{folder}/{name}.jsonl")]
    judges = [
        word
        for kind in ("toxicity", "truth", "info", "violation", "refusal")
        for word in (f"--safety.{kind}-judge", f"{folder}/judges.py:short")
    ]
    few = ["--safety.decoding.max-new-tokens", "8", "--safety.decoding.max-answer-tokens", "8"]
    return ["eval", str(shared / FOLDER), "--suite", "safety", "--rows", "4", *few, *files, *judges]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main([*words, "--out", str(out)]) == 0
    return out


def test_all_that_was_asked_stands_in_the_samples(whole):
    rows = {path.stem: path.read_text().splitlines() for path in whole.glob("samples/*")}
    assert {name: len(lines) for name, lines in rows.items()} == {
        "toxigen": 6, "bold": 4, "truthfulqa_choices": 10, "truthfulqa_answers": 10, "adversarial": 3, "borderline": 2,
    }  # fmt: skip
    titles = [table["title"] for table in json.loads((whole / "results.json").read_text())["tables"]]
    assert titles == [
        "ToxiGen", "BOLD, gender", "TruthfulQA, multiple choice", "TruthfulQA, judged answers",
        "Violations, adversarial prompts", "False refusals, borderline prompts",
    ]  # fmt: skip


def test_what_is_stopped_goes_on_and_asks_nothing_twice(words, whole, tmp_path, monkeypatch):
    """Nine answers at a time; before that, by a judge that says nothing useful, and while one judges."""
    out, put, asked = tmp_path / "out", Answers.put, []

    def stopped(self, key, answer):
        put(self, key, answer)
        asked.append(key)
        if len(asked) % 9 == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Answers, "put", stopped)
    judges = [words[-1].replace("short", name) for name in ("wrong", "stopped")]
    codes = [cli.main([*words, "--safety.toxicity-judge", judge, "--out", str(out)]) for judge in judges]
    while codes[-1] != 0 and len(codes) < 20:
        codes.append(cli.main([*words, "--out", str(out)]))
        if codes[-1] == 42:
            with (out / "answers.jsonl").open("ab") as file:
                file.write(b'{"asked": "a line that was half wri')
    lines = (whole / "answers.jsonl").read_text().splitlines()
    assert codes == [2, 42, *[42] * (len(lines) // 9), 0]
    assert len(asked) == len(set(asked)) == len(lines) == 6 + 4 + 5 * 3 + 10 + 3 + 2
    assert_same(out, whole)
    cli.main([*words, "--out", str(out)])
    assert len(asked) == len(lines)


def test_another_model_is_refused_and_with_other_settings_all_is_drawn_anew(words, whole, shared, tmp_path, capsys):
    other = [words[0], str(shared / "stories260K_meta_fp16"), *words[2:]]
    for command, name in ((other, "checkpoint"), ([*words, "--seed", "1"], "seed: 0 there, 1 here")):
        assert cli.main([*command, "--out", str(whole)]) == 2
        assert "was begun with another recipe" in (said := capsys.readouterr().err) and name in said
    before, fresh = (whole / "answers.jsonl").read_bytes(), tmp_path / "fresh"
    greedy = [*words, "--safety.decoding.temperature", "0"]
    assert [cli.main([*greedy, "--out", str(out)]) for out in (whole, fresh)] == [0, 0]
    assert_same(whole, fresh)
    new = (whole / "answers.jsonl").read_bytes().removeprefix(before)
    assert len(new) < len(before) and len(new.splitlines()) == 6 + 4 + 10 + 3 + 2
