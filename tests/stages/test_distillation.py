"""Safety context distillation: only what the judge scores above the original answer is kept, and it is trained on as if no
preprompt had been there.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.data.examples import DialogueConfig, load_examples
from llama_jax.data.prompts import PromptsConfig
from llama_jax.data.samples import read_samples
from llama_jax.errors import UserError
from llama_jax.generation import answer_scores
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.stages import distillation
from llama_jax.stages.distillation import DistillationConfig, run
from llama_jax.text.chat import Llama2Chat, Message
from llama_jax.text.tokenizer import Tokenizer
from tests.stages.speaker import QUESTIONS, either_stop, interrupt, row_of, rows_of, value
from tests.tiny_checkpoint import write_tiny_checkpoint

CONTEXT = 192
RISKS = ("hateful", "", "illicit", "new", "", "hateful", "illicit", "new", "hateful", "")
ADVERSARIAL = [number for number in range(10) if RISKS[number]]
PREPROMPTS = {
    "generic": ["Be wise.", "Be safe.", "Be good."],
    "hateful": ["No words."],
    "illicit": ["No deeds.", "Law."],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    words = "[INST] what is and [/INST] <<SYS>> 0 1 2 the answer old one Be wise safe good No words deeds Law.\n"
    folder = tmp_path_factory.mktemp("base") / "hf"
    return write_tiny_checkpoint(folder, [words] * 20, vocab_size=330, context=CONTEXT)


def written(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return written(
        tmp_path_factory.mktemp("data") / "prompts.jsonl", (row_of(number, risk=RISKS[number]) for number in range(10))
    )


@pytest.fixture(scope="module")
def preprompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("preprompts") / "preprompts.json"
    path.write_text(json.dumps(PREPROMPTS))
    return str(path)


@pytest.fixture
def recipe(base, source, preprompts, tmp_path):
    def make(**changes) -> DistillationConfig:
        settings = {"checkpoint": str(base), "max_new_tokens": 24, "batch": 12, "preprompts": preprompts}
        settings |= {"out": str(tmp_path / "cd"), "data": PromptsConfig(sources=(source,))}
        return DistillationConfig(**settings | changes)

    return make


def check(kept: list[dict], samples: list[dict], score=float) -> None:
    """Of each prompt the first of the best answers behind a preprompt, where its score is above the original's."""
    expected = []
    for row in samples:
        assert all(one["score"] == score(one["text"]) for one in (row["original"], *row["samples"]))
        best = None
        for one in row["samples"]:
            if best is None or score(one["text"]) > score(best["text"]):
                best = one
        if score(best["text"]) > score(row["original"]["text"]):
            answer = {"role": "assistant", "content": best["text"]}
            how = {name: best[name] for name in ("kind", "preprompt", "sample", "score")}
            expected.append({"messages": [*row["prompt"], answer], "original_score": row["original"]["score"]} | how)
    assert len(kept) == len(expected)
    for row, other in zip(kept, expected, strict=True):
        assert {name: row[name] for name in other} == other


@pytest.mark.parametrize("modulus", [1000, 3, 2], ids=["few ties", "many ties", "yes or no"])
def test_only_what_scores_above_the_original_answer_is_kept(speak, recipe, modulus):
    speak()
    config = recipe(samples=2, kinds=("generic", "tailored"))
    run(config, score=lambda dialogues: [v % modulus for v in value(dialogues)])
    kept, samples = rows_of(config), read_samples(config.out)
    check(kept, samples, lambda text: int(text) % modulus)
    assert 0 < len(kept) < len(ADVERSARIAL) and all(len(row["samples"]) == 4 for row in samples)
    assert all(row["score"] > row["original_score"] for row in kept)


def test_an_answer_as_good_as_the_original_is_not_kept(speak, recipe):
    speak()
    with pytest.raises(UserError, match="scores above the original one: there is nothing to distil"):
        run(recipe(samples=3), score=lambda dialogues: [0.0] * len(dialogues))
    assert len(read_samples(recipe().out)) == len(ADVERSARIAL)  # for people to look into


def test_an_answer_like_the_original_is_not_kept_for_the_rounding_of_its_place_in_a_batch(speak, recipe):
    speak(lambda text, seed: (str(seed % 2), "eos"))
    config = recipe(samples=2)
    run(config, score=lambda dialogues: [v + 1e-7 * place for place, v in enumerate(value(dialogues))])
    assert {(row["messages"][-1]["content"], int(row["original_score"])) for row in rows_of(config)} == {("1", 0)}
    assert any(one["text"] == row["original"]["text"] for row in read_samples(config.out) for one in row["samples"])


