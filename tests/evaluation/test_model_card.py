"""The model card: what a model's runs and checkpoint say stands in it, and what they do not is asked for."""

from pathlib import Path

import pytest

from llama_jax.evaluation import model_card
from llama_jax.evaluation.html_page import render
from llama_jax.stages.sft import SFTConfig
from tests.evaluation.planted_runs import MODEL, Page, as_json, plant, plant_evaluation, pretrain_config, report, step


@pytest.fixture
def lineage(tmp_path, monkeypatch):
    """A pretrained model and one fine-tuned from it, whose checkpoints say what they are."""
    base = plant(tmp_path / "base", "pretrain", pretrain_config(), [step(1, 5), step(40, 2)], [(0, 3600)])
    tuned = as_json(SFTConfig(checkpoint=str(base)))
    records = [step(7, 1.0), {"step": 7, "eval/loss": 0.625}]
    run = plant(tmp_path / "tuned", "sft", tuned, records, [(90_000, 1800)], start=("TPU v4", 8))
    for number in (5, 7):
        (run / "checkpoints" / str(number)).mkdir(parents=True)
        (run / "checkpoints" / str(number) / "_CHECKPOINT_METADATA").touch()
    monkeypatch.setattr(model_card, "read_metadata", lambda folder: {"model": MODEL | {"context_length": 512}})
    return run


def card_of(capsys, out: Path, *words) -> Page:
    code, said, err = report(capsys, *words, "--model-card", "--out", out)
    assert (code, err, said) == (0, "", f"{out / 'MODEL_CARD.md'}\n")
    return Page(render((out / "MODEL_CARD.md").read_text(), out))


def test_a_card_says_what_is_known_and_asks_for_the_rest(tmp_path, capsys, lineage):
    page = card_of(capsys, tmp_path / "card", lineage, plant_evaluation(tmp_path / "eval"))
    details = {row[0]: row[1] for one in page.tables for row in one if len(row) == 2}
    # By hand: 2 layers of (64 x 16 x (4 + 2 + 2 + 4) + 3 x 64 x 96 + 2 x 64), two embeddings of 300 x 64, a last norm.
    assert details["Parameters"] == f"{2 * (12_288 + 18_432 + 128) + 38_400 + 64:,}"
    assert details["Context length"] == "512 tokens" and details["Tokens of pretraining"] == "40,000"
    assert details["Dates"] == "2027-01-15 to 2027-01-16" and details["Checkpoint"] == "tuned/checkpoints/7"
    assert details["Made of"] == (
        "random weights, then Pretraining (paper 2.2), steps: 40 of 40 (100%), then Supervised fine-tuning (paper 3.1), steps: 7"
    )
    assert details["Devices"] == "2 x cpu, 8 x TPU v4" and details["held out: loss, first and last"] == "0.625, 0.625"
    for name in ("Developers", "Licence", "Status", "Comments"):
        assert details[name].startswith("To be filled in by you:")
    assert ["base", "text:books", "75.0%", "30,000"] in page.table("run", "source", "share", "tokens read, by share")
    assert any(one[1][:1] == ["boolq"] for one in page.tables)
    headings = ["Model details", "Intended use", "Hardware and software", "Training data", "Evaluation", "Ethical"]
    assert [tag for tag, _ in page.tags].count("h2") == len(headings) and all(one in page.text for one in headings)
    # The older checkpoint by its own folder, and a card that may have been filled in since stays as it is.
    page = card_of(capsys, tmp_path / "older", lineage / "checkpoints" / "5")
    assert ["Checkpoint", "tuned/checkpoints/5"] in [row for one in page.tables for row in one]
    code, _, err = report(capsys, lineage, "--model-card", "--out", tmp_path / "card")
    assert code == 2 and "perhaps with what you filled in" in err


def test_a_card_of_adapters_or_of_a_judge_says_so(tmp_path, capsys, lineage, monkeypatch):
    monkeypatch.setattr(model_card, "read_metadata", lambda folder: {"lora": {"rank": 16}, "base": "/models/7b"})
    page = card_of(capsys, tmp_path / "adapters", lineage)
    assert ["Architecture", "adapters of rank 16 beside /models/7b"] in page.tables[0]
    monkeypatch.setattr(model_card, "read_metadata", lambda folder: {"model": MODEL, "reward": {}})
    page = card_of(capsys, tmp_path / "judge", lineage)
    assert ["Output", "a score of an answer"] in page.tables[0]


def test_a_card_of_what_another_made_names_it(tmp_path, capsys, lineage):
    base = lineage.parent / "base"
    (base / "config.json").unlink()
    page = card_of(capsys, tmp_path / "card", lineage)
    details = dict(row for row in page.tables[0] if len(row) == 2)
    assert (
        details["Licence"] == f"To be filled in by you: its licence; it was made from {base}, whose licence binds it."
    )
    assert details["Tokens of pretraining"].startswith("To be filled in by you:")
