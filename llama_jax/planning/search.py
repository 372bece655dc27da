"""Looking for a plan that fits, or for a better one: micro-batches, what is recomputed, and the mesh.

Compiling takes minutes, so only what is likely to fit is compiled. What a candidate takes is guessed from a plan that is
known: the state by the number of parameters, activations in proportion to the tokens that a chip holds at once.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.parallel.mesh import MESH_AXES, RULES, format_mesh
from llama_jax.planning.plan import Plan
from llama_jax.planning.programs import Job, job_of
from llama_jax.planning.topology import Topology
from llama_jax.training.run_config import RunConfig

REMAT = ("none", "dots", "attention", "full")
"""From the most memory to the least."""
_HEADROOM = 0.97  # of the chip's memory: a guess that fills all of it is compiled in vain


@dataclass(frozen=True)
class Candidate:
    """A way to run a recipe."""

    mesh: dict[str, int]
    micro_batches: int
    remat: str
    offload: bool = False

    def applied(self, config: RunConfig) -> RunConfig:
        """The recipe run this way."""
        compute = replace(config.compute, remat=self.remat, offload=self.offload)
        return replace(config, mesh=format_mesh(self.mesh), micro_batches=self.micro_batches, compute=compute)


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    plan: Plan | None
    tried: tuple[Plan, ...]


def nearest_that_fits(
    config: RunConfig,
    model: LlamaConfig | None,
    topology: Topology,
    refused: Plan,
    compile_job: Callable[[Job], Plan],
    tries: int,
) -> Found:
    """The least change to a refused plan that fits: more micro-batches first, then more recomputed, then another mesh, and
    the optimizer's moments on the host last.

    Args:
      config: the recipe that was refused.
      model: see `job_of`.
      topology: the slices.
      refused: its plan.
      compile_job: gives a job's plan.
      tries: how many candidates to compile at most.
    """
    here = Candidate(refused.mesh, refused.micro_batches, refused.remat, refused.offloaded > 0)
    fuller = REMAT[REMAT.index(refused.remat) :]
    same_mesh = [
        Candidate(refused.mesh, micro, remat, here.offload)
        for remat in fuller
        for micro in _micro_batches(refused.rows, refused.mesh, at_least=refused.micro_batches)
    ]
    others = [
        Candidate(mesh, micro, "full", here.offload)
        for mesh in sorted(meshes(topology), key=lambda mesh: (mesh["tensor"] * mesh["context"], mesh["data"]))
        if mesh != refused.mesh
        for micro in _micro_batches(refused.rows, mesh)
    ]
    can_offload = not here.offload and not topology.chip.is_gpu  # of GPUs a plan cannot see it
    on_the_host = [replace(one, offload=True) for one in (*same_mesh, *others)] if can_offload else []
    jobs = _jobs((one for one in (*same_mesh, *others, *on_the_host) if one != here), config, model)
    jobs = ((one, job) for one, job in jobs if _guess(one, job, refused) <= _HEADROOM * _available(refused))
    tried = []
    for _, job in itertools.islice(jobs, tries):
        tried.append(compile_job(job))
        if tried[-1].fits:
            return Found(tried[-1], tuple(tried))
    return Found(None, tuple(tried))


def best(
    config: RunConfig,
    model: LlamaConfig | None,
    topology: Topology,
    compile_job: Callable[[Job], Plan],
    tries: int,
) -> Found:
    """The fastest of the meshes that are likely to be, with the fewest micro-batches that fit, by the bound of their plans.

    Our choice of likely: fully sharded first, then as little `tensor` and `context` as there can be, which cost a collective
    inside every matmul's path. Where the best one leaves memory, it is tried with less recomputation too.
    """
    tried: list[Plan] = []
    order = sorted(meshes(topology), key=lambda mesh: (mesh["tensor"] * mesh["context"], mesh["data"], mesh["context"]))
    refused: Plan | None = None
    for mesh in order:
        rows = next(
            (
                job.rows
                for _, job in _jobs([Candidate(mesh, 1, config.compute.remat, config.compute.offload)], config, model)
            ),
            None,
        )
        if rows is None:
            continue
        for candidate, job in _jobs(
            (
                Candidate(mesh, micro, config.compute.remat, config.compute.offload)
                for micro in _micro_batches(rows, mesh)
            ),
            config,
            model,
        ):
            if len(tried) >= max(tries - 1, 1):  # one is kept for less recomputation
                break
            if refused is not None and _guess(candidate, job, refused) > _HEADROOM * _available(refused):
                continue
            plan = compile_job(job)
            tried.append(plan)
            if plan.fits:
                break
            refused = plan
    fastest = _fastest(tried)
    if fastest is not None:
        less = REMAT[: REMAT.index(fastest.remat)]
        for candidate, job in _jobs(
            (Candidate(fastest.mesh, fastest.micro_batches, remat, config.compute.offload) for remat in reversed(less)),
            config,
            model,
        ):
            if len(tried) < tries and _guess(candidate, job, fastest) <= _HEADROOM * _available(fastest):
                tried.append(compile_job(job))
    return Found(_fastest(tried), tuple(tried))


def _fastest(plans: Iterable[Plan]) -> Plan | None:
    return min((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds.bound, default=None)


def meshes(topology: Topology) -> Iterator[dict[str, int]]:
    """Every mesh of powers of two along `tensor` and `context`, with slices, and nothing else, along `data`."""
    within = topology.chips // topology.slices
    for tensor, context in itertools.product((1, 2, 4, 8, 16), (1, 2, 4)):
        if within % (tensor * context) == 0:
            sizes = (topology.slices, within // (tensor * context), context, tensor)
            yield dict(zip(MESH_AXES, sizes, strict=True))


def _micro_batches(rows: int, mesh: dict[str, int], at_least: int = 1) -> list[int]:
    """How many parts a batch can be split into, while every device keeps a row of each."""
    ways = math.prod(mesh[axis] for axis in RULES["batch"])
    return [n for n in range(at_least, rows // ways + 1) if rows % n == 0 and (rows // n) % ways == 0]


def _jobs(
    candidates: Iterable[Candidate], config: RunConfig, model: LlamaConfig | None
) -> Iterator[tuple[Candidate, Job]]:
    """The candidates that suit the recipe's model and batch."""
    for candidate in candidates:
        try:
            yield candidate, job_of(candidate.applied(config), model, candidate.mesh)
        except UserError:
            continue


