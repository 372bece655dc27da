"""What PPO goes on from: the states of policy and critic, where they begin, and how they stand in a checkpoint."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import GradientTransformation

from llama_jax.generation.ppo_models import Actors, abstract_trained, first_critic, first_policy
from llama_jax.stages.ppo_iteration import Run, Trained
from llama_jax.training import step as steps
from llama_jax.training.checkpoint import Checkpoints, adapters_metadata
from llama_jax.training.metrics import say
from llama_jax.training.step import TrainState


@struct.dataclass
class PPOState(TrainState):
    """What a checkpoint holds: the policy's state with iterations as its `step`, and the critic's."""

    policy_steps: jax.Array
    """int32, gradient steps, which `step` counts in the state that trains."""
    critic: TrainState


class Best(NamedTuple):
    """The evaluation with the highest mean reward so far."""

    iteration: int = -1
    reward: float = -math.inf


def describe_states(
    actors: Actors, optimizers: tuple[GradientTransformation, ...], mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The states of policy and critic as shapes, dtypes and shardings."""
    trained = [abstract_trained(declared, mesh) for declared in (actors.declared_policy(), actors.declared_critic())]
    offload = actors.compute.offload
    return tuple(
        steps.abstract_new_state(*pair, mesh, offload=offload) for pair in zip(trained, optimizers, strict=True)
    )


def begin(prepared: Run, saved: Checkpoints) -> tuple[Trained, int, Best]:
    """The states of policy and critic to go on from, how many iterations they have behind them, and the best evaluation."""
    optimizers = prepared.policy_optimizer, prepared.critic_optimizer
    abstract = Trained(*describe_states(prepared.actors, optimizers, prepared.mesh))
    if restored := saved.restore_newest(_joined(abstract, abstract.policy.step)):
        state, metadata = restored
        say(f"resumed at iteration {int(state.step)} from {saved.folder}")
        return _parted(state), int(state.step), Best(**metadata["best"] or {})
    made = []
    for shapes, first, optimizer in zip(abstract, (first_policy, first_critic), optimizers, strict=True):
        layout = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        adopt = jax.jit(partial(steps.new_state, optimizer=optimizer), out_shardings=layout, donate_argnums=0)
        made.append(adopt(first(prepared.actors, prepared.mesh, prepared.config.seed)))
    return Trained(*made), 0, Best()


def save(into: Checkpoints, prepared: Run, recipe: dict[str, Any], trained: Trained, done: int, best: Best) -> None:
    """Starts to save what so many iterations have left, unless it was saved before a stop: it is the same."""
    into.wait()
    if done in into.steps():
        return
    everywhere = NamedSharding(prepared.mesh, PartitionSpec())
    own = {"model": dataclasses.asdict(prepared.actors.config), "recipe": recipe, "cursor": {"iteration": done}}
    own["best"] = best._asdict() if best.iteration >= 0 else None
    if prepared.actors.lora:
        own["adapters"] = adapters_metadata(prepared.actors.lora, prepared.actors.checkpoint)
    into.save(_joined(trained, jax.device_put(np.int32(done), everywhere)), own, prepared.tokenizer)


def _joined(trained: Trained, iterations: jax.Array) -> PPOState:
    policy, critic = trained
    return PPOState(**vars(policy) | {"step": iterations, "policy_steps": policy.step, "critic": critic})


def _parted(state: PPOState) -> Trained:
    """The inverse of `_joined`."""
    policy = {one.name: getattr(state, one.name) for one in dataclasses.fields(TrainState)}
    return Trained(TrainState(**policy | {"step": state.policy_steps}), state.critic)
