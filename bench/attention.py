"""Forward and backward time of the CPU's causal attention against PyTorch's, interleaved in one run.

Command: python bench/attention.py   (needs the [torch] extra)
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from llama_jax.model.attention import causal_attention

ROUNDS = 9
SHAPES = [(8, 256, 6, 2, 64), (4, 512, 8, 4, 64), (2, 1024, 12, 4, 64), (4, 1024, 8, 8, 64)]  # B, T, N, K, H


def make_ours(q, k, v, cotangent):
    """One call: output and gradients, jitted."""

    @jax.jit
    def step(q, k, v):
        out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, implementation="xla"), q, k, v)
        return out, pull(cotangent)

    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    return lambda: jax.block_until_ready(step(q, k, v))


def make_theirs(q, k, v, cotangent):
    """The same through `scaled_dot_product_attention`."""
    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    cotangent = torch.tensor(cotangent)

    def step():
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out.transpose(1, 2), (q, k, v), cotangent)

    return step


def main() -> None:
    """Prints one line per shape."""
    for shape in SHAPES:
        rng = np.random.default_rng(0)
        B, T, N, K, H = shape
        q, k, v, cotangent = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))
        steps = {"ours": make_ours(q, k, v, cotangent), "torch": make_theirs(q, k, v, cotangent)}
        seconds = {name: [] for name in steps}
        for _ in range(ROUNDS + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        # The first round compiles. The minimum is what the code takes; the rest is what else the machine did.
        ours, theirs = (min(seconds[name][1:]) for name in steps)
        middle = statistics.median(seconds["torch"][1:]) / statistics.median(seconds["ours"][1:])
        print(
            f"B={B} T={T} N={N} K={K} H={H}: ours {1e3 * ours:.1f} ms, torch {1e3 * theirs:.1f} ms, "
            f"ratio {theirs / ours:.2f} (of medians {middle:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
