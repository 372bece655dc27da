"""A model as judge: what a biased one and a fair one come to, what it is asked, and that a stopped run goes on."""

import json
from types import SimpleNamespace

import pytest

from llama_jax import cli
from llama_jax.errors import UserError
from llama_jax.evaluation.answer_files import read_answers
from llama_jax.evaluation.pairwise_judge import (
    JudgeConfig,
    Question,
    judge_answers,
    judge_pairs,
    judge_sections,
    llama_judge,
    score_of,
)
from llama_jax.generation.scoring import Score
from llama_jax.text.chat import Llama2Chat, Message

PROMPTS = 12


def write_answers(folder, **answers):
    """A file for each model, whose answer to the prompt n is what `answers` makes of n."""
    for model, answer in answers.items():
        rows = [{"prompt": f"p{n}", "answer": answer(n), "category": "xy"[n % 2]} for n in range(PROMPTS)]
        (folder / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(str(folder / f"{model}.jsonl") for model in answers)


def longer(questions):
    return ["A" if len(q.a) > len(q.b) else "B" if len(q.b) > len(q.a) else "tie" for q in questions]


def always_a(questions):
    return ["A"] * len(questions)


def judged(folder, judge, files, out="judged"):
    return judge_answers(JudgeConfig(files, "a judge", str(folder / out), batch_size=4), lambda: judge)


def test_a_judge_that_always_takes_the_first_finds_nothing_but_ties(tmp_path):
    files = write_answers(tmp_path, aleph=lambda n: "a" * n, beth=lambda n: "b" * (n + 1))
    found = judged(tmp_path, always_a, files)
    assert found["pairs"][0]["all"]["tie"]["share"] == 1.0 and found["pairs"][0]["all"]["n"] == PROMPTS
    assert (found["first_shown"]["share"], found["consistent"]["share"]) == (1.0, 0.0)
    assert {one["value"] for one in found["elo"].values()} == {1000.0}
    assert "| 100.0 (86.2 to 100.0) |" in "\n".join(judge_sections(found))


def test_a_fair_judge_finds_the_better_and_swapped_files_the_same(tmp_path):
    """Aleph is longer for 3 of 4 prompts, equally long for one of the others, and shorter for the rest."""
    files = write_answers(tmp_path, aleph=lambda n: "a" * (9 if n % 4 else 5), beth=lambda n: "b" * (5 if n % 8 else 7))
    found, back = judged(tmp_path, longer, files), judged(tmp_path, longer, files[::-1], "back")
    rates, mirrored = found["pairs"][0]["all"], back["pairs"][0]["all"]
    assert [rates[name]["count"] for name in ("win", "tie", "loss")] == [9, 1, 2]
    assert [mirrored[name]["count"] for name in ("win", "tie", "loss")] == [2, 1, 9]
    assert found["consistent"]["share"] == 1.0 and found["first_shown"]["share"] == 0.5
    assert found["elo"]["aleph"]["value"] == pytest.approx(back["elo"]["aleph"]["value"])
    assert {name: own["win"]["count"] for name, own in found["pairs"][0]["by_category"].items()} == {"x": 3, "y": 6}


def test_a_win_needs_both_orders():
    for verdicts, score in {
        ("A", "B"): 1,
        ("B", "A"): -1,
        ("A", "A"): 0,
        ("A", "tie"): 0,
        ("tie", "B"): 0,
        ("tie", "tie"): 0,
    }.items():
        assert score_of(verdicts) == score
    question = Question((Message("user", "p"),), "one", "two")
    asked = []
    judge_pairs([question], lambda questions: asked.extend(questions) or ["A"] * len(questions))
    assert asked == [question, Question(question.prompt, "two", "one")]


def test_what_cannot_be_judged_is_left_out_and_equal_answers_are_ties(tmp_path):
    files = write_answers(tmp_path, aleph=lambda n: "aa", beth=lambda n: "aa " if n < 3 else "b" * (1 + 40 * (n == 5)))
    asked = []

    def judge(questions):
        asked.extend(questions)
        return [None if len(q.a) > 40 else verdict for q, verdict in zip(questions, longer(questions), strict=True)]

    found = judged(tmp_path, judge, files)
    rates = found["pairs"][0]["all"]
    assert len(asked) == 2 * (PROMPTS - 3) and (found["not_judged"], found["identical"]) == (1, 3)
    assert (rates["n"], rates["win"]["count"], rates["tie"]["count"]) == (PROMPTS - 1, 8, 3)
    assert found["consistent"]["of"] == 8


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    files = write_answers(tmp_path, aleph=lambda n: "a" * n, beth=lambda n: "b" * (6 + n % 3), gimel=lambda n: "c" * 7)
    asked = []

    def stops(questions):
        if len(asked) > 20:
            raise KeyboardInterrupt
        asked.extend(questions)
        return longer(questions)

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path, stops, files)
    before = len(asked)
    rest = []
    found = judged(tmp_path, lambda questions: rest.extend(questions) or longer(questions), files)
    whole = judged(tmp_path, longer, files, "whole")
    assert found == whole and 0 < before < len(rest) and not set(asked) & set(rest)
    # What is done is read again without a judge, and is not taken for another judge's or for other answers.
    config = JudgeConfig(files, "a judge", str(tmp_path / "judged"), batch_size=4)
    assert judge_answers(config, lambda: pytest.fail("nothing is left to judge")) == found
    write_answers(tmp_path, aleph=lambda n: "other")
    with pytest.raises(UserError, match="was begun with another recipe"):
        judge_answers(config, lambda: longer)
    with pytest.raises(UserError, match="name two or more"):
        judged(tmp_path, longer, files[:1], "one")