def ungated(kept, samples):
    (row,) = [row for row in samples if max(map(number_of, row["samples"])) < number_of(row["original"])][:1]
    kept.append(kept[0] | {"messages": [*row["prompt"], {"role": "assistant", "content": row["samples"][0]["text"]}]})


def with_its_preprompt(kept, samples):
    kept[0]["messages"][-2]["content"] = f"{kept[0]['preprompt']}\n\n{kept[0]['messages'][-2]['content']}"


def the_original(kept, samples):
    (row,) = [row for row in samples if row["prompt"] == kept[0]["messages"][:-1]]
    kept[0]["messages"][-1]["content"] = row["original"]["text"]


def number_of(one) -> int:
    return int(one["text"])


@pytest.mark.parametrize("mutant", [ungated, with_its_preprompt, the_original])
def test_a_wrong_choice_is_noticed(speak, recipe, mutant):
    speak()
    run(recipe(samples=1), score=value)
    kept, samples = rows_of(recipe()), read_samples(recipe().out)
    check(kept, samples)
    mutant(kept, samples)
    with pytest.raises(AssertionError):
        check(kept, samples)


def test_the_model_sees_preprompts_and_the_judge_and_the_training_do_not(speak, recipe, base, capsys):
    speaker, seen = speak(), []

    def score(dialogues):
        seen.extend(dialogues)
        return value(dialogues)

    config = recipe(samples=2, kinds=("generic", "tailored"))
    run(config, score=score)
    every = [text for texts in PREPROMPTS.values() for text in texts]
    for text, *_ in speaker.calls:
        before, question = text.removesuffix("? [/INST]").rsplit("what is ", 1)
        assert f"what is {question}?" in QUESTIONS
        assert before.endswith((*(f"{one} " for one in every), "[INST] ", "<</SYS>> "))
    assert any(text.rstrip().endswith("No words. what is 0 and 0? [/INST]") for text, *_ in speaker.calls)
    asked = {tuple(message) for dialogue in seen for message in dialogue if message.role == "user"}
    assert {content for _, content in asked} == {QUESTIONS[n] for n in ADVERSARIAL} | {"what is the old one?"}
    tokenizer = Tokenizer.load(base / "tokenizer.model")
    data = DialogueConfig(sources=(f"{config.out}/dialogues.jsonl",), held_out=0, answers="last")
    for (ids, mask), row in zip(
        load_examples(data, tokenizer, Llama2Chat(), CONTEXT).train, rows_of(config), strict=True
    ):
        assert tokenizer.decode(ids[mask].tolist()[:-1]).strip() == row["messages"][-1]["content"]
        assert not any(one in tokenizer.decode(ids.tolist()) for one in every)
    err = capsys.readouterr().err
    assert (
        f"llama-jax sft {config.checkpoint} --data {config.out}/dialogues.jsonl OTHERS.jsonl --data.answers last" in err
    )
    assert "adversarial: 3 hateful, 2 illicit, 2 new" in err and "3 of 10 prompts are not adversarial" in err
    assert "no tailored preprompt for the risk category new: generic ones stand in" in err


def test_a_prompt_gets_the_preprompts_of_its_category_and_none_twice_while_there_are_others(speak, recipe):
    speak()
    config = recipe(samples=3, kinds=("tailored", "generic"), batch=64)
    run(config, score=value)
    for row, number in zip(read_samples(config.out), ADVERSARIAL, strict=True):
        assert row["risk"] == RISKS[number] and row["original"]["preprompt"] == row["original"]["kind"] == ""
        drawn = {
            kind: [one["preprompt"] for one in row["samples"] if one["kind"] == kind]
            for kind in ("tailored", "generic")
        }
        if row["risk"] == "new":  # generic ones stand in
            assert drawn["tailored"] == [] and len(drawn["generic"]) == 6
        else:
            assert set(drawn["tailored"]) == set(PREPROMPTS[row["risk"]]) and len(drawn["tailored"]) == 3
        assert set(drawn["generic"]) == set(PREPROMPTS["generic"])
    assert [one["sample"] for one in row["samples"]] == [1, 2, 3, 4, 5, 6]


