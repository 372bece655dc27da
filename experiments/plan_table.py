"""Every size on TPU slices and GPUs, planned at full depth: what a chip holds and how fast a step can be (paper 2.2.1).

Claim: each of 7B, 13B, 34B and 70B fits at least one slice of each generation, and GPUs, for what it is asked to do there.
Command: python -m experiments.plan_table --only "70b.*v5p"
Cost: three seconds to three minutes of one core for each program that is not planned yet; all rows take about an hour. What was
planned is kept, so that an interrupted table goes on. Measured: see docs/tpu.md and docs/gpu.md.
"""

import re
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import tyro

from llama_jax.cli import end_of
from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B
from llama_jax.errors import UserError
from llama_jax.planning.compiling import load_quietly, prepare_environment
from llama_jax.planning.topology import parse_topology

MODELS = {"7b": LLAMA2_7B, "13b": LLAMA2_13B, "34b": LLAMA2_34B, "70b": LLAMA2_70B}

# Adapters beside frozen weights of 4 bits, a row at a time.
_QLORA = {"train": "lora", "nf4": True, "rows": 8, "micro_batches": 8}

# What is planned: the work, the model, the chips, how many slices of them, and what is set beside the recipe. Batches of pretraining have
# 1,024 sequences of 4,096 tokens, those of fine-tuning 64, an iteration of PPO 512 answers; 64 sequences are served.
ROWS: tuple[tuple[str, str, str, int, dict[str, Any]], ...] = (
    ("pretrain", "7b", "v4:4x4x4", 1, {"micro_batches": 2}),
    ("pretrain", "7b", "v5e:16x16", 1, {}),
    ("pretrain", "7b", "v5p:4x4x4", 1, {}),
    ("pretrain", "7b", "v6e:8x8", 1, {"micro_batches": 2}),
    ("pretrain", "13b", "v4:4x4x8", 1, {}),
    ("pretrain", "13b", "v5e:16x16", 1, {"micro_batches": 2}),
    ("pretrain", "13b", "v5p:4x4x4", 1, {}),
    ("pretrain", "13b", "v6e:16x16", 1, {}),
    ("pretrain", "34b", "v4:8x8x8", 1, {}),
    ("pretrain", "34b", "v5e:16x16", 1, {"micro_batches": 4}),
    ("pretrain", "34b", "v5p:4x4x8", 1, {}),
    ("pretrain", "34b", "v6e:16x16", 1, {"micro_batches": 2}),
    ("pretrain", "70b", "v4:8x8x8", 1, {}),
    ("pretrain", "70b", "v5p:4x8x8", 1, {}),
    ("pretrain", "70b", "v5p:8x8x8", 1, {}),
    ("pretrain", "70b", "v5p:4x8x8", 2, {}),
    ("pretrain", "70b", "v6e:16x16", 1, {"micro_batches": 2}),
    ("pretrain", "70b", "v5e:16x16", 1, {"mesh": "fsdp=128,context=2", "micro_batches": 8}),
    ("sft", "7b", "v5e:4x4", 1, {"micro_batches": 4}),
    ("sft", "13b", "v5p:2x2x4", 1, {}),
    ("sft", "34b", "v5p:2x4x4", 1, {}),
    ("sft", "70b", "v5p:4x4x4", 1, {}),
    ("ppo", "7b", "v5p:2x2x4", 1, {}),
    ("ppo", "70b", "v5p:4x4x8", 1, {"mesh": "fsdp=32,tensor=4"}),
    ("generate", "7b", "v5e:2x2", 1, {"rows": 16}),
    ("generate", "7b", "v6e:1x1", 1, {"rows": 4}),
    ("generate", "13b", "v5p:2x2x1", 1, {}),
    ("generate", "34b", "v5p:2x2x1", 1, {}),
    ("generate", "70b", "v5p:2x2x1", 1, {}),
    ("generate", "70b", "v6e:2x4", 1, {}),
    ("pretrain", "7b", "h200:1", 1, {"batch_tokens": 16384}),
    ("pretrain", "7b", "h100:8", 1, {"micro_batches": 32}),
    ("pretrain", "13b", "h100:16", 1, {"micro_batches": 16}),
    ("pretrain", "34b", "h100:32", 1, {"micro_batches": 16}),
    ("pretrain", "70b", "h100:64", 1, {"micro_batches": 16}),
    ("sft", "7b", "h200:1", 1, {"rows": 4}),
    ("sft", "7b", "a100-80gb:8", 1, {"micro_batches": 2}),
    ("sft", "7b", "t4:1", 1, {**_QLORA, "length": 2048}),
    ("sft", "7b", "l4:1", 1, _QLORA),
    ("sft", "13b", "a100-40gb:1", 1, _QLORA),
    ("sft", "70b", "h100:1", 1, _QLORA),
    ("ppo", "7b", "h100:8", 1, {}),
    ("generate", "7b", "t4:1", 1, {"rows": 1, "int8": True}),
    ("generate", "7b", "l4:1", 1, {"rows": 1}),
    ("generate", "13b", "a100-80gb:1", 1, {"rows": 12}),
    ("generate", "34b", "h200:1", 1, {"rows": 64}),
    ("generate", "70b", "h100:4", 1, {"rows": 32}),
)