class Words:
    """A tokenizer with a token for each word."""

    def encode(self, text, *, bos=True):
        return ["<s>"] * bos + text.split()


def fake_llama(context: int, seen: list):
    """Prefers the answer of more words, a tie where they are equal; letters have log-probabilities that do not sum to one."""

    def score(pairs):
        for prompt, letter in pairs:
            text = " ".join(prompt)
            seen.append(text)
            a, b = (text.split(f"[Answer {name}]")[1].split("[")[0].split() for name in "AB")
            best = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C"
            yield Score(-1.0 if letter == [best] else -2.0, 1, False)

    return SimpleNamespace(
        tokenizer=Words(),
        model=SimpleNamespace(config=SimpleNamespace(context_length=context)),
        score=lambda pairs: list(score(pairs)),
    )


def test_a_chat_model_is_asked_in_its_format_and_says_its_likeliest_letter():
    seen: list[str] = []
    judge = llama_judge(fake_llama(200, seen), Llama2Chat())
    prompt = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "How are you?"))
    questions = [Question(prompt, *texts) for texts in (("well thanks", "well"), ("x", "so so"), ("yes", "no"))]
    assert judge(questions) == ["A", "B", "tie"]
    assert seen[0].startswith("<s> [INST] Below are") and seen[0].endswith("[/INST]")
    assert (
        "[Conversation] User: Hello Assistant: Hi User: How are you? [Answer A] well thanks [Answer B] well" in seen[0]
    )


def test_a_chat_model_has_no_verdict_on_what_it_cannot_be_asked():
    prompt = (Message("user", "Hello"),)
    fits, long, tagged = (
        Question(prompt, "a", "b c"),
        Question(prompt, "a " * 200, "b"),
        Question(prompt, "[INST]", "b"),
    )
    judge = llama_judge(fake_llama(200, []), Llama2Chat())
    assert judge([long, fits, tagged]) == [None, "B", None]
    length = len(Llama2Chat().encode(Words(), [Message("user", _asked(fits))]).ids)
    assert llama_judge(fake_llama(length + 1, []), Llama2Chat())([fits]) == ["B"]
    assert llama_judge(fake_llama(length, []), Llama2Chat())([fits]) == [None]


def _asked(question: Question) -> str:
    from llama_jax.evaluation.pairwise_judge import judge_prompt

    return judge_prompt(question)


def test_answers_may_hold_braces(tmp_path):
    files = write_answers(tmp_path, aleph=lambda n: "{a} {0}", beth=lambda n: "{conversation}")
    answers = read_answers(files)
    text = _asked(Question(answers.prompts[0].dialogue, "{a} {0}", "{conversation}"))
    assert "[Answer A]\n{a} {0}\n" in text and "[Answer B]\n{conversation}\n" in text


def test_the_verb(tmp_path, capsys, monkeypatch):
    files = write_answers(tmp_path, aleph=lambda n: "one two three", beth=lambda n: "one" + " two" * (n % 2))
    loaded = []

    def load(path, **how):
        loaded.append((path, how))
        return fake_llama(300, [])

    monkeypatch.setattr("llama_jax.generation.llama.Llama.load", load)
    words = ["compare", "judge", *files, "--judge", "big", "--int8", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "| aleph against beth | all | 12 | 100.0 (75.8 to 100.0) | 0.0 (0.0 to 24.2)" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0 and loaded == [("big", {"mesh": None, "int8": True})]
    assert json.loads(capsys.readouterr().out)["consistent"]["share"] == 1.0
    assert cli.main(["compare", "judge", "--judge", "big", "--out", "x"]) == 2
    assert "no file of answers given" in capsys.readouterr().err