def test_what_is_drawn_depends_neither_on_parts_nor_on_how_many_are_drawn(speak, recipe, tmp_path):
    speak()
    few, many, other = (
        recipe(out=str(tmp_path / name), samples=samples, batch=batch, seed=seed)
        for name, samples, batch, seed in (("few", 1, 3, 0), ("many", 4, 64, 0), ("other", 1, 3, 1))
    )
    for config in (few, many, other):
        run(config, score=value)
    rows = [[(row["original"], row["samples"][0]) for row in read_samples(config.out)] for config in (few, many, other)]
    assert rows[0] == rows[1]
    texts = [[one["text"] for pair in own for one in pair] for own in rows]
    assert not any(a == b for a, b in zip(texts[0], texts[2], strict=True)) and len(set(texts[0])) > 10


@pytest.mark.parametrize("batch", [3, 64])
def test_a_real_model_gives_each_prompt_what_it_would_by_itself(base, recipe, batch):
    config = recipe(batch=batch, max_new_tokens=6, samples=2)
    run(config, score=lambda dialogues: [len(dialogue[-1].content) for dialogue in dialogues])
    llama, samples = Llama.load(base), read_samples(config.out)
    for number in (0, 1, 6):
        *before, last = (Message(**turn) for turn in samples[number]["prompt"])
        for k, one in enumerate((samples[number]["original"], *samples[number]["samples"])):
            text = f"{one['preprompt']}\n\n{last.content}" if k else last.content
            settings = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "seeds": [seed_of(0, number, k)]}
            (alone,) = reply_to(llama, [[*before, Message("user", text)]], Llama2Chat(), **settings)
            assert (one["text"], one["ended"]) == tuple(alone)


@either_stop
def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_bytes(speak, recipe, tmp_path, stop, error):
    whole, config = (recipe(out=str(tmp_path / name), batch=6, samples=2) for name in ("whole", "stopped"))
    everything = speak()
    run(whole, score=value)
    before = speak(stop_at=2, stop=stop)
    with pytest.raises(error):
        run(config, score=value)
    assert not (Path(config.out) / "samples.jsonl").exists()
    after = speak()
    run(config, score=value)
    for name in ("samples.jsonl", "dialogues.jsonl"):
        assert (Path(config.out) / name).read_bytes() == (Path(whole.out) / name).read_bytes()
    assert {*before.calls, *after.calls} == {*everything.calls} and len(after.calls) < len(everything.calls)
    assert list((Path(config.out) / "samples").iterdir()) == []
    speak(stop_at=1, stop=interrupt)
    run(config, score=value)  # finished: nothing is asked
    with pytest.raises(UserError, match=r"begun with another recipe:\n  samples: 2 there, 5 here\n"):
        run(replace(config, samples=5), score=value)
    with pytest.raises(UserError, match="\n  preprompts: "):
        run(replace(config, preprompts=""), score=value)
    with pytest.raises(UserError, match="holds a run already"):
        run(replace(config, resume="never"), score=value)


def test_an_original_that_cannot_be_judged_is_worse_than_any_answer_that_can(speak, recipe, capsys):
    def say(text, seed):
        if "No " in text or "Law" in text or "Be " in text.split("<</SYS>>")[-1]:
            return ("", "eos") if QUESTIONS[5] in text else ("3", "length")
        return ("", "eos") if QUESTIONS[2] in text else ("9" if QUESTIONS[6] in text else "1", "eos")

    speak(say)
    config = recipe()
    run(config, score=lambda dialogues: [v if v < 9 else -math.inf for v in value(dialogues)])
    kept = {row["messages"][-2]["content"]: row for row in rows_of(config)}
    assert set(kept) == {QUESTIONS[n] for n in ADVERSARIAL if n != 5}
    assert kept[QUESTIONS[2]]["original_score"] is None and kept[QUESTIONS[6]]["original_score"] is None
    err = capsys.readouterr().err
    assert (
        "6 of 7 prompts (85.7%) have an answer that scores above the original, by 2 in the mean; 6 of these were cut"
        in err
    )
    assert err.partition("; by risk category: ")[2].splitlines()[0] == "hateful 2/3, illicit 2/2, new 2/2"


