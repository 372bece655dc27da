"""Ghost Attention's dialogues: what is asked, what is kept, that all depends on seed and number, and that it goes on."""

import itertools
import json
import zlib
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.data.constraints import KINDS, draw_instruction
from llama_jax.data.examples import DialogueConfig, load_examples
from llama_jax.data.questions import QuestionsConfig
from llama_jax.errors import UserError
from llama_jax.stages import ghost_attention
from llama_jax.stages.ghost_attention import GhostAttentionConfig, run
from llama_jax.text.chat import Llama2Chat
from llama_jax.text.tokenizer import Tokenizer
from tests.stages.speaker import either_stop, interrupt, rows_of
from tests.tiny_checkpoint import write_tiny_checkpoint

CONTEXT = 4096
QUESTIONS = [[f"what is {number} and {turn}?" for turn in range(1 + number % 4)] for number in range(10)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Of which the tests use the tokenizer and the context alone."""
    words = "[INST] You enjoy Always act as Napoleon Figure Hobby Language what is and [/INST] <<SYS>> 0 1 2\n"
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "hf", [words] * 20, vocab_size=330, context=CONTEXT)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Dialogues whose own answers and system messages are not to be used."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = []
    for number, questions in enumerate(QUESTIONS):
        messages = [{"role": "system", "content": "Be old."}] if number % 2 else []
        for question in questions:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "An old answer."}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(rows))
    return str(path)


@pytest.fixture
def recipe(base, source, tmp_path):
    def make(**changes) -> GhostAttentionConfig:
        data = QuestionsConfig(sources=(source,), join=changes.pop("join", 1))
        settings = {"checkpoint": str(base), "max_new_tokens": 24, "batch": 3, "out": str(tmp_path / "gatt")} | changes
        return GhostAttentionConfig(data=data, **settings)

    return make


def said_in(row: dict, role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def check(rows: list[dict], asked: dict[str, str]) -> None:
    """Every answer is what the model gave to all before it with the instruction in every question; the rows have it once."""
    for number, row in enumerate(rows):
        instruction, questions = draw_instruction(KINDS, 3, 0, number), QUESTIONS[number % 10]
        prompt = ""
        for question, answer in zip(questions, said_in(row, "assistant"), strict=True):
            prompt = f"{prompt} [INST] {instruction.text} {question} [/INST]".strip()
            assert asked[prompt] == answer
            prompt += f" {answer}"
        given = instruction.short if instruction.shortened else instruction.text
        assert said_in(row, "user") == [f"{given} {questions[0]}", *questions[1:]]
        assert row["instruction"]["constraints"] == dict(instruction.constraints)
        assert row["instruction"]["shortened"] == instruction.shortened


def test_every_answer_saw_the_instruction_in_every_question_and_the_answers_before_it(speak, recipe, capsys):
    speaker, config = speak(), recipe(dialogues=25)
    run(config)
    rows = rows_of(config)
    assert len(rows) == 25 and {row["ended"] for row in rows} == {"whole"}
    assert {row["instruction"]["shortened"] for row in rows} == {False, True}
    check(rows, speaker.asked)
    err = capsys.readouterr().err
    answers = sum(len(QUESTIONS[n % 10]) for n in range(25))
    assert f"25 dialogues with {answers} answers; 25 are whole\n" in err
    out = config.out
    assert f"llama-jax sft {config.checkpoint} --data {out}/dialogues.jsonl --data.answers last --out {out}-sft" in err


def old_answer(rows):
    rows[1]["messages"][1]["content"] = "An old answer."


def another_answer(rows):
    a, b = rows[1]["messages"][1], rows[2]["messages"][1]
    a["content"], b["content"] = b["content"], a["content"]


def instruction_everywhere(rows):
    rows[1]["messages"][2]["content"] = f"{rows[1]['instruction']['text']} {QUESTIONS[1][1]}"


def never_short(rows):
    row = next(row for row in rows if row["instruction"]["shortened"])
    row["messages"][0]["content"] = row["messages"][0]["content"].replace(
        *map(row["instruction"].get, ("short", "text"))
    )


@pytest.mark.parametrize("mutant", [old_answer, another_answer, instruction_everywhere, never_short])
def test_wrong_dialogues_are_noticed(speak, recipe, mutant):
    speaker, config = speak(), recipe()
    run(config)
    rows = rows_of(config)
    check(rows, speaker.asked)
    mutant(rows)
    with pytest.raises((AssertionError, KeyError)):
        check(rows, speaker.asked)


def test_trained_is_the_last_answer_and_its_eos_and_nothing_before(speak, recipe, base):
    speak()
    config = recipe()
    run(config)
    tokenizer = Tokenizer.load(base / "tokenizer.model")
    data = DialogueConfig(sources=(f"{config.out}/dialogues.jsonl",), held_out=0, answers="last")
    examples = load_examples(data, tokenizer, Llama2Chat(), CONTEXT).train
    for number, row in enumerate(rows_of(config)):
        ids, mask = examples[number]
        trained = ids[mask].tolist()
        assert trained[-1] == tokenizer.eos_id and mask[-len(trained) :].all()
        assert tokenizer.decode(trained[:-1]).strip() == said_in(row, "assistant")[-1]


def test_the_instruction_may_be_the_system_message(speak, recipe):
    speaker, config = speak(), recipe(as_system=True)
    run(config)
    for number, row in enumerate(rows_of(config)):
        assert row["messages"][0] == {"role": "system", "content": draw_instruction(KINDS, 3, 0, number).given}
        assert said_in(row, "user") == QUESTIONS[number]
    assert not any("<<SYS>>" in text for text in speaker.asked)  # it is asked as ever


def test_a_dialogue_depends_on_the_seed_and_its_number_alone(speak, recipe, tmp_path):
    speak()
    runs = {
        name: recipe(out=str(tmp_path / name), **changes)
        for name, changes in {"few": {}, "many": {"dialogues": 20, "batch": 7}, "other": {"seed": 1}}.items()
    }
    for config in runs.values():
        run(config)
    few, many, other = (rows_of(config) for config in runs.values())
    assert many[:10] == few and many[10:] != few
    assert all(a != b for a, b in zip(few, other, strict=True))
    assert [said_in(row, "user")[1:] for row in other] == [said_in(row, "user")[1:] for row in few]


def test_dialogues_may_be_joined(speak, recipe):
    speak()
    config = recipe(join=4)
    run(config)
    rows = rows_of(config)
    joined = [list(itertools.chain(*QUESTIONS[at : at + 4])) for at in (0, 4, 8)]
    assert [said_in(row, "user")[1:] for row in rows] == [questions[1:] for questions in joined]


@either_stop
def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_bytes(speak, recipe, tmp_path, stop, error):
    whole, config = recipe(out=str(tmp_path / "whole"), dialogues=14), recipe(dialogues=14)
    everything = speak()
    run(whole)
    before = speak(stop_at=9, stop=stop)
    with pytest.raises(error):
        run(config)
    assert not (Path(config.out) / "dialogues.jsonl").exists()
    after = speak()
    run(config)
    file = Path(config.out) / "dialogues.jsonl"
    assert file.read_bytes() == (Path(whole.out) / "dialogues.jsonl").read_bytes()
    # What was saved was not asked again, which is all but the part that was stopped in.
    assert before.asked.keys() | after.asked.keys() == everything.asked.keys()
    assert 0 < len(before.asked.keys() & after.asked.keys()) < 12 < len(before.asked)
    assert list((Path(config.out) / "samples").iterdir()) == []
    speak(stop_at=1, stop=interrupt)
    run(config)  # finished: nothing is asked
    with pytest.raises(UserError, match=r"begun with another recipe:\n  seed: 0 there, 1 here\n"):
        run(recipe(dialogues=14, seed=1))
    with pytest.raises(UserError, match="holds a run already"):
        run(recipe(dialogues=14, resume="never"))


def test_other_questions_or_lists_are_another_recipe(speak, recipe, tmp_path):
    speak()
    run(recipe())
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "why?", "response": "so"}\n')
    with pytest.raises(UserError, match="questions: "):
        run(GhostAttentionConfig(**vars(recipe()) | {"data": QuestionsConfig(sources=(str(other),))}))
    lists = tmp_path / "lists.json"
    lists.write_text('{"hobby": ["chess"]}')
    with pytest.raises(UserError, match=r"  kinds.figure: "):
        run(recipe(constraints=str(lists)))
    with pytest.raises(UserError, match="--resume must, but"):
        run(recipe(out=str(tmp_path / "none"), resume="must"))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text('{"stage": "sft"}')
    with pytest.raises(UserError, match="holds something else"):
        run(recipe(out=str(tmp_path / "sft")))


def test_a_dialogue_ends_before_an_answer_that_cannot_be_trained(speak, recipe, capsys):
    """Of the tenfold questions those of numbers 3 and 7 have four turns: 3 is never ended, 7 is empty at its third."""

    def say(text, seed):
        turn, number = text.count("[INST]"), int(text.split("what is ")[-1].split()[0])
        return {(3, 3): ("on and on", "length"), (7, 3): (" ", "eos"), (5, 1): ("", "eos")}.get(
            (number, turn), (f"good {turn}", "eos")
        )

    speak(say)
    config = recipe()
    run(config)
    rows = rows_of(config)
    assert [len(said_in(row, "assistant")) for row in rows] == [1, 2, 3, 2, 1, 3, 2, 1, 2]  # 5 is left out
    assert [row["ended"] for row in rows].count("whole") == 7
    report = (
        "7 are whole, and these end early: 1 before an answer longer than --max-new-tokens, 2 before an empty answer"
    )
    assert report + "; 1 without any answer are left out" in capsys.readouterr().err


def test_a_dialogue_ends_at_the_last_turn_that_fits_the_context(speak, recipe, capsys):
    speaker = speak()
    whole = recipe(out=recipe().out + "-whole")
    run(whole)
    longest = max(len(speaker.tokenizer.encode(text)) for text in speaker.asked)
    speaker = speak()
    speaker.model.config.context_length = longest + 10
    config = recipe()
    run(config)
    rows, wholes = rows_of(config), rows_of(whole)
    assert all(
        row["messages"] == other["messages"][: len(row["messages"])] for row, other in zip(rows, wholes, strict=True)
    )
    full = [row for row in rows if row["ended"] == "no room"]
    assert 0 < len(full) < 10 and all(len(row["messages"]) >= 2 for row in full)
    assert f"{len(full)} where the context is full" in capsys.readouterr().err
    speaker.model.config.context_length = 30
    with pytest.raises(UserError, match=r"no dialogue has an answer; they end: 10 where the context is full"):
        run(recipe(out=recipe().out + "-none"))


def test_of_several_samples_the_best_whole_one_is_kept(speak, recipe):
    speak(lambda text, seed: (f"{seed}", "length" if seed % 5 == 0 else "eos"))
    scored = []

    def score(dialogues):
        assert all(dialogue[-1].role == "assistant" for dialogue in dialogues)
        scored.append([int(dialogue[-1].content) for dialogue in dialogues])
        return scored[-1]

    config = recipe()
    run(config, samples=4, score=score)
    expected = set()
    for batch in scored:
        for at in range(0, len(batch), 4):
            assert len(set(batch[at : at + 4])) == 4
            expected.add(max((seed for seed in batch[at : at + 4] if seed % 5), default=None))
    found = {int(answer) for row in rows_of(config) for answer in said_in(row, "assistant")}
    assert found == expected and len(found) == sum(map(len, QUESTIONS))


def test_the_model_may_write_the_lists_and_writes_them_once(speak, recipe):
    def say(text, seed):
        if "Write a list" in text:
            return ("1. sewing\n2. boxing" if "hobbies" in text else "- Homer\n- Plato"), "eos"
        return f"{zlib.crc32(text.encode())} {seed}", "eos"

    speaker = speak(say, stop_at=6, stop=interrupt)
    config = recipe(generate_lists=True)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert sum("Write a list of 40 hobbies" in text for text in speaker.asked) == 1
    again = speak(say)
    run(config)
    assert not any("Write a list" in text for text in again.asked)
    lists = json.loads((Path(config.out) / "constraints.json").read_text())
    assert lists["hobby"]["values"] == ["sewing", "boxing"] and lists["figure"]["values"] == ["Homer", "Plato"]
    assert lists["language"]["values"] == list(KINDS[1].values)
    used = {row["instruction"]["constraints"].get("figure") for row in rows_of(config)}
    assert {"Homer", "Plato"} <= used <= {"Homer", "Plato", None}


def test_a_dry_run_shows_both_forms_and_touches_nothing(base, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ghost_attention.Llama, "load", None)
    out = tmp_path / "none"
    assert cli.main(["ghost-attention", str(base), "--data", source, "--out", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    assert "10 dialogues, 10 to make" in text and text.count("as it is trained") == 3
    asked, trained = text.split("--- dialogue 1")[1].split("--- dialogue 2")[0].split("--- and as it is trained")
    given = draw_instruction(KINDS, 3, 0, 1)
    assert asked.count(given.text) == len(QUESTIONS[1]) and trained.count(given.given) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the model first: llama-jax ghost-attention CHECKPOINT --data FILE.jsonl"),
        (["{base}"], "Set --data.sources to a .jsonl file"),
        (["{base}", "--data", "none.jsonl"], "none.jsonl"),
        (["{base}", "--data", "{source}", "--constraints", "none.json"], "cannot read the constraints in none.json"),
        (["{base}", "--data", "{source}", "--max-new-tokens", "4096"], "leaves no room for a question"),
        (["{base}", "--data", "{source}", "--batch", "0"], "--batch is 0; it must be 1 or more"),
        (["none", "--data", "{source}"], "none is not a checkpoint"),
    ],
)
def test_bad_input_is_refused_with_its_remedy(base, source, words, message, capsys):
    words = [word.format(base=base, source=source) for word in words]
    assert cli.main(["ghost-attention", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == ""


def test_several_samples_need_a_score(recipe):
    with pytest.raises(UserError, match="of 2 samples the best should be kept"):
        run(recipe(), samples=2)
