"""The mesh and the one table that says which logical axis lies on which mesh axis.

Mesh axes: `data` (replicas of the parameters; also across slices), `fsdp` (parameters and optimizer sharded, gathered
  layer by layer), `context` (the sequence
sharded), `tensor` (heads, feed-forward and vocabulary sharded). No other module names a mesh axis.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import linear_call
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.planning.hardware import chip_of_kind

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. The first block are axes of parameters, the second of activations.
RULES: dict[str, tuple[str, ...]] = {
    "layer": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "rank": (),
    # Activations: every device that holds other parameters holds other sequences, so a batch is split over fsdp too.
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "tokens": ("data", "fsdp", "context"),
    "kv_length": (),
    "act_embed": (),
}

# Where generation holds every weight whole: gathered once, and not for every token, which took the paper 20 times as long
# (3.2.3). Rows stay split over these axes, and over `tensor` the weights stay split as well.
GATHERED_TO_GENERATE = RULES["embed"]


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not sharded)."""
    return PartitionSpec(*(RULES[axis] or None if axis is not None else None for axis in axes))


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The NamedSharding on `mesh` of an array whose axes have these logical names."""
    return NamedSharding(mesh, partition_spec(axes))


def generation_layout(weight: NamedSharding) -> NamedSharding:
    """Where a weight lies to generate, given where the rule table laid it to be trained."""

    def kept(part: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (part,) if isinstance(part, str) else part or ()
        return tuple(name for name in names if name not in GATHERED_TO_GENERATE) or None

    return NamedSharding(weight.mesh, PartitionSpec(*map(kept, weight.spec)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says how an activation is laid out on the ambient mesh (`jax.set_mesh`); without one, returns it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight as matmuls read it, whole along `embed`; its gradient lies as the weight is kept.

    Left to itself the partitioner may split the matmul instead, into a ring of small ones, which read and write their sums
    again each time; and a constraint alone would have the whole gradient summed on every device.
    """
    whole = [None if axis == "embed" else axis for axis in axes]
    return linear_call(lambda _, w: constrain(w, *whole), lambda _, gradient: constrain(gradient, *axes), (), weight)


def ways(axis: str) -> int:
    """Into how many parts the ambient mesh splits this logical axis; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(mesh_axis, 1) for mesh_axis in RULES[axis])


def platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of the ambient mesh's devices; without a mesh, of the default ones."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def compute_capability() -> float:
    """NVIDIA's number for the generation of the GPUs in use; 0 where there are none. Of GPUs that a program is compiled for and
    that are not there, what is known of their kind.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device.platform != jax.default_backend():
        chip = chip_of_kind(mesh.abstract_device.device_kind)
        return chip.compute_capability if chip else 0.0
    number = re.fullmatch(r"\d+\.\d+", getattr(jax.devices()[0], "compute_capability", ""))  # a ROCm device says gfx90a
    return float(number[0]) if number else 0.0


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """What the compiler is told of a training step beyond its defaults; what stands in XLA_FLAGS is left to the user.

    Our choice, over several hosts of GPUs: a layer's weights are gathered, and its gradients summed, while another layer is
    computed, in a loop that is unrolled by two, which spares copies. What that hides, counted in compiled programs and not measured
    on GPUs, stands in docs/gpu.md; within a host it is little, and would cost memory.
    """
    if mesh.devices.flat[0].platform != "gpu" or len({device.process_index for device in mesh.devices.flat}) == 1:
        return {}
    pipelined = (f"xla_gpu_enable_pipelined_{exchange}" for exchange in ("all_gather", "reduce_scatter", "all_reduce"))
    options = (*pipelined, "xla_gpu_enable_while_loop_double_buffering")
    return {option: True for option in options if option not in os.environ.get("XLA_FLAGS", "")}


