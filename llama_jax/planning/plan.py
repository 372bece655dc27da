"""A plan: what the compiled step of a recipe takes of every chip of a slice, and how fast it can be.

Exact: memory and FLOPs, which are the compiled program's own. Counted: bytes through main memory and between chips.
Estimated: times, which are those over published peaks.
"""

import dataclasses
import math
import resource
import time
from dataclasses import dataclass
from typing import Any

import jax

from llama_jax.parallel.mesh import format_mesh, make_mesh, mesh_sizes_of
from llama_jax.planning import hlo
from llama_jax.planning.compiling import Refused, compile_for, devices_of
from llama_jax.planning.program_cost import ProgramCost, program_cost
from llama_jax.planning.programs import Job
from llama_jax.planning.roofline import Placement, Roofline, collective_seconds, cycles_seconds, place, roofline
from llama_jax.planning.topology import Topology
from llama_jax.training.metrics import format_count, say


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    parameters: float
    """Trained and frozen."""
    optimizer: float
    batch: float
    """With the counters."""
    padding: float
    """What the arguments take beyond that, because arrays are laid out in tiles."""
    temporary: float
    """Activations, gradients, gathered weights."""
    program: float
    """The program itself, and results that reuse no argument's memory."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same axes, in one step."""

    kind: str
    axes: str
    """Of the mesh, such as fsdp or fsdp*tensor."""
    bytes: float
    """Of the whole arrays; see `Collective.bytes`."""
    seconds_ici: float
    seconds_dcn: float


@dataclass(frozen=True)
class Plan:
    """One recipe on one topology and mesh: of one chip and one step, unless said otherwise."""

    stage: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    remat: str
    micro_batches: int
    rows: int
    length: int
    parameters: int
    """Numbers in the whole model."""
    total_tokens: int | None
    """Of the run."""
    assumptions: tuple[str, ...]
    versions: dict[str, str]
    usable_bytes: float
    """Of a chip's memory, what a program may have."""
    compile_seconds: float
    host_bytes: float
    """The most that the planning process has held."""
    refused: Refused | None = None
    """Set where the compiler finds that it does not fit; then nothing below is known."""
    memory: Memory | None = None
    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    model_flops: float = 0.0
    """The model's own, recomputation not counted, attention causal."""
    bytes_through_hbm: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    seconds: Roofline | None = None
    seconds_by_compiler: float = 0.0
    """From the compiler's cycle estimates and the kernels at peak, collectives left out; 0 where it estimates nothing."""
    unknown_kernels: tuple[str, ...] = ()
    peak_flops: float = 0.0
    """Of a chip."""

    @property
    def fits(self) -> bool:
        """Whether the compiler found a place for everything."""
        return self.refused is None

    @property
    def tokens_per_step(self) -> int:
        """Of the whole slice."""
        return self.rows * self.length

    @property
    def tokens_per_s(self) -> float:
        """Of the whole slice, at the bound."""
        return self.tokens_per_step / self.seconds.bound

    @property
    def mfu(self) -> float:
        """The share of a chip's peak that goes into the model's FLOPs, at the bound."""
        return self.model_flops / (self.seconds.bound * self.peak_flops)

    @property
    def days(self) -> float | None:
        """Of the whole run at the bound, if the recipe says how many tokens it has."""
        return None if self.total_tokens is None else self.total_tokens / self.tokens_per_s / 86400

    def flags(self) -> str:
        """What the command line of the run has to say for this plan."""
        return f"--mesh {format_mesh(self.mesh)} --micro-batches {self.micro_batches} --compute.remat {self.remat}"


