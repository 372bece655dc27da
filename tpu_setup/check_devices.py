"""On every host at once: are all devices there, and how fast do they talk? Exits with 2 where devices are missing."""

import argparse
import sys
import time

from llama_jax.cli import end_of
from llama_jax.errors import UserError
from llama_jax.parallel.distributed import initialize


def main() -> None:
    """Compares the devices with what the topology promises, then times an all-reduce over all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, required=True, help="of all hosts together")
    parser.add_argument("--here", type=int, required=True, help="of this host")
    parser.add_argument("--megabytes", type=int, default=64, help="what each device reduces")
    args = parser.parse_args()
    initialize()
    import jax

    local, devices = jax.local_device_count(), jax.device_count()
    if (local, devices) != (args.here, args.devices):
        raise UserError(
            f"this host sees {local} devices and all hosts {devices}; it should be {args.here} and {args.devices}: another "
            "process may hold some, a host may be missing, or --tpu names another slice"
        )
    print(f"{local} of {args.here} devices here, {devices} of {args.devices} in all: {jax.devices()[0].device_kind}")
    if devices > 1:
        seconds = all_reduce_seconds(args.megabytes * 10**6)
        # A ring moves each byte 2 (n - 1) / n times through a device: what makes figures of different sizes comparable.
        speed = args.megabytes * 1e6 * 2 * (devices - 1) / devices / seconds
        print(
            f"all-reduce of {args.megabytes} MB a device: {seconds * 1e3:.2f} ms, {speed / 1e9:.2f} GB/s through each device"
        )


def all_reduce_seconds(size: int, repeats: int = 5) -> float:
    """The best time of an all-reduce of `size` bytes a device, and a check that its sum is right."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("all"))
    ones = jax.jit(lambda: jnp.ones((mesh.size, size // 4), jnp.float32), out_shardings=spread)()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec("all"))
    def reduce(x):
        return jax.lax.pcast(jax.lax.psum(x, "all"), ("all",), to="varying")

    total = reduce(ones)
    if not all((shard.data == mesh.size).all() for shard in total.addressable_shards):
        raise UserError(
            "the all-reduce gave a wrong sum: a device or a link of this slice is broken; take another slice"
        )
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(reduce(ones))
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    sys.exit(end_of(main))
