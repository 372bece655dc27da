"""Looking for a plan that fits: which programs are compiled, in which order, and what is taken. Nothing is compiled here."""

from dataclasses import replace

import pytest

from llama_jax.config import LLAMA2_7B, LLAMA2_13B, Compute
from llama_jax.errors import UserError
from llama_jax.parallel.mesh import mesh_sizes_of
from llama_jax.planning import search
from llama_jax.planning.compiling import Refused
from llama_jax.planning.plan import Memory, Plan, make_plan
from llama_jax.planning.programs import job_of
from llama_jax.planning.roofline import Roofline
from llama_jax.planning.topology import parse_topology
from llama_jax.stages.pretrain import PretrainConfig

V5E = parse_topology("v5e:4x4")
CONFIG = PretrainConfig(model=LLAMA2_7B, train_tokens=2 * 10**12)


class Compiler:
    """Plays the compiler: a program takes the state, and as much for activations as `bytes_of` says."""

    def __init__(self, topology, bytes_of, seconds_of=lambda job: 1.0):
        self.topology, self.bytes_of, self.seconds_of, self.asked = topology, bytes_of, seconds_of, []

    def __call__(self, job):
        sizes = mesh_sizes_of(job.config.mesh, self.topology.chips, self.topology.slices)
        self.asked.append((job.config.mesh, job.config.micro_batches, job.config.compute.remat))
        taken, usable = self.bytes_of(job, sizes), self.topology.chip.usable_bytes
        known = Plan(
            stage="pretrain",
            topology=self.topology.name,
            slices=self.topology.slices,
            chips=self.topology.chips,
            mesh=sizes,
            remat=job.config.compute.remat,
            micro_batches=job.config.micro_batches,
            rows=job.rows,
            length=job.length,
            parameters=job.model.n_params,
            total_tokens=job.total_tokens,
            assumptions=(),
            versions={},
            usable_bytes=usable,
            compile_seconds=1.0,
            host_bytes=1.0,
        )
        if taken > usable:
            return replace(known, refused=Refused(taken, usable, "no"))
        seconds = Roofline(self.seconds_of(job), 0.0, 0.0, 0.0)
        return replace(known, memory=Memory(taken, 0, 0, 0, 0, 0), seconds=seconds, model_flops=1.0, peak_flops=1.0)


def residuals(job, sizes):
    """State, and one vector a token and block: what full recomputation keeps."""
    tokens = job.rows * job.length / job.config.micro_batches / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    return 16 * job.model.n_params / 16 + 2 * tokens * job.model.dim * job.model.n_layers


def nearest(compiler, config, tries=4):
    own = compiler(job_of(config, None, mesh_sizes_of(config.mesh, 16)))
    return own, search.nearest_that_fits(config, None, V5E, own, compiler, tries)


def test_the_fewest_micro_batches_that_fit_come_first():
    compiler = Compiler(V5E, residuals)
    own, found = nearest(compiler, CONFIG)
    assert not own.fits and found.plan.fits
    # 1,024 sequences on 16 chips keep 68.7 GB in one part; beside 6.7 GB of state, 8 parts leave 8.6 GB.
    assert found.plan.flags() == "--mesh fsdp=16 --micro-batches 8 --compute.remat full"
    assert len(compiler.asked) == 2  # the recipe's own, and the one that fits: nothing is compiled in vain


def test_recomputing_more_comes_after_micro_batches():
    """A policy that keeps so much that no number of parts helps."""
    config = replace(CONFIG, compute=Compute(remat="dots"))

    def heavy(job, sizes):
        return residuals(job, sizes) + (20e9 if job.config.compute.remat != "full" else 0)

    _, found = nearest(Compiler(V5E, heavy), config, tries=20)
    assert found.plan.remat == "full" and found.plan.mesh == {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}


def test_another_mesh_comes_last():
    """Where one sequence a chip is too much, the sequence is split or the heads are."""

    def long(job, sizes):
        return 30e9 / (sizes["context"] * sizes["tensor"])

    config = replace(CONFIG, batch_tokens=16 * 4096)
    _, found = nearest(Compiler(V5E, long), config)
    assert found.plan.fits and found.plan.mesh["context"] * found.plan.mesh["tensor"] > 1


def test_nothing_that_fits_is_said_and_not_more_than_tries_are_compiled():
    compiler = Compiler(V5E, lambda job, sizes: 17e9)
    _, found = nearest(compiler, CONFIG, tries=3)
    assert found.plan is None and len(found.tried) <= 3


def test_the_best_is_the_fastest_that_fits():
    compiler = Compiler(V5E, residuals, lambda job: 1.0 if "tensor=2" in job.config.mesh else 2.0)
    found = search.best(CONFIG, None, V5E, compiler, tries=8)
    assert found.plan.mesh["tensor"] == 2 and found.plan.seconds.bound == 1.0
    assert all(plan.seconds.bound == 2.0 for plan in found.tried if plan.fits and plan.mesh["tensor"] == 1)


def test_memory_that_is_left_goes_to_less_recomputation():
    """One policy that fits and is faster, one that does not fit."""
    kept = {"full": 1, "attention": 2, "dots": 8, "none": 20}

    def with_policy(job, sizes):
        return 7e9 + 2e9 * kept[job.config.compute.remat]

    def faster(job):
        return 1.0 if job.config.compute.remat == "full" else 0.9

    found = search.best(
        replace(CONFIG, batch_tokens=16 * 4096), None, V5E, Compiler(V5E, with_policy, faster), tries=50
    )
    assert found.plan.remat == "attention" and found.plan.seconds.bound == 0.9


@pytest.mark.parametrize("slices", [1, 2])
def test_candidates_suit_heads_slices_and_batch(slices):
    """13B's 40 heads do not split over 16; slices lie along data."""
    topology = parse_topology("v5e:4x4", slices)
    compiler = Compiler(topology, lambda job, sizes: 1.0)
    found = search.best(replace(CONFIG, model=LLAMA2_13B), None, topology, compiler, tries=50)
    assert found.tried and all(plan.mesh["tensor"] in (1, 2, 4, 8) for plan in found.tried)
    assert all(plan.mesh["data"] == slices for plan in found.tried)


def test_gpus_are_not_offered_moments_on_the_host_which_their_plans_cannot_see():
    topology, asked = parse_topology("h100:8"), []
    compiler = Compiler(topology, lambda job, sizes: 1e12)

    def noted(job):
        asked.append(job.config.compute.offload)
        return compiler(job)

    own = compiler(job_of(CONFIG, None, mesh_sizes_of("auto", 8)))
    search.nearest_that_fits(CONFIG, None, topology, replace(own, refused=Refused(80e9, 78e9, "")), noted, 1000)
    assert asked and not any(asked)
    job = job_of(replace(CONFIG, compute=Compute(offload=True)), None, mesh_sizes_of("auto", 8))
    with pytest.raises(UserError, match="cannot see what --compute.offload keeps"):
        make_plan(job, topology)
