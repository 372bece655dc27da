"""Programs compiled for GPUs that are not there, their numbers known by hand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.planning.hardware import chip_of_kind
from llama_jax.planning.topology import GPUS
from tests.planning.test_plan_verb import printed_by

# XLA's CUDA plugin has a folder of its own: beside jax, it would say to every process that there is no driver.
PLUGIN = Path(sys.prefix) / "cuda"
MODEL = LlamaConfig(dim=512, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=1024, vocab_size=1024, context_length=512)
# As wide as it takes for XLA to call cuBLAS for a single row.
WIDE = replace(MODEL, dim=2048, n_layers=2, n_heads=16, n_kv_heads=16, ffn_dim=5504)
COMPILE = f"""
import json
from dataclasses import replace
from llama_jax.planning.compiling import devices_of, load_quietly, prepare_environment
from llama_jax.planning.hardware import H100
prepare_environment(H100)
load_quietly()
from llama_jax.config import Compute, LlamaConfig
from llama_jax.planning.generation_programs import GenerateConfig
from llama_jax.planning import plan
from llama_jax.planning.plan import to_json
from llama_jax.planning.planner import plan_programs, plan_recipe
from llama_jax.planning.topology import GPUS, parse_topology
from llama_jax.stages.pretrain import PretrainConfig

model, compute = {MODEL!r}, Compute(loss_chunk=512, attention="xla")
recipe = PretrainConfig(model=model, train_tokens=10**8, batch_tokens=16 * 512, compute=compute)
texts = []
compile_for = plan.compile_for
def kept(*arguments):
    compiled = compile_for(*arguments)
    texts.append(compiled.as_text())
    return compiled
plan.compile_for = kept
found = to_json(plan_recipe(recipe, None, parse_topology("h100:16"), fresh=True)[1])
print(json.dumps(found | {{"ahead": texts[0].count('"is_pipelined":true')}}))
served = (
    ("h100:1", GenerateConfig(model=model, rows=8, tokens=256, mesh="data=1")),
    ("a100:4", GenerateConfig(model=model, rows=8, tokens=256, mesh="tensor=2,data=2")),
    ("t4:1", GenerateConfig(model={WIDE!r}, rows=1, tokens=256, int8=True)),
)
for name, config in served:
    print(json.dumps(to_json(*plan_programs(config, None, parse_topology(name), prompt_tokens=1, fresh=True))))

devices = {{name: devices_of(parse_topology(name + ":1"))[0] for name in GPUS}}
print(json.dumps({{name: (one.platform, one.device_kind, one.compute_capability) for name, one in devices.items()}}))
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """One training step on two hosts of eight, and three programs that draw a token."""
    if not PLUGIN.is_dir():
        pytest.skip(f"no CUDA plugin in {PLUGIN}: make venv puts it there")
    return printed_by(COMPILE, tmp_path_factory.mktemp("gpu"), PLUGIN)


def test_a_step_on_two_hosts_of_gpus(plans):
    train = plans[0]
    assert (train["topology"], train["chips"], train["mesh"]["fsdp"]) == ("h100:16", 16, 16)
    head, down = 2 * MODEL.vocab_size * MODEL.dim, 2 * MODEL.ffn_dim * MODEL.dim
    block = (MODEL.matmul_flops_per_token() - head) / MODEL.n_layers
    # A sequence a GPU: a full recomputation repeats every matmul of a block but the last one.
    weights = 512 * (MODEL.n_layers * (4 * block - down) + 3 * head)
    # Attention in four chunks of queries, each with the keys up to its end, is two matmuls forward, the same again, and five
    # backward, of which the compiler finds the scores to be known.
    attention = MODEL.n_layers * 2 * MODEL.n_heads * MODEL.head_dim * 128 * (128 + 256 + 384 + 512)
    assert train["matmul_flops"] == weights + 8 * attention
    assert train["memory"]["parameters"] == 4 * MODEL.n_params / 16
    assert train["memory"]["optimizer"] == pytest.approx(2 * train["memory"]["parameters"], abs=64)
    exchanges = {exchange["kind"]: exchange for exchange in train["exchanges"]}
    # Matrices are gathered in 16 bits, forward and again backward; the embedding and the head once more for their gradients.
    matrices = 2 * (MODEL.n_params - (2 * MODEL.n_layers + 1) * MODEL.dim)
    assert 1.8 * matrices < exchanges["all-gather"]["bytes"] < 2.2 * matrices
    assert exchanges["all-gather"]["seconds_dcn"] > 0 and train["seconds"]["link_name"] == "NVLink"


def test_weights_of_the_next_layer_are_gathered_while_one_is_computed(plans):
    """The compiler's own word for exchanges that it moved into the iteration before."""
    assert plans[0]["ahead"] > 0


@pytest.mark.parametrize("number", [1, 2, 3], ids=["bfloat16", "on a mesh", "int8 on a T4"])
def test_a_drawn_token_reads_weights_and_cache_once(plans, number):
    """Layers that are scanned are copied before they are read, and so is the cache: three times as much."""
    memory = plans[number]["memory"]
    # Of the embedding only a token's row is read; `tensor` splits it on the mesh.
    table = 2 * MODEL.vocab_size * {1: MODEL.dim, 2: MODEL.dim / 2, 3: WIDE.dim}[number]
    read = plans[number]["bytes_through_hbm"] / (memory["parameters"] + memory["cache"] - table)
    assert 1 <= read < 1.25
    assert memory["temporary"] < 0.1 * memory["cache"] + 1e6


def test_every_gpu_is_described_as_the_compiler_reads_it(plans):
    found = plans[4]
    assert found.keys() == GPUS.keys()
    for name, chip in GPUS.items():
        platform, kind, capability = found[name]
        assert (platform, float(capability)) == ("gpu", chip.compute_capability)
        assert chip_of_kind(kind) is chip
