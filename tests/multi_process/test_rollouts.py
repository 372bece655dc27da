"""Two processes draw and score what one does, and each knows all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.runs import free_address

PROGRAM = """
import json
import jax
import numpy as np
from llama_jax.config import LlamaConfig
from llama_jax.generation.choices import score_choices
from llama_jax.generation.llama import Llama
from llama_jax.generation.rollouts import make_gather, sample_rollouts
from llama_jax.model.transformer import init, shardings
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import make_mesh

class Ids:
    bos_id, eos_id, vocab_size = 1, 2, 12

distributed.initialize()
config = LlamaConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16, vocab_size=12, head_dim=8, context_length=32)
layout = shardings(config, make_mesh("data=2,fsdp=2"))
model = jax.jit(lambda: init(config, jax.random.key(0)), out_shardings=layout)()
llama = Llama(make_gather(model, "float32")(model), Ids())
prompts = [list(range(1, 2 + n)) for n in (3, 8, 1, 5, 2, 9, 4, 6, 7)]
drawn = sample_rollouts(llama, prompts, seeds=range(9), max_new_tokens=20, temperature=1.3, rows=4)
choices = [[[5, 6, 7], [8], [9, 3]], [[4, 4], [5]], [[11, 10, 9, 8]]] * 3
scored = score_choices(llama, prompts, choices)
print(json.dumps([[[one.ids, one.log_probs] for one in drawn], [[score.log_prob for score in of] for of in scored]]))
"""


def start(devices: int, **environment: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def drawn_by(process: subprocess.Popen) -> list:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_every_process_has_what_one_process_draws_and_scores():
    joined = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    two = [start(2, JAX_PROCESS_ID=str(index), **joined) for index in range(2)]
    one = drawn_by(start(4))
    first, second = map(drawn_by, two)
    assert first == second
    (first, first_scores), (one, scores) = first, one
    assert [ids for ids, _ in first] == [ids for ids, _ in one] and len({len(ids) for ids, _ in one}) > 3
    for (_, ours), (_, theirs) in zip(first, one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert [len(of) for of in scores] == [3, 2, 1] * 3
    for ours, theirs in zip(first_scores, scores, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