def make_plan(job: Job, topology: Topology) -> Plan:
    """Compiles a recipe's step for a topology and adds up what it takes.

    Raises:
      UserError: the recipe does not suit the topology, or libtpu does not know it.
    """
    devices = devices_of(topology)
    mesh = make_mesh(job.config.mesh, devices)
    sizes = mesh_sizes_of(job.config.mesh, len(devices), topology.slices)
    step, arguments = job.describe(mesh)
    say(
        f"compiling the {job.stage} step of a {format_count(job.model.n_params)}-parameter model for {topology}, mesh "
        f"{format_mesh(sizes)}, micro-batches {job.config.micro_batches}, remat {job.config.compute.remat}; this takes minutes ..."
    )
    began = time.monotonic()
    compiled = compile_for(step, mesh, arguments)
    known = {
        "stage": job.stage,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": sizes,
        "remat": job.config.compute.remat,
        "micro_batches": job.config.micro_batches,
        "rows": job.rows,
        "length": job.length,
        "parameters": job.model.n_params,
        "total_tokens": job.total_tokens,
        "assumptions": job.assumptions,
        "versions": versions(),
        "usable_bytes": topology.chip.usable_bytes,
        "compile_seconds": round(time.monotonic() - began, 1),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }
    if isinstance(compiled, Refused):
        return Plan(**known, refused=compiled)
    cost = program_cost(hlo.parse(compiled.as_text()), mesh.size)
    placement = place(mesh.devices, topology)
    return Plan(
        **known,
        memory=memory_of(compiled.memory_analysis(), arguments),
        matmul_flops=cost.matmul_flops,
        kernel_flops=cost.kernel_flops,
        model_flops=job.model_flops / mesh.size,
        bytes_through_hbm=cost.hbm_bytes,
        exchanges=exchanges_of(cost, sizes, placement),
        seconds=roofline(cost, placement),
        seconds_by_compiler=cycles_seconds(cost, topology.chip),
        unknown_kernels=cost.unknown_kernels,
        peak_flops=topology.chip.device_peak_bf16_flops,
    )


def memory_of(analysis: Any, arguments: tuple) -> Memory:
    """The compiler's account of a device's memory, its arguments told apart by what they are."""
    state, batch, *frozen = arguments
    parameters = bytes_per_device((state.model, *frozen))
    optimizer = bytes_per_device(state.opt_state)
    rest = bytes_per_device((batch, state.step, state.skipped, state.skipped_in_row))
    return Memory(
        parameters,
        optimizer,
        rest,
        analysis.argument_size_in_bytes - parameters - optimizer - rest,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )


def bytes_per_device(tree: Any) -> float:
    """Bytes per device of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def exchanges_of(cost: ProgramCost, sizes: dict[str, int], placement: Placement) -> tuple[Exchange, ...]:
    """Collectives added up by kind and axes, the longest first."""
    found: dict[tuple[str, str], list[float]] = {}
    for exchange in cost.collectives:
        axes = "*".join(exchange.axes(sizes)) or "none"
        sums = found.setdefault((exchange.kind, axes), [0.0, 0.0, 0.0])
        for column, value in enumerate((exchange.times * exchange.bytes, *collective_seconds(exchange, placement))):
            sums[column] += value
    exchanges = [Exchange(*key, *sums) for key, sums in found.items()]
    return tuple(sorted(exchanges, key=lambda one: -one.seconds_ici - one.seconds_dcn))


def versions() -> dict[str, str]:
    """What a plan depends on beside the recipe."""
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON, with what follows from it."""
    found = dataclasses.asdict(plan) | {"fits": plan.fits}
    if plan.fits:
        found["seconds"] |= {
            "bound": plan.seconds.bound,
            "unhidden": plan.seconds.unhidden,
            "binds": plan.seconds.binds,
        }
        found["memory"] |= {"total": plan.memory.total}
        found |= {"tokens_per_s": plan.tokens_per_s, "mfu": plan.mfu, "days": plan.days}
    return found


def from_json(found: dict[str, Any]) -> Plan:
    """The plan of which `to_json` made this."""
    fields = {one.name: found[one.name] for one in dataclasses.fields(Plan)}
    for name, made in (("refused", Refused), ("memory", Memory), ("seconds", Roofline)):
        if fields[name] is not None:
            fields[name] = made(**{one.name: fields[name][one.name] for one in dataclasses.fields(made)})
    fields["exchanges"] = tuple(Exchange(**one) for one in fields["exchanges"])
    fields["assumptions"], fields["unknown_kernels"] = tuple(fields["assumptions"]), tuple(fields["unknown_kernels"])
    return Plan(**fields)
