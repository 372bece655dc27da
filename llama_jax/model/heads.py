"""Reward models (paper 3.2.2): the transformer with a scalar in the place of its next-token head.

"All other architectural choices and hyper-parameters are those of the pretrained models." The scalar is computed in
float32 from the last real token's hidden state, the id that ends the answer; masks, not ids, say which tokens are real.
"""

import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import Compute, LlamaConfig
from llama_jax.model.low_rank import Lora
from llama_jax.model.nf4 import Nf4
from llama_jax.model.quantize import Int8
from llama_jax.model.transformer import Param, Transformer, describe
from llama_jax.parallel.mesh import sharding


@partial(jax.tree_util.register_dataclass, data_fields=["trunk", "head_D", "bias"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class RewardModel:
    """A transformer and a scalar head, as an immutable pytree."""

    trunk: Any
    """A Transformer without a next-token head; while adapters are trained, the adapters of one."""
    head_D: Any
    """float32."""
    bias: Any
    """float32 scalar. No comparison depends on it; it is what sets a score's zero, and so a probability's half."""

    def read(self, x_D: jax.Array) -> jax.Array:
        """The scalars of final hidden states, whatever their leading axes: float32."""
        # A sum of products: as a matmul it would be rounded to bfloat16 on a TPU.
        return jnp.sum(x_D.astype(jnp.float32) * self.head_D.astype(jnp.float32), -1) + self.bias.astype(jnp.float32)


def score(
    model: RewardModel,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    last_BK: jax.Array,
    compute: Compute = Compute(),
) -> jax.Array:
    """Scores of the sequences that stand in rows.

    Args:
      model: the reward model.
      tokens_BT: int32 ids; sequences may stand one behind another, with padding before, between and after them.
      segment_ids_BT: int32; 0 for padding, another number for each sequence of a row.
      last_BK: int32, the place of each sequence's last token.
      compute: precision and kernel.

    Returns:
      scores_BK, float32; they depend on nothing but the sequences.
    """
    x_BTD = model.trunk.hidden(
        tokens_BT, positions_BT=positions(segment_ids_BT), segment_ids_BT=segment_ids_BT, compute=compute
    )
    # Taken, not selected by a product: what is not finite elsewhere stays there.
    return model.read(jnp.take_along_axis(x_BTD, last_BK[:, :, None], axis=1))


def positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Places counted from 0 at each segment's first token, int32 (B, T), wherever in a row that stands."""
    place_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    begins_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
    return place_BT - jax.lax.cummax(jnp.where(begins_BT, place_BT, 0), axis=1)


def trunk_config(config: LlamaConfig) -> LlamaConfig:
    """The architecture without a head of its own for next tokens: a tied one, whose embedding stands in for it."""
    return replace(config, tie_embeddings=True)


def describe_reward_model(config: LlamaConfig) -> RewardModel:
    """The model as a tree of `Param` declarations: what shapes, shardings and initial values are made from.

    Our choice: the head begins with variance 1 / (D + 1), as in OpenAI's work from human preferences, and without a bias.
    """
    return RewardModel(
        describe(trunk_config(config)), Param((config.dim,), ("embed",), (config.dim + 1) ** -0.5), Param((), (), 0.0)
    )


def abstract_reward_model(config: LlamaConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> RewardModel:
    """The model as shapes and dtypes alone, with shardings if a mesh is given."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=None if mesh is None else sharding(mesh, *p.axes)),
        describe_reward_model(config),
    )


def without_head(model: Transformer) -> Transformer:
    """A model's weights without its next-token head; the same arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda w: isinstance(w, Int8 | Nf4 | Lora))
    weights = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: weights[jax.tree_util.keystr(path)], describe(trunk_config(model.config))
    )


def with_scalar_head(trunk: Any, config: LlamaConfig, key: jax.Array) -> RewardModel:
    """A fresh scalar head in float32 over a transformer without its own, or over adapters of one."""
    declared = describe_reward_model(config).head_D
    own_key = jax.random.fold_in(key, zlib.crc32(b"head_D"))
    head_D = declared.std * jax.random.normal(own_key, declared.shape, jnp.float32)
    return RewardModel(trunk, head_D, jnp.zeros((), jnp.float32))


def standardised(model: RewardModel, mean: jax.Array | float, std: jax.Array | float) -> RewardModel:
    """The model whose scores are those of `model` less `mean`, in units of `std`: given the mean and the deviation of
    reference samples, theirs are 0 and 1.
    """
    return replace(model, head_D=model.head_D / std, bias=(model.bias - mean) / std)
