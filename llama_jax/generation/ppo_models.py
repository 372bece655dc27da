"""The four models of PPO (paper 3.2.3): policy, reference, reward models and critic; what of them is trained, and what is shared.

With every weight trained there are four separate models. With adapters, policy and reference are one frozen backbone, with
and without the policy's adapters; a reward model whose adapters were trained beside that same backbone shares it too, and so
does the critic that begins from it. The weights then exist once.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import Compute, LlamaConfig
from llama_jax.conversion.load import load_model
from llama_jax.generation.rewards import RewardInfo, cast_trunk, read_trained, read_whole
from llama_jax.model.heads import RewardModel, describe_reward_model, trunk_config, with_scalar_head, without_head
from llama_jax.model.lora import LoraConfig, adapt, describe_adapters, init_adapters
from llama_jax.model.nf4 import nf4_abstract
from llama_jax.model.quantize import quantize_abstract
from llama_jax.model.transformer import Transformer, abstract, describe
from llama_jax.parallel.mesh import sharding


@dataclass(frozen=True)
class Actors:
    """Which models take part, before any weight is read."""

    checkpoint: Path
    """The policy's and the reference's."""
    config: LlamaConfig
    lora: LoraConfig | None
    """The policy's adapters; None where every weight is trained."""
    safety: RewardInfo | None
    helpfulness: RewardInfo | None
    compute: Compute
    int8: bool = False
    nf4: bool = False

    @property
    def judge(self) -> RewardInfo | None:
        """The reward model that the critic begins from: the helpfulness one, where there is one."""
        return self.helpfulness or self.safety

    def shares(self, info: RewardInfo | None) -> bool:
        """Whether a reward model is adapters beside the very weights that are frozen here."""
        return bool(self.lora and info and info.lora) and Path(info.base).resolve() == self.checkpoint.resolve()

    @property
    def critic_config(self) -> LlamaConfig:
        """The critic's transformer."""
        return self.judge.config if self.judge else trunk_config(self.config)

    @property
    def critic_lora(self) -> LoraConfig | None:
        """The critic's adapters: the reward model's own where these go on to be trained."""
        return self.judge.lora if self.shares(self.judge) else self.lora

    def declared_policy(self) -> Any:
        """What is trained of the policy, as a tree of declarations."""
        return describe(self.config) if self.lora is None else describe_adapters(self.config, self.lora)

    def declared_critic(self) -> RewardModel:
        """What is trained of the critic, as a tree of declarations."""
        declared = describe_reward_model(self.critic_config)
        if self.critic_lora is None:
            return declared
        return dataclasses.replace(declared, trunk=describe_adapters(self.critic_config, self.critic_lora))


@dataclass(frozen=True)
class Frozen:
    """What stays as it is while PPO trains, in the precision of the computation."""

    reference: Transformer
    """Also the backbone of the policy's adapters, where such are trained."""
    safety: RewardModel | None
    helpfulness: RewardModel | None
    trunk: Transformer | None
    """Under the critic's adapters, where such are trained."""


def read_frozen(actors: Actors, mesh: Mesh) -> Frozen:
    """Reads reference and reward models onto the mesh.

    Raises:
      UserError: one of them is not whole.
    """
    dtype = actors.compute.dtype
    reference = load_model(actors.checkpoint, mesh, dtype, int8=actors.int8, nf4=actors.nf4)[0]

    def read(info: RewardInfo | None) -> RewardModel | None:
        if info is None:
            return None
        if not actors.shares(info):
            narrow = partial(cast_trunk, dtype=dtype)
            return _laid_out(narrow, describe_reward_model(info.config), mesh, read_whole(info, mesh))
        trained = read_trained(info, mesh)
        return dataclasses.replace(trained, trunk=adapt(without_head(reference), trained.trunk, info.lora))

    safety, helpfulness = read(actors.safety), read(actors.helpfulness)
    trunk = None
    if actors.critic_lora is not None:
        judge = helpfulness or safety
        trunk = without_head(reference) if judge is None or actors.shares(actors.judge) else judge.trunk
    return Frozen(reference, safety, helpfulness, trunk)


def first_policy(actors: Actors, mesh: Mesh, seed: int) -> Any:
    """What is trained of the policy before the first step: the checkpoint's weights in float32, or adapters that change
    nothing yet.
    """
    if actors.lora is None:
        return load_model(actors.checkpoint, mesh, "float32")[0]
    return _laid_out(
        lambda: init_adapters(actors.config, actors.lora, jax.random.key(seed)), actors.declared_policy(), mesh
    )


def first_critic(actors: Actors, mesh: Mesh, seed: int) -> RewardModel:
    """What is trained of the critic before the first step: it begins as the reward model; without one, as the policy with
    a fresh head.

    Adapters of a reward model that shares the backbone go on to be trained; beside any other reward model the critic gets
    fresh adapters, and that model's head.
    """
    judge, key = actors.judge, jax.random.fold_in(jax.random.key(seed), 1)
    declared = actors.declared_critic()
    if judge is None:

        def fresh(trunk: Any) -> RewardModel:
            return with_scalar_head(trunk, actors.critic_config, key)

        if actors.critic_lora is None:
            trunk = without_head(load_model(actors.checkpoint, mesh, "float32")[0])
            return _laid_out(fresh, declared, mesh, trunk)
        adapters = init_adapters(actors.critic_config, actors.critic_lora, key)
        return _laid_out(lambda: fresh(adapters), declared, mesh)
    if actors.critic_lora is None:
        return read_whole(judge, mesh)
    trained = read_trained(judge, mesh)
    if actors.shares(judge):
        return trained
    adapters = init_adapters(actors.critic_config, actors.critic_lora, key)
    return _laid_out(
        lambda head_D, bias: RewardModel(adapters, head_D, bias), declared, mesh, trained.head_D, trained.bias
    )


def assemble_policy(
    actors: Actors, trained: Any, frozen: Transformer | None, key: jax.Array | None = None
) -> Transformer:
    """The whole policy; with a key, its adapters' dropout is on."""
    return trained if actors.lora is None else adapt(frozen, trained, actors.lora, key)


def assemble_critic(
    actors: Actors, trained: RewardModel, frozen: Transformer | None, key: jax.Array | None = None
) -> RewardModel:
    """The whole critic; with a key, its adapters' dropout is on."""
    if actors.critic_lora is None:
        return trained
    return dataclasses.replace(trained, trunk=adapt(frozen, trained.trunk, actors.critic_lora, key))


def abstract_frozen(actors: Actors, mesh: Mesh) -> tuple[Any, Any]:
    """What is frozen under the policy's and under the critic's adapters, as shapes with shardings; None where nothing is."""
    dtype = actors.compute.dtype

    def under(config: LlamaConfig, quantised: bool) -> Transformer:
        shapes = abstract(config, mesh, dtype)
        if not quantised:
            return shapes
        return quantize_abstract(shapes) if actors.int8 else nf4_abstract(shapes) if actors.nf4 else shapes

    own = actors.judge is None or actors.shares(actors.judge)
    return (
        under(actors.config, True) if actors.lora else None,
        under(actors.critic_config, own) if actors.critic_lora else None,
    )


def abstract_trained(declared: Any, mesh: Mesh) -> Any:
    """Declarations as shapes with shardings, in float32."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=sharding(mesh, *p.axes)), declared
    )


def _laid_out(make: Callable, declared: Any, mesh: Mesh, *arguments: Any) -> Any:
    """What `make` gives, each array laid out as it is declared."""
    layout = jax.tree.map(lambda p: sharding(mesh, *p.axes), declared)
    return jax.jit(make, out_shardings=layout)(*arguments)
