"""What a model is asked: stops and budgets, prompts that are too long, and an evaluation that goes on where it was stopped."""

import json
import os
import signal

import pytest

from llama_jax.errors import Preempted, UserError
from llama_jax.evaluation import engine as engine_module
from llama_jax.evaluation.engine import Answers, Engine
from llama_jax.generation import rollouts
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import Sampling
from tests.stories260k import FOLDER

BEGINNINGS = ("Once upon a time", "Lily had a dog. The dog", "Tom and Sam", "One day, a big bear", "The cat", "He said")
WARM = Sampling(0.9, 0.95, 0)


@pytest.fixture(scope="module")
def llama(shared) -> Llama:
    return Llama.load(shared / FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def prompts(llama) -> list[list[int]]:
    return [llama.tokenizer.encode(text) for text in BEGINNINGS]


def completed(llama, prompts, path=None, **settings):
    answers = Answers(path)
    try:
        return Engine(llama, answers, rows=2).complete(prompts, **({"max_new_tokens": 24} | settings))
    finally:
        answers.close()


@pytest.fixture(scope="module")
def greedy(llama, prompts) -> list[str]:
    return [one.text for one in llama.generate(prompts, max_new_tokens=24, temperature=0)]


def test_without_stops_an_answer_is_what_the_model_generates(llama, prompts, greedy):
    assert completed(llama, prompts) == greedy


def test_an_answer_ends_before_the_first_stop_and_others_go_on(llama, prompts, greedy):
    stops = [".", " big"]
    want = [min((text[: text.find(stop)] for stop in stops if stop in text), key=len, default=text) for text in greedy]
    assert completed(llama, prompts, stops=stops) == want
    assert len({len(text) for text in want}) > 2 and want != greedy


def test_rows_that_stopped_make_room_and_draw_nothing_more(llama, prompts, monkeypatch):
    """Six answers in two rows, each stopped early, take as many dispatches as their tokens need and no more."""
    drawing = []

    def counted(model, state, *rest):
        drawing.append(int((state.left_B > 0).sum()))
        return decode(model, state, *rest)

    decode = rollouts.decode
    monkeypatch.setattr(rollouts, "decode", counted)
    texts = completed(llama, prompts, stops=[" "], max_new_tokens=400)
    assert all(len(text) < 40 for text in texts) and len(drawing) <= len(prompts) + 1
    drawing.clear()
    stopped, whole = completed(llama, prompts[:2], stops=[" girl"], max_new_tokens=100)
    assert len(stopped) < 30 < len(whole)
    assert drawing[0] == 2 and set(drawing[1:]) == {
        1
    }  # the row that stopped is not drawn on, though none takes its place


def test_equal_prompts_draw_different_answers_and_the_same_again(llama, prompts):
    twice = completed(llama, [prompts[0], prompts[1], prompts[0]], sampling=WARM)
    assert twice[0] != twice[2]
    assert completed(llama, [prompts[0], prompts[0]], sampling=WARM) == [twice[0], twice[2]]
    same = completed(llama, [prompts[0], prompts[0]])
    assert same[0] == same[1]


def test_a_long_prompt_loses_its_beginning_and_is_counted(llama):
    ids = [1 + i % 400 for i in range(600)]
    engine = Engine(llama, Answers(None))
    assert engine.complete([ids, ids[:40]], max_new_tokens=12) == engine.complete(
        [ids[-500:], ids[:40]], max_new_tokens=12
    )
    assert len(engine.truncated) == 1
    long, cut = engine.score([ids, ids[-509:]], [[5, 6, 7, 8]] * 2)
    assert long == cut and len(engine.truncated) == 2


def test_an_evaluation_goes_on_where_it_was_stopped(llama, prompts, tmp_path, monkeypatch):
    whole = completed(llama, prompts, sampling=WARM), Engine(llama, Answers(None)).score(prompts, [[5, 6]] * 6)
    path = tmp_path / "answers.jsonl"
    put = Answers.put

    def killed(self, asked, answer):
        put(self, asked, answer)
        if len(self) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Answers, "put", killed)
    with pytest.raises(Preempted, match="3 answers are kept; start it again"):
        completed(llama, prompts, path, sampling=WARM)
    monkeypatch.setattr(Answers, "put", put)
    with path.open("ab") as file:
        file.write(b'{"asked": "a line that was half wri')
    asked = []
    draw = engine_module.draw
    monkeypatch.setattr(
        engine_module, "draw", lambda llama, ids, *rest, **more: asked.extend(ids) or draw(llama, ids, *rest, **more)
    )
    assert completed(llama, prompts, path, sampling=WARM) == whole[0]
    assert len(asked) == 3
    answers = Answers(path)
    assert Engine(llama, answers).score(prompts, [[5, 6]] * 6) == whole[1]
    answers.close()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 12


def test_what_leaves_no_room_is_refused(llama, prompts):
    with pytest.raises(UserError, match="answers of 512 tokens in a context of 512 leave no room"):
        completed(llama, prompts, max_new_tokens=512)
    with pytest.raises(UserError, match="a text to score has 0 tokens; expected 1 to the model's context, 512"):
        Engine(llama, Answers(None)).score([[1]], [[]])
    with pytest.raises(UserError, match="answers of 0 tokens are asked for"):
        completed(llama, prompts, max_new_tokens=0)
    with pytest.raises(UserError, match="--temperature is -0.5; it must be 0"):
        completed(llama, prompts, sampling=Sampling(-0.5, 1.0, 0))


@pytest.mark.parametrize("line", ["something else", '{"number": 1, "answer": "x"}', '["asked", "answer"]', "3"])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match="answers.jsonl holds no answers"):
        Answers(path)
    assert path.read_text() == f"{line}\n"