def main(only: str = "", cached: bool = False) -> None:
    """Prints the table as Markdown, row by row as they are planned.

    Args:
      only: rows whose "work model slice" matches this regular expression.
      cached: no program is compiled; rows that were not planned before are left out.
    """
    chosen = [row for row in ROWS if re.search(only, " ".join(map(str, row[:3])))]
    if not chosen:
        raise UserError(f"--only {only!r} matches none of {', '.join(' '.join(row[:3]) for row in ROWS)}")
    for chip in {parse_topology(name).chip for _, _, name, *_ in chosen}:
        prepare_environment(chip)  # before jax, which the recipes import
    load_quietly()
    print(
        "| work | model | chips | mesh, micro-batches, recomputed | a chip | the most is | bound, s | share of peak | compiling |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in chosen:
        for line in planned(*row, cached=cached):
            print(line, flush=True)


def recipe_of(work: str, size: str, own: dict[str, Any]) -> Any:
    """The recipe of a row."""
    from llama_jax.planning.generation_programs import GenerateConfig
    from llama_jax.stages.ppo_config import PPOConfig
    from llama_jax.stages.sft import SFTConfig

    recipes = {
        "pretrain": import_module(f"experiments.pretrain_{size}").config,
        "sft": SFTConfig(checkpoint="policy"),
        "ppo": PPOConfig(checkpoint="policy"),
        "generate": GenerateConfig(model=MODELS[size]),
    }
    return replace(recipes[work], **own)


def planned(work: str, size: str, name: str, slices: int, own: dict[str, Any], *, cached: bool) -> list[str]:
    """The lines of one row, a program each."""
    from llama_jax.parallel.mesh import format_mesh, mesh_sizes_of
    from llama_jax.planning import cache, planner
    from llama_jax.planning.report import format_refusal

    model, topology = MODELS[size], parse_topology(name, slices)
    config = recipe_of(work, size, own)
    sizes = mesh_sizes_of(config.mesh, topology.chips, topology.slices)
    lines = []
    for job in planner.jobs_of(config, model, sizes, prompt_tokens=512):
        plan = cache.read(cache.key_of(job, topology)) if cached else planner.kept_or_made(job, topology, fresh=False)
        if plan is None:
            print(f"not planned yet: {job.stage} {size} {name}", file=sys.stderr)
            continue
        parts = f"{plan.micro_batches} x {plan.rows // plan.micro_batches} rows, {plan.remat or '-'}"
        how = f"{format_mesh(plan.mesh)}, {parts}"
        how += ", adapters on nf4" * own.get("nf4", False) + ", int8" * own.get("int8", False)
        start = f"| {plan.stage} | {size.upper()} | {f'{slices} x ' * (slices > 1)}{name} | {how}"
        if plan.fits:
            memory = {key: value for key, value in vars(plan.memory).items() if key != "padding"}
            most = max(memory, key=memory.__getitem__)
            total = f"{plan.memory.total / 1e9:.1f} of {plan.usable_bytes / 1e9:.1f} GB"
            speed = f"{plan.seconds.bound:.3g} ({plan.seconds.binds}) | {plan.mfu:.0%}"
            end = f"{total} | {most} {memory[most] / 1e9:.1f} GB | {speed}"
        else:
            end = f"{format_refusal(plan)} | | | "
        lines.append(f"{start} | {end} | {plan.compile_seconds:.0f} s, {plan.host_bytes / 1e9:.1f} GB |")
    return lines


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
