"""The demo: real stages in a row, and a report whose numbers are those of the checkpoint on disk."""

import re
import subprocess

import pytest

from llama_jax import cli
from llama_jax.data.pipeline import DataConfig, held_out_documents
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo that was cut to 64 steps, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = ["demo", "--out", str(out), "--train-tokens", str(64 * 2048)]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **kwargs: printed.append((kwargs.get("file"), *words)))
        assert cli.main(command) == 0
    return out, printed


def shown(folder) -> dict[str, float]:
    rows = re.findall(r"^\| ([\w -]+) \| (\d\.\d+) \|$", (folder / "report.md").read_text(), re.M)
    return {name: float(bits) for name, bits in rows}


def test_the_restored_checkpoint_scores_what_the_run_logged(demo):
    folder, _ = demo
    logged = [record["eval/bits_per_byte"] for record in read_metrics(folder) if "eval/bits_per_byte" in record]
    assert shown(folder)["llama_jax"] == pytest.approx(logged[-1], abs=6e-4)


def test_a_short_run_has_learnt_half_of_a_byte_but_not_as_much_as_xz(demo):
    bits = shown(demo[0])
    assert bits["xz -9"] < bits["llama_jax"] < 4 and bits["xz -9"] < bits["gzip -9"]


def test_the_compressors_saw_the_held_out_bytes(demo):
    folder, _ = demo
    data = DataConfig(sources=(f"jsonl:{folder / 'corpus.jsonl'}",), held_out=0.02, eval_documents=50)
    text = "".join(held_out_documents(data, Tokenizer.load(folder))).encode()
    for command in ("gzip -9", "xz -9"):
        packed = subprocess.run([*command.split(), "-c"], input=text, capture_output=True, check=True).stdout
        # Not to the last digit: the gzip program and zlib search for matches a little differently.
        assert shown(folder)[command] == pytest.approx(8 * len(packed) / len(text), rel=2e-3)


def test_the_report_has_its_plot_samples_and_recipe(demo):
    folder, printed = demo
    page = (folder / "report.md").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "The for statement is used to|" in page and '"n_kv_heads": 2' in page
    assert any(file is None for file, *_ in printed), "the continuation goes to stdout"


def test_a_dry_run_touches_nothing(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
