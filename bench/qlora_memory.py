"""The memory of one QLoRA step of Llama 2 7B on one TPU v5e, as its compiler plans it, against the chip's 16 GB.

Adapters of rank 16 on all seven matrices, float32 Adam moments, bfloat16 computation, every block recomputed. Needs no
TPU: libtpu compiles ahead of time on a CPU, in one to three minutes a case.

Command: python bench/qlora_memory.py   (needs the [dev] extra)
Measured with libtpu 0.0.42.1, held and temporary, GB: nf4 4.65 + 2.37 at 1024 tokens and 4.65 + 4.53 at 4096; int8
7.36 + 2.45 and 7.36 + 4.63. The fullest, int8 at 4096, takes 75% of the chip.
"""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llama_jax.config import LLAMA2_7B, Compute
from llama_jax.model import transformer
from llama_jax.model.lora import LoraConfig, abstract_adapters, adapt, describe_adapters
from llama_jax.model.nf4 import nf4_abstract
from llama_jax.model.quantize import quantize_abstract
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.step import abstract_batch, abstract_new_state, make_train_step

CHIP_GB = 16
ROWS = 1
LORA = LoraConfig()


def compiled_step(quantise, length: int):
    """The step's program; no array exists."""
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]
    mesh = make_mesh(devices=chip)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=10), describe_adapters(LLAMA2_7B, LORA), 1000)
    state = abstract_new_state(abstract_adapters(LLAMA2_7B, LORA, mesh), optimizer, mesh)
    frozen = quantise(transformer.abstract(LLAMA2_7B, mesh, jnp.bfloat16))
    step = make_train_step(
        optimizer,
        Compute(),
        layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        assemble=lambda adapters, frozen, key: adapt(frozen, adapters, LORA, key),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(mesh, ROWS, length), frozen).compile()


def main() -> None:
    """Prints one line per base and length."""
    for name, quantise in {"nf4": nf4_abstract, "int8": quantize_abstract}.items():
        for length in (1024, 4096):
            memory = compiled_step(quantise, length).memory_analysis()
            held, temporary = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
            total = held + temporary
            print(
                f"{name}, {ROWS} x {length} tokens: {held:.2f} GB held, {temporary:.2f} GB temporary, "
                f"{total:.2f} of {CHIP_GB} GB: {total / CHIP_GB:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
