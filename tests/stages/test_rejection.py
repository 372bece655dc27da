"""Rejection sampling: what is kept is the exact argmax, samples depend on their own number alone, and a run goes on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.config import LLAMA2_7B
from llama_jax.data.examples import DialogueConfig, load_examples
from llama_jax.data.prompts import PromptsConfig
from llama_jax.data.samples import read_samples
from llama_jax.errors import UserError
from llama_jax.generation import answer_scores
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.generation.rewards import RewardInfo
from llama_jax.stages import rejection
from llama_jax.stages.rejection import RejectionConfig, run
from llama_jax.text.chat import Llama2Chat, Message, Plain
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.held_out_pairs import Findings
from tests.stages.speaker import QUESTIONS, either_stop, interrupt, row_of, rows_of, value
from tests.tiny_checkpoint import write_tiny_checkpoint

CONTEXT = 192


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    words = "[INST] what is and [/INST] <<SYS>> 0 1 2 the answer old one\n"
    folder = tmp_path_factory.mktemp("base") / "hf"
    return write_tiny_checkpoint(folder, [words] * 20, vocab_size=320, context=CONTEXT)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row_of(number)) + "\n" for number in range(10)))
    return str(path)


@pytest.fixture
def recipe(base, source, tmp_path):
    def make(**changes) -> RejectionConfig:
        settings = {"checkpoint": str(base), "max_new_tokens": 24, "samples": 4, "batch": 12}
        settings |= {"out": str(tmp_path / "rs"), "data": PromptsConfig(sources=(source,))}
        return RejectionConfig(**settings | changes)

    return make


def check(kept: list[dict], samples: list[dict], score=float) -> None:
    """Of each prompt the first of the samples whose score none exceeds, by a search of its own."""
    assert len(kept) == len(samples)
    for dialogue, row in zip(kept, samples, strict=True):
        best = None
        for one in row["samples"] + row["earlier"]:
            assert one["score"] == score(one["text"])
            if best is None or one["score"] > best["score"]:
                best = one
        assert dialogue["messages"] == [*row["prompt"], {"role": "assistant", "content": best["text"]}]
        assert (dialogue["sample"], dialogue["temperature"]) == (best["sample"], best["temperature"])
        assert dialogue.get("run") == best.get("run")


@pytest.mark.parametrize("modulus", [1000, 3, 1], ids=["few ties", "many ties", "all equal"])
def test_the_exact_argmax_is_kept_and_of_equal_ones_the_first(speak, recipe, modulus):
    speak()
    config = recipe(samples=7, temperatures=(0.8, 1.2))
    run(config, score=lambda dialogues: [v % modulus for v in value(dialogues)])
    kept, samples = rows_of(config), read_samples(config.out)
    check(kept, samples, lambda text: int(text) % modulus)
    assert len(kept) == 10 and all(len(row["samples"]) == 14 for row in samples)
    assert {row["sample"] for row in kept} == {0} if modulus == 1 else len({row["sample"] for row in kept}) > 1
    assert [row["messages"][-2]["content"] for row in kept] == QUESTIONS
    assert [len(row["messages"]) for row in kept] == [5 if n % 3 == 0 else 2 for n in range(10)]


def second_best(kept, samples):
    _, second, *_ = sorted(samples[3]["samples"], key=lambda one: -one["score"])
    kept[3]["messages"][-1]["content"] = second["text"]


def last_of_equal_ones(kept, samples):
    kept[3]["sample"] = samples[3]["samples"][-1]["sample"]


def of_another_prompt(kept, samples):
    kept[3]["messages"][-1], kept[4]["messages"][-1] = kept[4]["messages"][-1], kept[3]["messages"][-1]


@pytest.mark.parametrize(
    ("mutant", "modulus"), [(second_best, 1000), (last_of_equal_ones, 1), (of_another_prompt, 1000)]
)
def test_a_wrong_choice_is_noticed(speak, recipe, mutant, modulus):
    speak()
    run(recipe(), score=lambda dialogues: [v % modulus for v in value(dialogues)])
    kept, samples = rows_of(recipe()), read_samples(recipe().out)
    mutant(kept, samples)
    with pytest.raises(AssertionError):
        check(kept, samples, lambda text: int(text) % modulus)


def test_every_sample_was_asked_with_its_own_seed_and_what_is_kept_is_trained_on(speak, recipe, base, capsys):
    speaker, config = speak(), recipe(temperatures=(0.8, 1.2))
    run(config, score=value)
    asked = set(speaker.calls)
    assert len(asked) == 10 * 4 * 2 and len({seed for _, seed, _ in asked}) == 80
    out, err = config.out, capsys.readouterr().err
    assert "\n80 samples in " in err
    assert f"llama-jax sft {config.checkpoint} --data {out}/dialogues.jsonl --data.answers last --out {out}-sft" in err
    tokenizer = Tokenizer.load(base / "tokenizer.model")
    data = DialogueConfig(sources=(f"{out}/dialogues.jsonl",), held_out=0, answers="last")
    examples = load_examples(data, tokenizer, Llama2Chat(), CONTEXT).train
    for number, row in enumerate(rows_of(config)):
        ids, mask = examples[number]
        assert tokenizer.decode(ids[mask].tolist()[:-1]).strip() == row["messages"][-1]["content"]


def texts_of(config: RejectionConfig) -> dict:
    return {
        (number, one["temperature"], one["sample"]): one["text"]
        for number, row in enumerate(read_samples(config.out))
        for one in row["samples"]
    }


def test_a_sample_depends_on_seed_prompt_number_and_temperature_alone(speak, recipe, tmp_path):
    speak()
    few, many, other = (
        recipe(out=str(tmp_path / "few"), samples=3, temperatures=(1.0,), batch=4),
        recipe(out=str(tmp_path / "many"), samples=9, temperatures=(0.7, 1.0), batch=64),
        recipe(out=str(tmp_path / "other"), samples=3, temperatures=(1.0,), seed=1),
    )
    for config in (few, many, other):
        run(config, score=value)
    assert texts_of(few).items() <= texts_of(many).items()
    assert all(text != texts_of(few)[key] for key, text in texts_of(other).items())
    assert len(set(texts_of(many).values())) > 150  # of 180 drawn from 1000


@pytest.mark.parametrize("batch", [5, 64])
def test_a_real_model_gives_each_prompt_what_it_would_by_itself(base, recipe, tmp_path, batch):
    """K samples from one reading of a prompt, in parts of any size, are those of separate runs."""
    config = recipe(batch=batch, max_new_tokens=6, samples=3, temperatures=(1.0, 1.3))
    run(config, score=lambda dialogues: [len(dialogue[-1].content) for dialogue in dialogues])
    llama, template = Llama.load(base), Llama2Chat()
    samples = read_samples(config.out)
    for number in (0, 1, 9):
        for one in samples[number]["samples"]:
            prompt = tuple(Message(**turn) for turn in samples[number]["prompt"])
            seed = seed_of(0, number, one["sample"], rejection._bits(one["temperature"]))
            settings = {"max_new_tokens": 6, "temperature": one["temperature"], "top_p": 1.0}
            (alone,) = reply_to(llama, [prompt], template, seeds=[seed], **settings)
            assert (one["text"], one["ended"]) == tuple(alone)
    assert len({one["text"] for row in samples for one in row["samples"]}) > 50


@either_stop
def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_bytes(speak, recipe, tmp_path, stop, error):
    old = recipe(out=str(tmp_path / "old"), seed=5)
    speak()
    run(old, score=value)
    settings = {"temperatures": (0.8, 1.2), "pool": (old.out,)}
    whole, config = recipe(out=str(tmp_path / "whole"), **settings), recipe(**settings)
    everything = speak()
    run(whole, score=value)
    before = speak(stop_at=5, stop=stop)
    with pytest.raises(error):
        run(config, score=value)
    assert not (Path(config.out) / "samples.jsonl").exists()
    after = speak()
    run(config, score=value)
    for name in ("samples.jsonl", "dialogues.jsonl"):
        assert (Path(config.out) / name).read_bytes() == (Path(whole.out) / name).read_bytes()
    # What was saved was not asked again.
    assert {*before.calls, *after.calls} == {*everything.calls}
    assert len(after.calls) < len(everything.calls) and list((Path(config.out) / "samples").iterdir()) == []
    speak(stop_at=1, stop=interrupt)
    run(config, score=value)  # finished: nothing is asked
    (Path(config.out) / "dialogues.jsonl").unlink()
    run(config, score=value)  # and selects from what is there
    assert rows_of(config) == rows_of(whole)
    with pytest.raises(UserError, match=r"begun with another recipe:\n  samples: 4 there, 5 here\n"):
        run(recipe(samples=5, **settings), score=value)
    with pytest.raises(UserError, match="\n  pool: "):
        run(replace(config, pool=()), score=value)
    with pytest.raises(UserError, match="holds a run already"):
        run(replace(config, resume="never"), score=value)


def test_samples_of_earlier_runs_win_where_they_are_better_by_this_runs_score(speak, recipe, tmp_path, capsys):
    """Scores of the earlier run, by another judge, count for nothing; its own prompts are kept too."""
    extra = tmp_path / "extra.jsonl"
    rows = [*map(row_of, (9, 2, 4)), {"messages": [{"role": "user", "content": "what is old?"}]}]
    extra.write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = recipe(out=str(tmp_path / "old"), data=PromptsConfig(sources=(str(extra),)), seed=5)
    speak()
    run(old, score=lambda dialogues: [-v for v in value(dialogues)])
    alone, both = recipe(out=str(tmp_path / "alone")), recipe(pool=(old.out,))
    for config in (alone, both):
        run(config, score=value)
    kept, samples = rows_of(both), read_samples(both.out)
    check(kept, samples)
    assert [row["samples"] for row in samples[:10]] == [row["samples"] for row in read_samples(alone.out)]
    assert [len(row["earlier"]) for row in samples] == [0, 0, 4, 0, 4, 0, 0, 0, 0, 4, 4]
    assert samples[10]["samples"] == [] and kept[10]["messages"][0]["content"] == "what is old?"
    better = [number for number in (2, 4, 9) if kept[number] != rows_of(alone)[number]]
    assert len(better) > 0 and all(kept[number]["run"] == old.out for number in better)
    for number, (one, other) in enumerate(zip(kept, rows_of(alone), strict=False)):
        assert one["score"] >= other["score"] and ("run" in one) == (number in better)
    assert f"{len(better) + 1} of these are from earlier runs" in capsys.readouterr().err
    equal = recipe(out=str(tmp_path / "equal"), pool=(old.out,))
    run(equal, score=lambda dialogues: [0.0] * len(dialogues))
    assert [row.get("run") for row in rows_of(equal)] == [None] * 10 + [old.out]  # of equal ones this run's


def test_cut_answers_are_judged_and_flagged_and_empty_ones_never_kept(speak, recipe, capsys):
    """Even where the score would have it so; and of prompt 5 there are only empty ones."""
    judged = []

    def say(text, seed):
        if QUESTIONS[5] in text:
            return " ", "eos"
        return [("", "eos"), ("9", "length"), ("", "length"), ("3", "eos")][seed % 4]

    def score(dialogues):
        judged.extend(dialogue[-1].content for dialogue in dialogues)
        return [{"9": 2.0, "3": 1.0}[dialogue[-1].content] for dialogue in dialogues]

    speak(say)
    config = recipe(samples=8)
    run(config, score=score)
    assert set(judged) == {"9", "3"}
    kept, samples = rows_of(config), read_samples(config.out)
    assert len(kept) == 9 and {(row["score"], row["ended"]) for row in kept} <= {(2.0, "too long"), (1.0, "whole")}
    assert all((one["score"] is None) == (one["text"] == "") for row in samples for one in row["samples"])
    cut = sum(row["ended"] == "too long" for row in kept)
    err = capsys.readouterr().err
    assert cut and f"{cut} of these were cut by --max-new-tokens; 1 prompts without one are left out" in err
    speak(lambda text, seed: ("", "eos"))
    with pytest.raises(UserError, match="not one answer .* is both not empty and possible to judge"):
        run(recipe(out=config.out + "-none"), score=score)


def test_what_cannot_be_judged_is_never_kept(speak, recipe):
    speak()
    config = recipe()
    run(config, score=lambda dialogues: [v if v < 500 else -math.inf for v in value(dialogues)])
    assert all(row["score"] < 500 for row in rows_of(config))
    assert any(one["score"] is None for row in read_samples(config.out) for one in row["samples"])


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda dialogues: [math.nan] * len(dialogues), "the score of answer 0 of 8 is nan"),
        (lambda dialogues: [math.inf] * len(dialogues), "the score of answer 0 of 8 is inf"),
        (lambda dialogues: [1.0], r"gave float64 of shape \(1,\) for 8 dialogues"),
        (lambda dialogues: [[1.0]] * len(dialogues), r"of shape \(8, 1\) for 8"),
        (lambda dialogues: ["good"] * len(dialogues), "gave <U4 of shape"),
    ],
)
def test_scores_that_are_none_are_refused_and_what_was_saved_stays(speak, recipe, score, message):
    speak()
    good = 2

    def later_bad(dialogues):
        nonlocal good
        good -= 1
        return value(dialogues) if good >= 0 else score(dialogues)

    with pytest.raises(UserError, match=message):
        run(recipe(), score=later_bad)
    assert len(list((Path(recipe().out) / "samples").iterdir())) == 2
    run(recipe(), score=value)
    check(rows_of(recipe()), read_samples(recipe().out))


def test_a_prompt_is_asked_once_and_one_without_room_not_at_all(speak, recipe, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    long = {"messages": [{"role": "user", "content": "what is " * CONTEXT}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (row_of(1), long, row_of(2), row_of(1))))
    speaker = speak()
    config = recipe(data=PromptsConfig(sources=(str(path),)))
    run(config, score=value)
    assert [row["messages"][-2]["content"] for row in rows_of(config)] == [QUESTIONS[1], QUESTIONS[2]]
    err = capsys.readouterr().err
    assert "1 are there already" in err and "1 of 3 prompts leave no room for an answer" in err
    assert len(set(speaker.calls)) == 8
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(UserError, match="none of 1 prompts leaves room for --max-new-tokens 24"):
        run(recipe(data=PromptsConfig(sources=(str(path),))), score=value)


@pytest.fixture
def judge(monkeypatch):
    """Lets a reward model be found at any path, with these findings."""

    def use(findings: Findings | None, plain: bool = False) -> None:
        template = Plain() if plain else Llama2Chat()
        monkeypatch.setattr(answer_scores, "newest_readable", lambda path: path / "checkpoints" / "7")
        monkeypatch.setattr(
            answer_scores, "reward_info", lambda folder: RewardInfo(folder, LLAMA2_7B, None, "", template, findings)
        )

    return use


def test_the_reward_model_judges_and_is_named_by_its_checkpoint(speak, recipe, judge, monkeypatch, capsys):
    judge(Findings(pairs=100, accuracy=0.5, length_correlation=0.0, padding_change=0.0))
    loaded = []
    monkeypatch.setattr(answer_scores, "make_score", lambda path, mesh: loaded.append((path, mesh)) or value)
    speak()
    words = [f"--{name.replace('_', '-')}={getattr(recipe(), name)}" for name in ("max_new_tokens", "batch", "out")]
    words += ["--samples", "4", "--temperatures", "0.8", "1.2", "--reward", "helpful"]
    assert cli.main(["reject", recipe().checkpoint, "--data", *recipe().data.sources, *words]) == 0
    assert loaded == [(Path("helpful/checkpoints/7"), None)]
    check(rows_of(recipe()), read_samples(recipe().out))
    err = capsys.readouterr().err
    assert "warning: helpful is a poor judge: its accuracy on 100 held-out pairs is 50.0%" in err
    page = (Path(recipe().out) / "report.md").read_text()
    assert "the best of 2)" in page and f"{recipe().out}/report.md" in err
    known = json.loads((Path(recipe().out) / "config.json").read_text())["recipe"]
    assert known["reward"] == str(Path("helpful/checkpoints/7").resolve())
    judge(None, plain=True)
    with pytest.raises(UserError, match="was trained with --plain, and is used without it"):
        run(recipe(reward="helpful"))


def test_a_dry_run_shows_what_would_be_asked_and_touches_nothing(speak, recipe, tmp_path, judge, capsys, monkeypatch):
    old = recipe(out=str(tmp_path / "old"))
    speak()
    run(old, score=value)
    monkeypatch.setattr(rejection.Llama, "load", None)
    judge(Findings(1000, 0.9, 0.1, 0.0))
    words = ["--reward", "rm", "--pool", old.out, "--out", str(tmp_path / "none"), "--dry-run", "--samples", "6"]
    words += ["--temperatures", "0.8", "1", "--max-new-tokens", "24"]
    capsys.readouterr()
    assert cli.main(["reject", old.checkpoint, "--data", *old.data.sources, *words]) == 0
    out = capsys.readouterr().out
    assert "samples      120: 6 to each prompt at each of the temperatures 0.8, 1\n" in out
    assert "pool         40 samples of 1 earlier runs; 0 prompts are theirs alone\n" in out
    assert f"--- prompt 1\nuser: {QUESTIONS[1]}\n" in out and "An old answer" not in out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the model first: llama-jax reject CHECKPOINT --data FILE.jsonl --reward RUN"),
        (["{base}"], "Set --data.sources to a .jsonl file"),
        (["{base}", "--data", "{source}"], "name the reward model that judges, with --reward"),
        (["{base}", "--data", "{source}", "--reward", "none"], "none is not a checkpoint: it does not exist"),
        (["{base}", "--data", "{source}", "--reward", "{base}"], "is not a checkpoint"),
        (["{base}", "--data", "none.jsonl", "--reward", "rm"], "none is not a checkpoint|rm is not a checkpoint"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--samples", "0"], "--samples is 0; it must be 1 or more"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--temperatures", "0"], "different numbers above 0"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--temperatures", "1", "1"], "different numbers above 0"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--top-p", "0"], "--top-p is 0.0; it is a probability"),
        (["{base}", "--data", "{source}", "--reward", "rm", "--out", "x", "--pool", "./x"], "itself; name the folders"),
        (["none", "--data", "{source}", "--reward", "rm"], "none is not a checkpoint"),
    ],
)
def test_bad_input_is_refused_with_its_remedy(base, source, words, message, capsys):
    words = [word.format(base=base, source=source) for word in words]
    assert cli.main(["reject", *words]) == 2
    out, err = capsys.readouterr()
    assert any(part in err for part in message.split("|")) and "Traceback" not in err and out == ""


def test_a_pool_that_is_none_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="expected the folder of a finished llama-jax reject"):
        run(recipe(pool=(str(tmp_path / "nothing"),)), score=value)
    (tmp_path / "samples.jsonl").write_text('{"prompt": [{"role": "user", "content": "[INST]"}], "samples": []}\n')
    with pytest.raises(UserError, match=r"samples.jsonl:1 is no row of samples .*holds '\[INST\]'"):
        run(recipe(pool=(str(tmp_path),)), score=value)
    with pytest.raises(UserError, match="both --reward rm and a score function judge"):
        run(recipe(reward="rm"), score=value)