def test_prompts_that_leave_no_room_with_their_preprompts_are_left_out(speak, recipe, tmp_path, capsys):
    words = "what is " * 20
    rows = [{"messages": [{"role": "user", "content": words}], "risk": risk} for risk in ("hateful", "long")]
    rows[1]["messages"][0]["content"] += "and"
    path = tmp_path / "preprompts.json"
    path.write_text(json.dumps(PREPROMPTS | {"long": ["Be wise. " * 60]}))
    source = PromptsConfig(sources=(written(tmp_path / "rows.jsonl", rows),))
    speaker, config = speak(), recipe(data=source, preprompts=str(path), samples=8)
    run(config, score=value)
    assert "1 of 2 prompts leave no room for an answer" in capsys.readouterr().err
    assert len(read_samples(config.out)) == 1 and not any("and" in text for text, *_ in speaker.calls)
    source = PromptsConfig(sources=(written(tmp_path / "long.jsonl", rows[1:]),))
    with pytest.raises(UserError, match="none of 1 prompts leaves room, with a preprompt, for --max-new-tokens 24"):
        run(recipe(data=source, preprompts=str(path)), score=value)


def test_the_verb_names_its_judge_and_writes_a_report(speak, recipe, monkeypatch, capsys):
    monkeypatch.setattr(distillation, "find_judge", lambda path, template: Path(path) / "checkpoints" / "7")
    loaded = []
    monkeypatch.setattr(answer_scores, "make_score", lambda path, mesh: loaded.append((path, mesh)) or value)
    speak()
    words = [
        f"--{name.replace('_', '-')}={getattr(recipe(), name)}" for name in ("max_new_tokens", "preprompts", "out")
    ]
    words += ["--samples", "2", "--kinds", "generic", "tailored", "--reward", "safe"]
    assert cli.main(["distill", recipe().checkpoint, "--data", *recipe().data.sources, *words]) == 0
    assert loaded == [(Path("safe/checkpoints/7"), None)]
    check(rows_of(recipe()), read_samples(recipe().out))
    assert f"report: {recipe().out}/report.md" in capsys.readouterr().err
    known = json.loads((Path(recipe().out) / "config.json").read_text())["recipe"]
    assert known["reward"] == str(Path("safe/checkpoints/7").resolve()) and known["kinds"] == ["generic", "tailored"]


def test_a_dry_run_shows_what_would_be_asked_and_touches_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distillation, "find_judge", lambda path, template: Path(path))
    monkeypatch.setattr(distillation.Llama, "load", None)
    words = ["--preprompts", recipe().preprompts, "--reward", "safe", "--out", str(tmp_path / "none"), "--dry-run"]
    assert (
        cli.main(["distill", recipe().checkpoint, "--data", *recipe().data.sources, *words, "--max-new-tokens=9"]) == 0
    )
    out = capsys.readouterr().out
    assert "answers      14: 2 to each prompt\n" in out and "preprompts   illicit: 2\n" in out
    assert f"--- prompt 0 (hateful)\noriginal: {QUESTIONS[0]}\ntailored: No words.\n\n{QUESTIONS[0]}\n" in out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the model first: llama-jax distill CHECKPOINT --data FILE.jsonl --reward RUN"),
        (["{base}"], "Set --data.sources to a .jsonl file"),
        (["{base}", "--data", "{source}"], "name the safety reward model that judges, with --reward"),
        (["{base}", "--data", "{source}", "--reward", "{base}"], "is not a checkpoint"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--samples", "0"], "--samples is 0; it must be 1 or more"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--kinds", "generic", "generic"], "each once"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--kinds", "nice"], "nice"),
        (
            ["{base}", "--data", "{source}", "--reward", "rm", "--temperature", "-1"],
            "--temperature is -1.0; expected 0",
        ),
        (["{base}", "--data", "{source}", "--reward", "rm", "--top-p", "0"], "--top-p is 0.0; it is a probability"),
        (["none", "--data", "{source}", "--reward", "rm"], "none is not a checkpoint"),
    ],
)
def test_bad_input_is_refused_with_its_remedy(base, source, words, message, capsys):
    words = [word.format(base=base, source=source) for word in words]
    assert cli.main(["distill", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == ""


def test_prompts_without_any_risk_are_refused(recipe):
    data = replace(recipe().data, category="hazard")
    with pytest.raises(UserError, match="none of 10 prompts is adversarial.* --data.category .it is hazard"):
        run(recipe(data=data), score=value)
    with pytest.raises(UserError, match="both --reward rm and a score function judge"):
        run(recipe(reward="rm"), score=value)
