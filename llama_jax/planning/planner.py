"""From a recipe to its plan: the one that is kept, or a new one, or what a search finds."""

from llama_jax.config import LlamaConfig
from llama_jax.parallel.mesh import format_mesh, mesh_sizes_of
from llama_jax.planning import cache
from llama_jax.planning.plan import Plan, make_plan
from llama_jax.planning.programs import Job, job_of
from llama_jax.planning.report import format_refusal
from llama_jax.planning.search import best, nearest_that_fits
from llama_jax.planning.topology import Topology
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

    def planned(job: Job) -> Plan:
        plan = kept_or_made(job, topology, fresh)
        if search:
            say(f"{plan.flags()}: {f'{plan.seconds.bound:.3g} s a step' if plan.fits else format_refusal(plan)}")
        return plan

    own = planned(job_of(config, model, sizes))
    if not search:
        return own, own
    if own.fits:
        found = best(config, model, topology, planned, tries).plan
        return own, min(filter(None, (own, found)), key=lambda plan: plan.seconds.bound)
    return own, nearest_that_fits(config, model, topology, own, planned, tries).plan or own


def kept_or_made(job: Job, topology: Topology, fresh: bool) -> Plan:
    """The plan of a job, compiled unless it is kept from before."""
    key = cache.key_of(job, topology)
    if not fresh and (kept := cache.read(key)):
        say(
            f"mesh {format_mesh(kept.mesh)}: kept from an earlier call in {cache.cache_folder()}; --fresh compiles it again"
        )
        return kept
    made = make_plan(job, topology)
    cache.write(key, made)
    return made
