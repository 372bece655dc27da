"""Reward models without training: a checkpoint's own weights under a head that is drawn, or under one that is given."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from llama_jax.conversion.load import load_model
from llama_jax.model.heads import RewardModel, trunk_config, with_scalar_head, without_head
from llama_jax.model.lora import LoraConfig, init_adapters
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.held_out_pairs import Findings
from llama_jax.training.step import new_state

GOOD = Findings(pairs=400, accuracy=0.8, length_correlation=0.1, padding_change=0.001)


def write_reward_model(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    bias: float = 0.0,
    findings: Findings | None = GOOD,
    plain: bool = True,
    lora: LoraConfig | None = None,
) -> str:
    """Writes what a run of the reward stage leaves, and gives its folder; with `lora`, adapters that change something."""
    model, tokenizer = load_model(base, make_mesh(devices=jax.devices()[:1]), "float32")
    config, key, adapters = trunk_config(model.config), jax.random.key(seed), None
    trunk = without_head(model)
    if lora is not None:
        adapters = {"lora": dataclasses.asdict(lora), "base": str(base.resolve())}
        fresh = init_adapters(config, lora, key)
        trunk = jax.tree.map(lambda a: a + 0.02 * jax.random.normal(key, a.shape), fresh)
    made: RewardModel = with_scalar_head(trunk, config, key)
    made = dataclasses.replace(made, head_D=8 * made.head_D, bias=jnp.asarray(bias, jnp.float32))
    reward = {"plain": plain, "findings": findings and dataclasses.asdict(findings), "adapters": adapters}
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(
        new_state(made, optax.sgd(0.1)), {"model": dataclasses.asdict(config), "reward": reward}, tokenizer
    )
    checkpoints.close()
    return str(folder)
