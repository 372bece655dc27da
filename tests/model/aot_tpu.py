"""Run in a process of its own: compiles attention and a model for TPUs that are not there, and prints what came out as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llama_jax.config import LLAMA2_7B, LLAMA2_70B, Compute, LlamaConfig
from llama_jax.model import transformer
from llama_jax.model.attention import causal_attention
from llama_jax.parallel.mesh import make_mesh, sharding

ROWS, LENGTH = 4, 4096
# The 70B's heads, two of eight groups, in a narrow model: the width costs compile time and changes nothing about the kernels.
NARROW = LlamaConfig(dim=256, n_layers=2, n_heads=16, n_kv_heads=2, head_dim=128, ffn_dim=256, vocab_size=512)


def tpu_mesh(topology: str, mesh_text: str):
    return make_mesh(mesh_text, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def report(compiled) -> dict:
    text = compiled.as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "segmented": "splash_mha_fwd_segmented" in text,
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def attention(config: LlamaConfig, mesh, implementation: str) -> dict:
    """Forward and backward of one layer's attention, bfloat16, packed."""

    def array(n_heads, *axes):
        shape = (ROWS, LENGTH, n_heads, config.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding(mesh, *axes, "head_dim"))

    def loss(q, k, v, segments):
        return causal_attention(q, k, v, segments, implementation=implementation).astype(jnp.float32).sum()

    q = array(config.n_heads, "batch", "length", "heads")
    kv = array(config.n_kv_heads, "batch", "kv_length", "kv_heads")
    segments = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding(mesh, "batch", "length"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, segments).compile()
    # What one device's scores would take in float32.
    dense = ROWS * config.n_heads * LENGTH**2 * 4 // mesh.size
    return report(compiled) | {"dense_bytes": dense}


def model(config: LlamaConfig, mesh, remat: str) -> dict:
    """Forward and backward of a whole model, packed."""

    def loss(model, tokens, segments):
        compute = Compute(remat=remat)
        return model.hidden(tokens, segment_ids_BT=segments, compute=compute).astype(jnp.float32).var()

    tokens = jax.ShapeDtypeStruct((ROWS, 1024), jnp.int32, sharding=sharding(mesh, "batch", "length"))
    with jax.set_mesh(mesh):
        return report(jax.jit(jax.grad(loss)).lower(transformer.abstract(config, mesh), tokens, tokens).compile())


reports = {
    "7B on v5e": attention(LLAMA2_7B, tpu_mesh("v5e:2x2", "fsdp=4"), "auto"),
    "7B on v5e, xla": attention(LLAMA2_7B, tpu_mesh("v5e:2x2", "fsdp=4"), "xla"),
    "70B on v5p": attention(LLAMA2_70B, tpu_mesh("v5p:2x2x1", "context=2,tensor=2"), "auto"),
    "70B on v6e": attention(LLAMA2_70B, tpu_mesh("v6e:2x2", "fsdp=2,tensor=2"), "auto"),
    "model": model(NARROW, tpu_mesh("v5e:2x2", "fsdp=2,tensor=2"), "attention"),
}
print(json.dumps(reports))