def per_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` as every device of the ambient mesh runs it on its own part of the arrays; without a mesh, `function` itself.

    For kernels that the partitioner cannot split by itself, or would split badly.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # Varying-axes checks do not know what a kernel does.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def parse_mesh(text: str, n_devices: int) -> dict[str, int]:
    """Reads a mesh such as `auto`, `fsdp=8` or `data=2,fsdp=-1,tensor=4` (-1: whatever is left) into a size per mesh
    axis.

    `auto` is fully sharded data parallelism over every device: the layout that needs no collective inside a matmul and
    splits all memory.

    Raises:
      UserError: an unknown axis, a size that is not a number, or sizes whose product is not the number of devices.
    """
    if text == "auto":
        return dict.fromkeys(MESH_AXES, 1) | {"fsdp": n_devices}
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if not match or match[1] not in MESH_AXES:
            raise UserError(
                f"--mesh {text!r}: cannot read {part.strip()!r}; expected 'auto' or AXIS=SIZE pairs "
                f"such as 'fsdp=4,tensor=2' with axes {', '.join(MESH_AXES)}"
            )
        sizes[match[1]] = int(match[2])
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1:
        raise UserError(f"--mesh {text!r}: only one axis may be -1, found {', '.join(unknown)}")
    if unknown and n_devices % known == 0:
        sizes[unknown[0]] = n_devices // known
    if math.prod(sizes.values()) != n_devices:
        raise UserError(
            f"--mesh {text!r} asks for {known} device{'s' * (known != 1)}{' or a multiple' if unknown else ''}, "
            f"but {n_devices} {'is' if n_devices == 1 else 'are'} present; try --mesh auto"
        )
    return sizes


def check_divides(
    sizes: dict[str, int], model: LlamaConfig, rows: int | None = None, length: int | None = None
) -> None:
    """Checks that every sharded axis divides evenly, before anything is compiled.

    Args:
      sizes: devices per mesh axis.
      model: whose heads, widths and vocabulary are to be split.
      rows: sequences that are in one micro-batch, if any.
      length: tokens in a sequence, if any.

    Raises:
      UserError: names the axis, its size and the sizes that would work.
    """
    extents = {
        "heads": ("n_heads", model.n_heads),
        "kv_heads": ("n_kv_heads", model.n_kv_heads),
        "ffn": ("ffn_dim", model.ffn_dim),
        "vocab": ("vocab_size", model.vocab_size),
        "embed": ("dim", model.dim),
        "batch": ("sequences in a micro-batch", rows),
        "length": ("sequence length", length),
    }
    n_devices = math.prod(sizes.values())
    for logical, (name, extent) in extents.items():
        axes = "*".join(RULES[logical])
        ways = math.prod(sizes[axis] for axis in RULES[logical])
        if extent is not None and extent % ways:
            fitting = [n for n in range(1, n_devices + 1) if n_devices % n == 0 and extent % n == 0]
            raise UserError(
                f"mesh {format_mesh(sizes)}: {name} {extent} does not divide over {axes} = {ways} devices; "
                f"{axes} may be one of {fitting}"
            )


def format_mesh(sizes: dict[str, int]) -> str:
    """The sizes as `--mesh` takes them, axes of size one left out."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def make_mesh(text: str = "auto", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh that `text` describes (see `parse_mesh`) over all devices, or over those given.

    Devices of several TPU slices lie along `data`, so that gradients alone cross the network between slices; `auto` is then
    that many replicas.

    Raises:
      UserError: the text cannot be read or does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) for device in devices if device.platform == "tpu"}) or 1
    sizes = mesh_sizes_of(text, len(devices), slices)
    # Auto axis types: the partitioner follows the constraints; jax.make_mesh would default to explicit ones.
    types = (AxisType.Auto,) * len(MESH_AXES)
    # An axis may end within a dimension of a slice, as fsdp=32,context=2 does on 4x4x4; jax.make_mesh allows that on a v5e alone.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        laid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
    else:
        within = sizes | {"data": sizes["data"] // slices}
        between = dict.fromkeys(MESH_AXES, 1) | {"data": slices}
        laid = mesh_utils.create_hybrid_device_mesh(tuple(within.values()), tuple(between.values()), devices, **split)
    return Mesh(laid, MESH_AXES, axis_types=types)


def mesh_sizes_of(text: str, n_devices: int, slices: int = 1) -> dict[str, int]:
    """`parse_mesh` for devices of one or several slices. Raises UserError as it, or if `data` does not span the slices."""
    sizes = parse_mesh(f"data={slices},fsdp=-1" if text == "auto" and slices > 1 else text, n_devices)
    if sizes["data"] % slices:
        raise UserError(f"mesh {format_mesh(sizes)}: data must be a multiple of the {slices} slices, which it spans")
    return sizes


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    """Devices per mesh axis."""
    return dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))


def batch_rows_of_process(mesh: Mesh, rows: int) -> slice:
    """Which rows of a global batch of `rows` this process has to provide: the span of those its own devices hold."""
    indices = sharding(mesh, "batch").devices_indices_map((rows,))
    mine = [indices[d][0].indices(rows)[:2] for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return slice(min(start for start, _ in mine), max(stop for _, stop in mine))


def global_array(mesh: Mesh, local: np.ndarray, *axes: str | None, rows: int) -> jax.Array:
    """Assembles a global array from this process's rows (the span that `batch_rows_of_process` names).

    Args:
      mesh: the mesh it lies on.
      local: this process's rows, all of every other axis.
      axes: logical names of the array's axes, the first being the rows.
      rows: rows of the global array.
    """
    span = batch_rows_of_process(mesh, rows)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        return local[(slice(start - span.start, stop - span.start), *index[1:])]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding(mesh, *axes), shard)