def _available(known: Plan) -> float:
    return (known.refused and known.refused.available) or known.usable_bytes


def _asked(known: Plan) -> float:
    if known.memory is not None:
        return known.memory.total
    return known.refused.asked or 1.1 * known.usable_bytes


def _guess(candidate: Candidate, job: Job, known: Plan) -> float:
    """Bytes of a chip that a candidate is likely to take.

    The state is known, and so is what blocks keep for the backward pass; the rest of what was asked goes with the tokens that
    a chip works on at once.
    """
    tokens_was = known.rows * known.length / known.micro_batches
    tokens_now = job.rows * job.length / candidate.micro_batches
    kept_was = tokens_was * _kept(job.model, known.remat, known.mesh)
    kept_now = tokens_now * _kept(job.model, candidate.remat, candidate.mesh)
    work = max(_asked(known) - _state(job, known.mesh, known.micro_batches, known.offloaded > 0) - kept_was, 0.0)
    return (
        _state(job, candidate.mesh, candidate.micro_batches, candidate.offload)
        + kept_now
        + work * tokens_now / tokens_was
    )


def _state(job: Job, mesh: dict[str, int], micro_batches: int, offload: bool) -> float:
    """Bytes of a chip for parameters and moments, and for the sum of gradients where there are micro-batches."""
    whole = (4.0 if offload else 12.0) + 4.0 * (micro_batches > 1)
    each = 2.0 if getattr(job.config, "train", "all") == "lora" else whole
    return each * job.model.n_params * mesh["data"] / math.prod(mesh.values())


def _kept(model: LlamaConfig, remat: str, mesh: dict[str, int]) -> float:
    """Bytes per token of the global batch that a chip keeps of all blocks for the backward pass, in 16 bits."""
    devices = math.prod(mesh.values())
    residual = model.dim * mesh["tensor"] / devices  # `tensor` splits heads and widths, and not the residual stream
    heads = (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim / devices
    dots = 3 * residual + heads + 2 * model.ffn_dim / devices
    # Without recomputation float32 intermediates are kept too: four times as much, as a compiled 70B has it.
    numbers = {"full": residual, "attention": residual + heads, "dots": dots, "none": 4 * dots}
    return 2.0 * model.n_layers * numbers[remat]
