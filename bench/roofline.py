"""How far a measured training step is from what its plan says: the roofline of the compiled program, over this device's own peaks.

The plan's FLOPs and bytes are counted in the very program that is timed (`llama_jax.planning`). Peaks are measured here, in the same
process: a large matmul's FLOP/s, and the bytes/s of adding one to a large array. A step can be no faster than the longer of the
two times; "apart" is their sum, for a device on which nothing hides behind anything.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.train import BATCHES, SIZES
from llama_jax.config import Compute
from llama_jax.data.packing import Batch
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning import hlo
from llama_jax.planning.program_cost import program_cost
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.step import abstract_batch, abstract_state, init_state, make_train_step

EXAMPLES = """examples:
  python -m bench.roofline                            15m and 100m, float32, with and without recomputation
  python -m bench.roofline --sizes 15m --repeats 20 --json
  python -m bench.roofline --sizes 1b --dtype bfloat16    on a GPU
"""


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a call that has been called before."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peaks(dtype: str, repeats: int) -> tuple[float, float]:
    """FLOP/s of a matmul and bytes/s through memory, as this device does them."""
    n, m = 2048, 2**26
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    b = jnp.ones(m, jnp.float32)
    product, add = jax.jit(jnp.matmul), jax.jit(lambda b: b + 1)
    return 2 * n**3 / seconds_of(lambda: product(a, a), repeats), 8 * m / seconds_of(lambda: add(b), repeats)


def step_of(size: str, dtype: str, remat: str, repeats: int) -> tuple[float, float, float]:
    """FLOPs, bytes and measured seconds of one training step."""
    config, (rows, length) = SIZES[size], BATCHES[size]
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=10), config, total_steps=1000)
    mesh = make_mesh(devices=jax.devices()[:1])
    step = make_train_step(optimizer, Compute(dtype=dtype, remat=remat))
    shapes = abstract_state(config, optimizer, mesh), abstract_batch(mesh, rows, length)
    compiled = step.lower(*shapes).compile()
    cost = program_cost(hlo.parse(compiled.as_text()), 1)
    layout = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(lambda: init_state(config, optimizer, jax.random.key(0)), out_shardings=layout[0])()
    tokens_BT = np.random.default_rng(0).integers(3, config.vocab_size, (rows, length + 1), np.int32)
    ones_BT, places_BT = np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], ones_BT, places_BT, ones_BT.astype(bool))
    batch = jax.device_put(batch, layout[1])

    def run() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics.loss

    return cost.flops, cost.hbm_bytes, seconds_of(run, repeats)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["15m", "100m"])
    parser.add_argument("--remat", nargs="+", choices=["none", "dots", "attention", "full"], default=["none", "full"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    flops_per_s, bytes_per_s = peaks(args.dtype, args.repeats)
    found = []
    for size in args.sizes:
        for remat in args.remat:
            flops, moved, measured = step_of(size, args.dtype, remat, args.repeats)
            times = flops / flops_per_s, moved / bytes_per_s
            found.append(
                {
                    "size": size,
                    "remat": remat,
                    "flops": flops,
                    "bytes": moved,
                    "measured_s": measured,
                    "compute_s": times[0],
                    "memory_s": times[1],
                    "bound_s": max(times),
                    "measured_over_bound": measured / max(times),
                    "measured_over_compute": measured / times[0],
                }
            )
    if args.json:
        print(json.dumps({"flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s, "steps": found}, indent=2))
        return
    print(
        f"{jax.devices()[0].device_kind}: {flops_per_s / 1e9:,.0f} GFLOP/s in a matmul of {args.dtype}, {bytes_per_s / 1e9:.1f} GB/s"
    )
    print(
        f"{'size':<6}{'remat':<10}{'compute s':>11}{'memory s':>11}{'bound s':>11}{'measured s':>12}{'/ bound':>9}{'/ compute':>11}"
    )
    for one in found:
        times = f"{one['compute_s']:11.3f}{one['memory_s']:11.3f}{one['bound_s']:11.3f}{one['measured_s']:12.3f}"
        ratios = f"{one['measured_over_bound']:8.2f}x{one['measured_over_compute']:10.2f}x"
        print(f"{one['size']:<6}{one['remat']:<10}{times}{ratios}")


if __name__ == "__main__":
    main()
