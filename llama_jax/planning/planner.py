"""From a recipe to its plan: the one that is kept, or a new one, or what a search finds."""

from dataclasses import replace
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.parallel.mesh import format_mesh, mesh_sizes_of
from llama_jax.planning import cache
from llama_jax.planning.generation_programs import GenerateConfig, generate_job, ppo_jobs
from llama_jax.planning.plan import Plan, make_plan
from llama_jax.planning.programs import Job, job_of, named_model
from llama_jax.planning.report import format_refusal
from llama_jax.planning.search import best, nearest_that_fits
from llama_jax.planning.topology import Topology
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.training.metrics import say
from llama_jax.training.run_config import RunConfig


def plan_recipe(
    config: RunConfig,
    model: LlamaConfig | None,
    topology: Topology,
    *,
    search: bool = False,
    tries: int = 4,
    fresh: bool = False,
) -> tuple[Plan, Plan]:
    """Plans a recipe for a topology.

    Args:
      config: the recipe.
      model: the architecture, where the recipe names a checkpoint.
      topology: one or several slices.
      search: whether to look for a faster mesh, or, where the recipe's own plan does not fit, for the nearest that does.
      tries: how many programs a search compiles at most.
      fresh: compile even what is kept.

    Returns:
      the plan of the recipe as it is, and the one to show: the same, or what the search found.

    Raises:
      UserError: the recipe does not suit the topology.
    """
    sizes = mesh_sizes_of(config.mesh, topology.chips, topology.slices)

    made: dict[str, Plan] = {}

    def planned(job: Job) -> Plan:
        key = cache.key_of(job, topology)
        if key not in made:  # a search comes by the recipe itself again
            plan = made[key] = kept_or_made(job, topology, fresh)
            if search:
                say(f"{plan.flags()}: {f'{plan.seconds.bound:.3g} s a step' if plan.fits else format_refusal(plan)}")
        return made[key]

    own = planned(job_of(config, model, sizes))
    if not search:
        return own, own
    if own.fits:
        found = best(config, model, topology, planned, tries).plan
        return own, min(filter(None, (own, found)), key=lambda plan: plan.seconds.bound)
    return own, nearest_that_fits(config, model, topology, own, planned, tries).plan or own


def plan_programs(
    config: PPOConfig | GenerateConfig,
    model: LlamaConfig | None,
    topology: Topology,
    *,
    prompt_tokens: int,
    fresh: bool,
) -> tuple[Plan, ...]:
    """Plans each of the programs that an iteration of PPO runs, or the one that serves.

    Args:
      config: the recipe.
      model: the architecture, where the recipe does not say it.
      topology: one or several slices.
      prompt_tokens: of the longest prompt.
      fresh: compile even what is kept.

    Raises:
      UserError: the recipe does not suit the topology.
    """
    sizes = mesh_sizes_of(config.mesh, topology.chips, topology.slices)
    return tuple(kept_or_made(job, topology, fresh) for job in jobs_of(config, model, sizes, prompt_tokens))


def jobs_of(config: Any, model: LlamaConfig | None, sizes: dict[str, int], prompt_tokens: int) -> tuple[Job, ...]:
    """What is compiled for a recipe: a training step, or each of the programs that generate or that PPO runs; see
    `plan_programs`.
    """
    if isinstance(config, GenerateConfig):
        return (generate_job(config if model is None else replace(config, model=model), sizes),)
    if isinstance(config, PPOConfig):
        return ppo_jobs(config, model or named_model(config.checkpoint), sizes, prompt_tokens)
    return (job_of(config, model, sizes),)


def kept_or_made(job: Job, topology: Topology, fresh: bool) -> Plan:
    """The plan of a job, compiled unless it is kept from before."""
    key = cache.key_of(job, topology)
    if not fresh and (kept := cache.read(key)):
        say(
            f"{kept.stage}, mesh {format_mesh(kept.mesh)}: kept from an earlier call in {cache.cache_folder()}; --fresh compiles it again"
        )
        return kept
    made = make_plan(job, topology)
    cache.write(key, made)
    return made
