"""Run on a machine with a GPU: cuDNN attention against the XLA path, packed and not, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.attention import causal_attention

rng = np.random.default_rng(0)
q, k, v, cotangent = (jnp.asarray(rng.normal(size=(2, 512, heads, 64)), jnp.bfloat16) for heads in (8, 2, 2, 8))
segments = jnp.asarray(np.sort(rng.integers(0, 5, (2, 512)), axis=1), jnp.int32)
for name, segment_ids in (("packed", segments), ("one segment", None)):
    results = {}
    for implementation in ("cudnn", "xla"):
        out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, segment_ids, implementation=implementation), q, k, v)  # noqa: B023
        results[implementation] = [np.asarray(x, np.float32) for x in (out, *pull(cotangent))]
    for array, got, expected in zip(("out", "dq", "dk", "dv"), results["cudnn"], results["xla"], strict=True):
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        print(f"{array}, {name}: relative difference {error:.1e}")
        assert error < 1e-2
