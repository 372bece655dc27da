"""The margin experiment prints, for each margin, what its reward model's scores came to."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from experiments import reward_margin
from llama_jax.data.instruction_world import preference
from llama_jax.evaluation.rewards import read_scores
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import reward
from llama_jax.training.checkpoint import find_checkpoints, read_metadata
from llama_jax.training.held_out_pairs import accuracy_of
from tests.tiny_checkpoint import write_tiny_checkpoint


def test_it_prints_the_accuracies_of_three_models_on_unseen_questions(tmp_path, monkeypatch, capsys):
    pairs = [preference(0, number) for number in range(200)]
    texts = [f"{row['messages'][-1]['content']} {row['chosen']} {row['rejected']} [INST] [/INST]\n" for row in pairs]
    base = write_tiny_checkpoint(tmp_path / "hf", texts * 3, vocab_size=330, context=256)
    monkeypatch.setattr(reward, "make_mesh", lambda text: make_mesh(text, jax.devices()[:1]))
    toy = reward_margin.toy
    quick = {
        "optimizer": dataclasses.replace(toy.optimizer, warmup_steps=1),
        "loop": dataclasses.replace(toy.loop, eval_every=0),
        "data": dataclasses.replace(toy.data, held_out=0.0),
    }
    monkeypatch.setattr(reward_margin, "toy", dataclasses.replace(toy, **quick))
    reward_margin.main(str(base), str(tmp_path / "out"), pairs=48, tests=40)
    lines = [re.split(r" \| ", line.strip("| ")) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["none", "small", "large"]
    for name, *_, total in lines:
        scores = [row["scores"] for row in read_scores(tmp_path / "out" / name) if row["set"] == "test"]
        assert float(total.rstrip("%")) == pytest.approx(100 * accuracy_of(np.array(scores)), abs=0.051)
        assert (tmp_path / "out" / name / "report.md").exists()
    margins = [read_metadata(find_checkpoints(tmp_path / "out" / name)[-1])["recipe"]["margins"] for name, *_ in lines]
    assert margins == [[0, 0, 0, 0], [1, 2 / 3, 1 / 3, 0], [3, 2, 1, 0]]


def test_the_recipes_are_the_papers_mixes():
    assert reward_margin.helpfulness.data.weights == (50, 50) and reward_margin.safety.data.weights == (90, 10)
    assert reward_margin.safety.safety_weight > 0 == reward_margin.helpfulness.safety_weight
    assert reward_margin.config.pairs == 512 and reward_margin.config.optimizer.peak_lr == 1e-5
