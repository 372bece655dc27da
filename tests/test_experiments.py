"""The experiments: every recipe loads, and the ablations run and print what their runs measured."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import context_ablation, gqa_ablation
from llama_jax import cli
from llama_jax.recipes import load_recipe
from llama_jax.stages.ppo import PPOConfig
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 4 * 512


def tiny(recipe: PretrainConfig) -> PretrainConfig:
    """The recipe at a size that takes seconds, its ratios kept where an ablation is about them."""
    m = recipe.model
    model = replace(
        m, dim=48, n_layers=1, head_dim=8, ffn_dim=m.ffn_dim // 4, vocab_size=512, context_length=m.context_length // 8
    )
    optimizer = replace(recipe.optimizer, warmup_steps=1)
    return replace(recipe, model=model, batch_tokens=512, optimizer=optimizer, mesh="fsdp=-1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "text.txt"
    path.write_text((ROOT / "LICENSE").read_text() * 10)
    return f"text:{path}"


def table(text: str) -> list[list[str]]:
    return [re.split(r" \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")][1:]


def is_recipe(path: Path) -> bool:
    """Whether a verb can run it; the others are programs of their own."""
    return bool(re.search(r"^config = ", path.read_text(), re.M))


EXPERIMENTS = sorted(ROOT.glob("experiments/[!_]*.py"))
RECIPES = [path for path in EXPERIMENTS if is_recipe(path)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_short_and_states_claim_and_command(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (80 if is_recipe(path) else 160)
    assert "Claim: " in text
    command = re.search(r"^Command: (?:llama-jax (\w+)|python -m experiments\.(\w+))", text, re.M)
    assert command, "no command"
    verb, module = command.groups()
    assert module == path.stem if module else verb in cli.VERBS
    assert is_recipe(path) or re.search(r"^def main\(", text, re.M)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_numbers_fit_each_other(path):
    kinds = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "rlhf": RLHFConfig}
    config = load_recipe(str(path), next((kind for name, kind in kinds.items() if name in path.stem), PretrainConfig))
    if isinstance(config, RewardConfig):
        assert config.optimizer.warmup_steps == 0 and config.epochs == 1
    elif isinstance(config, SFTConfig):
        assert config.rows % config.micro_batches == 0 and config.length <= 4096
    elif isinstance(config, PPOConfig):
        assert config.batch % config.mini_batch == 0 and config.optimizer.final_lr_ratio == 1
    elif isinstance(config, RLHFConfig):
        assert config.ppo_from <= config.versions and config.ppo.batch % config.ppo.mini_batch == 0
    else:
        assert config.total_steps > config.optimizer.warmup_steps and config.batch_tokens % config.length == 0


def test_gqa_ablation_prints_what_its_runs_measured(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gqa_ablation, "variants", {name: tiny(v) for name, v in gqa_ablation.variants.items()})
    gqa_ablation.main(source, str(tmp_path), TOKENS)
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["MHA", "MQA", "GQA"]
    # Two arrays of two bytes, one layer, heads of eight numbers.
    heads = [v.model.n_kv_heads for v in gqa_ablation.variants.values()]
    assert [int(row[2]) for row in rows] == [2 * 2 * 8 * n for n in heads] and heads[1] == 1
    for row in rows:
        measured = [record for record in read_metrics(tmp_path / row[0]) if "eval/loss" in record][-1]
        assert float(row[3]) == pytest.approx(measured["eval/loss"], abs=6e-4)


def test_the_ablated_models_differ_by_less_than_seven_percent_in_parameters():
    sizes = [v.model.n_params for v in gqa_ablation.variants.values()]
    assert max(sizes) / min(sizes) < 1.07


def test_context_ablation_reads_both_models_in_both_lengths(source, tmp_path, monkeypatch, capsys):
    short, long = context_ablation.SHORT // 8, context_ablation.LONG // 8
    monkeypatch.setattr(context_ablation, "variants", {k // 8: tiny(v) for k, v in context_ablation.variants.items()})
    monkeypatch.setattr(context_ablation, "SHORT", short)
    monkeypatch.setattr(context_ablation, "LONG", long)
    context_ablation.main(source, str(tmp_path), TOKENS)
    rows = table(capsys.readouterr().out)
    assert [(int(a), int(b)) for a, b, _ in rows] == [(short, short), (short, long), (long, short), (long, long)]
    measured = [record for record in read_metrics(tmp_path / str(long)) if "eval/bits_per_byte" in record][-1]
    assert float(rows[3][2]) == pytest.approx(measured["eval/bits_per_byte"], abs=6e-4)


def test_bad_input_to_an_experiment_ends_as_it_does_for_a_verb(tmp_path):
    command = [sys.executable, "-m", "experiments.time_awareness", "--out", str(tmp_path / "time.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and ".jsonl" in done.stderr and "Traceback" not in done.stderr
