"""The temperature experiment: what it samples and scores, that it falls, and that it goes on where it was stopped."""

import json
import re

import pytest

from experiments import temperature_rescaling
from llama_jax.errors import UserError
from llama_jax.evaluation.diversity import self_bleu
from llama_jax.generation.llama import Llama
from llama_jax.text.chat import Llama2Chat, Message, encode_prompt
from tests.tiny_checkpoint import write_tiny_checkpoint

SHAPE = {"samples": 4, "temperatures": (0.01, 0.6, 1.5), "max_new_tokens": 12}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [("factual", "the sky is"), ("creative", "once there was"), ("factual", "snow is")]
    path.write_text("".join(json.dumps({"kind": kind, "prompt": prompt}) + "\n" for kind, prompt in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    words = "the sky is blue and snow is white once there was a cat that sat on a mat [INST] [/INST]\n"
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "base", [words] * 20, vocab_size=310, context=64)


@pytest.fixture(scope="module")
def out(checkpoint, prompts, tmp_path_factory):
    """A run with the checkpoint twice, once in either form."""
    folder = tmp_path_factory.mktemp("run")
    temperature_rescaling.main((str(checkpoint),), (str(checkpoint),), folder, prompts, batch=6, **SHAPE)
    return folder


def samples(folder, temperature):
    return json.loads((folder / "samples" / f"{temperature}.json").read_text())


def table(text):
    return [[float(cell) for cell in row.strip("| \n").split(" | ")] for row in re.findall(r"^\| \d.*$", text, re.M)]


def test_the_table_is_the_mean_self_bleu_of_the_samples_by_kind(out, checkpoint, prompts, capsys):
    temperature_rescaling.main((str(checkpoint),), (str(checkpoint),), out, prompts, **SHAPE)
    printed = capsys.readouterr().out
    assert printed.startswith("| temperature | base plain, creative | base plain, factual | base chat, creative |")
    rows = table(printed)
    assert [row[0] for row in rows] == list(SHAPE["temperatures"])
    for temperature, *row in rows:
        of_both = [samples(out / name, temperature) for name in ("0-base", "1-base")]
        assert [[len(texts) for texts in of_one] for of_one in of_both] == [[4] * 3] * 2
        expected = [
            value
            for first, second, third in of_both
            for value in (self_bleu(second), (self_bleu(first) + self_bleu(third)) / 2)
        ]
        assert row == pytest.approx(expected, abs=0.051)
    assert (out / "self_bleu.png").read_bytes().startswith(b"\x89PNG")


def test_samples_of_a_model_are_less_alike_the_higher_the_temperature(out):
    for name in ("0-base", "1-base"):
        scores = [sum(map(self_bleu, samples(out / name, temperature))) / 3 for temperature in SHAPE["temperatures"]]
        assert scores == sorted(scores, reverse=True) and scores[0] > 50 > 25 > scores[-1]


def test_each_sample_is_what_the_model_gives_with_its_own_seed(out, checkpoint):
    llama = Llama.load(checkpoint)
    asked = encode_prompt(llama.tokenizer, (Message("user", "snow is"),), Llama2Chat())
    for folder, prompt in (("0-base", "snow is"), ("1-base", asked)):
        drawn = llama.generate([prompt], seed=[2 * 4 + 3], max_new_tokens=12, temperature=0.6, top_p=1.0)
        assert samples(out / folder, 0.6)[2][3] == drawn[0].text


def test_what_was_drawn_stays_and_the_rest_is_drawn(out, checkpoint, prompts):
    folder = out / "0-base" / "samples"
    whole = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / "1.5.json").unlink()
    kept = json.dumps([["kept"] * 4] * 3)
    (folder / "0.6.json").write_text(kept)
    temperature_rescaling.main((str(checkpoint),), (), out, prompts, **SHAPE)
    assert (folder / "1.5.json").read_text() == whole["1.5.json"]
    assert (folder / "0.6.json").read_text() == kept
    (folder / "0.6.json").write_text(whole["0.6.json"])


def test_bad_input(out, checkpoint, prompts):
    with pytest.raises(UserError, match="another checkpoint or other settings; name another --out"):
        temperature_rescaling.main((str(checkpoint),), (), out, prompts, **SHAPE | {"samples": 5})
    with pytest.raises(UserError, match="name checkpoints, with --plain"):
        temperature_rescaling.main(out=out)


@pytest.mark.parametrize("name", ["temperature_prompts", "story_prompts"])
def test_there_are_ten_prompts_of_each_kind(name):
    path = temperature_rescaling.PROMPTS.with_name(f"{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["factual"] * 10 + ["creative"] * 10
    assert len({row["prompt"] for row in rows}) == 20
