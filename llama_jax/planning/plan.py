"""A plan: what the compiled step of a recipe takes of every chip of a slice, and how fast it can be.

Exact: memory and FLOPs, which are the compiled program's own. Counted: bytes through main memory and between chips.
Estimated: times, which are those over published peaks.
"""

import dataclasses
import math
import resource
import time
from dataclasses import dataclass, replace
from typing import Any

import jax

from llama_jax.errors import UserError
from llama_jax.generation.sampler import Decoding
from llama_jax.parallel.mesh import format_mesh, make_mesh, mesh_sizes_of
from llama_jax.planning import hlo
from llama_jax.planning.compiling import Refused, compile_for, compiler_package, devices_of
from llama_jax.planning.program_cost import ProgramCost, program_cost
from llama_jax.planning.programs import Job
from llama_jax.planning.roofline import Placement, Roofline, collective_seconds, cycles_seconds, place, roofline
from llama_jax.planning.topology import GPUS, Topology
from llama_jax.training.metrics import format_count, say
from llama_jax.training.step import TrainState


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
    cache: float = 0.0
    """Keys and values of what is being drawn."""
    beside: float = 0.0
    """What other programs of the same run keep meanwhile."""

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
    """On the links within a slice, or a host of GPUs."""
    seconds_dcn: float
    """On the network between these."""


@dataclass(frozen=True)
class Plan:
    """One recipe on one topology and mesh: of one chip and one step, unless said otherwise."""

    stage: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    remat: str
    """What is recomputed; empty for a program that trains nothing."""
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
    runs: int = 1
    """How often an iteration of the recipe runs the program."""
    offloaded: float = 0.0
    """Bytes that the host keeps for a chip: the optimizer's moments, where they are offloaded."""
    refused: Refused | None = None
    """Set where it does not fit; then nothing below is known."""
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
    def on_gpus(self) -> bool:
        """Whether its chips are GPUs."""
        return self.topology.partition(":")[0] in GPUS

    @property
    def fits(self) -> bool:
        """Whether there is a place for everything."""
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
        if not self.remat:
            return f"--mesh {format_mesh(self.mesh)}"
        return (
            f"--mesh {format_mesh(self.mesh)} --micro-batches {self.micro_batches} --compute.remat {self.remat}"
            + " --compute.offload" * bool(self.offloaded)
        )


def make_plan(job: Job, topology: Topology) -> Plan:
    """Compiles a recipe's step for a topology and adds up what it takes.

    Raises:
      UserError: the recipe does not suit the topology, or libtpu does not know it.
    """
    if topology.chip.is_gpu and job.trains and job.config.compute.offload:
        raise UserError(
            "a plan for GPUs cannot see what --compute.offload keeps in the host's memory, which jax does not know of GPUs that are "
            "not there; leave it out: moments take 8 bytes a trained parameter, over all GPUs"
        )
    devices = devices_of(topology)
    mesh = make_mesh(job.config.mesh, devices)
    sizes = mesh_sizes_of(job.config.mesh, len(devices), topology.slices)
    step, arguments = job.describe(mesh)
    beside = bytes_per_device(job.beside(mesh))
    micro_batches, remat = (job.config.micro_batches, job.config.compute.remat) if job.trains else (1, "")
    say(
        f"compiling {job.stage}: a {format_count(job.model.n_params)}-parameter model for {topology}, mesh {format_mesh(sizes)}"
        + f", micro-batches {micro_batches}, remat {remat}" * job.trains
        + "; this takes minutes ..."
    )
    began = time.monotonic()
    compiled = compile_for(step, mesh, arguments)
    known = {
        "stage": job.stage,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": sizes,
        "remat": remat,
        "micro_batches": micro_batches,
        "rows": job.rows,
        "length": job.length,
        "parameters": job.model.n_params,
        "total_tokens": job.total_tokens,
        "assumptions": job.assumptions,
        "versions": versions(topology),
        "usable_bytes": topology.chip.usable_bytes,
        "compile_seconds": round(time.monotonic() - began, 1),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        "runs": job.runs,
        "offloaded": bytes_per_device(arguments, on_host=True),
    }
    if isinstance(compiled, Refused):
        return Plan(**known, refused=replace(compiled, asked=compiled.asked and compiled.asked + beside, beside=beside))
    memory = memory_of(compiled.memory_analysis(), arguments, beside)
    if memory.total > topology.chip.usable_bytes:
        # The compiler for GPUs refuses nothing, and no compiler knows of what lies beside.
        too_much = Refused(memory.total, topology.chip.usable_bytes, "", beside)
        return Plan(**known, refused=too_much)
    program = replace(hlo.parse(compiled.as_text()), data_loops=job.data_loops)
    cost = program_cost(program, mesh.size)
    placement = place(mesh.devices, topology)
    return Plan(
        **known,
        memory=memory,
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


def memory_of(analysis: Any, arguments: tuple, beside: float = 0.0) -> Memory:
    """The compiler's account of a device's memory, its arguments told apart by what they are.

    Args:
      analysis: the compiled program's.
      arguments: a state, a batch and frozen weights; or a model, and the rows that it reads or draws.
      beside: bytes that others keep.
    """
    first, second, *frozen = arguments
    optimizer = cache = counters = 0.0
    if isinstance(first, TrainState):
        optimizer, counters = (
            bytes_per_device(first.opt_state),
            bytes_per_device((first.step, first.skipped, first.skipped_in_row)),
        )
        first = first.model
    if isinstance(second, Decoding):
        cache, second = bytes_per_device(second.cache), second[1:]
    parameters, rest = bytes_per_device((first, *frozen)), bytes_per_device(second) + counters
    return Memory(
        parameters,
        optimizer,
        rest,
        analysis.argument_size_in_bytes - parameters - optimizer - rest - cache,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        cache,
        beside,
    )


def bytes_per_device(tree: Any, *, on_host: bool = False) -> float:
    """Bytes per device of shapes with shardings: of what lies in the devices' memory, or in the host's."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == "pinned_host") == on_host]
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


def versions(topology: Topology) -> dict[str, str]:
    """What a plan depends on beside the recipe."""
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", compiler_package(topology.chip))}


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
