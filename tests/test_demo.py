"""The demo: real stages in a row, and a report whose numbers are those of the checkpoints on disk."""

import json
import re
import subprocess

import jax
import pytest

from llama_jax import cli, demo
from llama_jax.data.instruction_world import annotated
from llama_jax.data.pipeline import DataConfig, held_out_documents
from llama_jax.demo_rlhf import Sizes
from llama_jax.evaluation.instruction_world import play, scores
from llama_jax.generation.llama import Llama
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.metrics import read_metrics

pytestmark = pytest.mark.timeout(1800)  # every stage compiles its own programs


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    """These programs run long enough for optimising to pay."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a demo that was cut to 64 steps of pretraining and 60 dialogues."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = ["demo", "--out", str(out), "--train-tokens", str(64 * 1024), "--dialogues", "60"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUESTIONED", 10)
        few = Sizes(pairs=150, compared=20, questions=60, adversarial=8, held_out=6, samples=2, iterations=1)
        patch.setattr(demo, "SIZES", few)
        assert cli.main(command) == 0
    return out


def shown(folder) -> dict[str, float]:
    rows = re.findall(r"^\| ([\w -]+) \| (\d\.\d\d\d) \|$", (folder / "report.md").read_text(), re.M)
    return {name: float(bits) for name, bits in rows}


def test_the_restored_checkpoint_scores_what_the_run_logged(finished):
    """The report scores the Python corpus alone; the run's own score has the textbook's held-out pages in it, too."""
    config = demo.pretraining_config(finished, 0, 64 * 1024, dry_run=False)
    assert demo.bits_per_byte(config)["llama_jax"] == pytest.approx(shown(finished)["llama_jax"], abs=6e-4)
    mixed = [
        record["eval/bits_per_byte"] for record in read_metrics(finished / "pretrain") if "eval/bits_per_byte" in record
    ]
    assert mixed[-1] < shown(finished)["llama_jax"], "the textbook is the easier to predict"


def test_a_short_run_has_learnt_half_of_a_byte_but_not_as_much_as_xz(finished):
    bits = shown(finished)
    assert bits["xz -9"] < bits["llama_jax"] < 4 and bits["xz -9"] < bits["gzip -9"]


def test_the_compressors_saw_the_held_out_bytes(finished):
    data = DataConfig(sources=(f"jsonl:{finished / 'corpus.jsonl'}",), held_out=0.02, eval_documents=50)
    text = "".join(held_out_documents(data, Tokenizer.load(finished / "pretrain"))).encode()
    for command in ("gzip -9", "xz -9"):
        packed = subprocess.run([*command.split(), "-c"], input=text, capture_output=True, check=True).stdout
        # Not to the last digit: the gzip program and zlib search for matches a little differently.
        assert shown(finished)[command] == pytest.approx(8 * len(packed) / len(text), rel=2e-3)


def test_the_report_scores_the_checkpoints_on_disk_before_and_after_fine_tuning(finished):
    page = (finished / "report.md").read_text()
    table = dict(re.findall(r"^\| ([a-z ]+) \| ([\dna.]+ \| [\dna.]+) \|$", page.partition("## Preferences")[0], re.M))
    models = [Llama.load(finished / name) for name in ("pretrain", "sft")]
    before, after = (scores(play(model, dialogues=10)) for model in models)
    assert table == {name.replace("_", " "): f"{before[name]:.2f} | {after[name]:.2f}" for name in before}


def test_the_fine_tuned_dialogues_are_the_worlds(finished):
    rows = [json.loads(line) for line in (finished / "annotated.jsonl").read_text().splitlines()]
    assert rows == [annotated(0, number, preprompts=True) for number in range(60)]
    trained = json.loads((finished / "sft" / "config.json").read_text())["config"]
    assert trained["data"]["sources"] == [str(finished / "annotated.jsonl")]
    assert trained["checkpoint"] == str(finished / "pretrain")


def test_the_report_has_its_plots_samples_and_recipes(finished):
    page = (finished / "report.md").read_text()
    for plot in ("pretrain/loss.png", "sft/loss.png", "scores.png", "preferences.png"):
        assert f"({plot})" in page and (finished / plot).read_bytes().startswith(b"\x89PNG")
    assert "The for statement is used to|" in page and '"n_kv_heads": 2' in page and '"epochs": 2' in page


def test_a_dry_run_touches_nothing(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_report_scores_the_models_that_preferences_made(finished):
    """By the world's program, from the checkpoints on disk; and each page that it leads to is there."""
    page = (finished / "report.md").read_text().partition("## Preferences")[2]
    table = dict(re.findall(r"^\| ([a-z ]+) \| ((?:[\dna.]+ \| ){3}[\dna.]+) \|$", page, re.M))
    folders = ("sft", "distilled", "rlhf/v1/sft", "rlhf/v1/ppo/best")
    models = [scores(play(Llama.load(finished / name), dialogues=10)) for name in folders]
    assert table == {name.replace("_", " "): " | ".join(f"{one[name]:.2f}" for one in models) for name in models[0]}
    links = re.findall(r"\]\(([\w/]+\.md)\)", page)
    assert len(links) == 6 and all((finished / link).is_file() for link in links)


def test_no_stage_of_preferences_is_given_the_worlds_grades(finished):
    """What is trained on has the annotators' choices, and no grade."""
    for name in ("preferences", "safety_preferences"):
        rows = [json.loads(line) for line in (finished / "rlhf" / "v1" / f"{name}.jsonl").read_text().splitlines()]
        assert rows and all("grade" not in field for row in rows for field in row)
    asked = [json.loads(line) for line in (finished / "questions.jsonl").read_text().splitlines()]
    assert all(set(row) == {"messages", "risk"} and row["messages"][-1]["role"] == "user" for row in asked)
