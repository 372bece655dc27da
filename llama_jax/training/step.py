"""One training step: gradients of the mean loss over a global batch, and the optimizer's update (paper 2.2)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import Compute, LlamaConfig
from llama_jax.data.packing import Batch
from llama_jax.model import transformer
from llama_jax.model.lora import Adapters, LoraConfig, abstract_adapters, describe_adapters, init_adapters
from llama_jax.model.quantize import Int8, dequantize
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import compiler_options, sharding
from llama_jax.training.loss import LossSums, token_loss

Assemble = Callable[[Any, Any, jax.Array], Any]
"""The model whose loss is wanted, from what is trained, what is frozen, and a key for what is random while training."""


class Objective(NamedTuple):
    """What a step minimises: the mean, over the targets of a global batch, of each one's loss."""

    targets: Callable[[Any], jax.Array]
    """Which places of a batch count, bool."""
    sums: Callable[[Any, Any, jax.Array, Compute], LossSums]
    """Of a model, a part of a batch and the weight of each place of that part: the weighted sums."""


@struct.dataclass
class TrainState:
    """Everything a step reads and writes; with the data cursor, everything that a checkpoint needs."""

    step: jax.Array
    """int32, batches seen."""
    model: Any
    """What is trained, in float32: a Transformer's master weights, or adapters alone."""
    opt_state: optax.OptState
    """The optimizer's moments, laid out as what is trained."""
    skipped: jax.Array
    """int32, steps skipped because loss or gradient was not finite."""
    skipped_in_row: jax.Array
    """int32, the same since the last good step."""


class StepMetrics(NamedTuple):
    """What a step reports: float32 or int32 scalars, extras aside."""

    loss: jax.Array
    """Mean cross-entropy per target, nats; of a reward model the mean ranking loss per pair; of others what they minimise."""
    accuracy: jax.Array
    """Share of targets that were the most likely prediction; of pairs those ranked right."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    targets: jax.Array
    """Targets that counted."""
    skipped: jax.Array
    skipped_in_row: jax.Array
    extras: Any = ()
    """The objective's, (n_micro,) each: of every micro-batch its own, since not all are sums."""


def init_state(config: LlamaConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state with random weights."""
    return new_state(transformer.init(config, key), optimizer)


def declared(config: LlamaConfig, lora: LoraConfig | None) -> LlamaConfig | Adapters:
    """What is trained, a whole model or adapters of one, as `make_optimizer` takes it."""
    return config if lora is None else describe_adapters(config, lora)


def new_state(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 around existing weights or adapters."""
    step, skipped, skipped_in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: a step donates each
    return TrainState(step, model, optimizer.init(model), skipped, skipped_in_row)


def adopt(model: Transformer, optimizer: optax.GradientTransformation, layout: TrainState) -> TrainState:
    """A state at step 0 around existing weights, which are donated."""
    return jax.jit(lambda model: new_state(model, optimizer), out_shardings=layout, donate_argnums=0)(model)


def begin_adapters(
    config: LlamaConfig, lora: LoraConfig, optimizer: optax.GradientTransformation, layout: TrainState, seed: int
) -> TrainState:
    """A state at step 0 around fresh adapters of a model."""
    key = jax.random.key(seed)
    return jax.jit(lambda: new_state(init_adapters(config, lora, key), optimizer), out_shardings=layout)()


def abstract_state(
    config: LlamaConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    lora: LoraConfig | None = None,
    *,
    offload: bool = False,
) -> TrainState:
    """The state of a whole model, or of adapters of one, as shapes, dtypes and shardings, for compiling and restoring
    without memory.
    """
    model = transformer.abstract(config, mesh) if lora is None else abstract_adapters(config, lora, mesh)
    return abstract_new_state(model, optimizer, mesh, offload=offload)


def abstract_new_state(
    model: Any, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """What `new_state` makes of shapes with shardings: moments lie as what they belong to, in the host's memory if they are
    offloaded, counters on every device.
    """

    def everywhere(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(sharding=NamedSharding(mesh, PartitionSpec()))

    shapes = jax.eval_shape(lambda model: new_state(model, optimizer), model)
    moments = optax.tree_map_params(
        optimizer,
        lambda moment, weight: moment.update(
            sharding=weight.sharding.with_memory_kind("pinned_host") if offload else weight.sharding
        ),
        shapes.opt_state,
        model,
        transform_non_params=everywhere,
    )
    counters = {name: everywhere(getattr(shapes, name)) for name in ("step", "skipped", "skipped_in_row")}
    return TrainState(model=model, opt_state=moments, **counters)


def abstract_batch(mesh: Mesh, rows: int, length: int) -> Batch:
    """A batch as shapes, dtypes and shardings."""
    layout = sharding(mesh, "batch", "length")
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=layout)
    return Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=layout))


def batch_loss(
    model: Transformer, batch: Batch, weights_BT: jax.Array, compute: Compute, z_loss: float = 0.0
) -> LossSums:
    """Weighted loss sums of a batch; see `token_loss`."""
    x_BTD = model.hidden(
        batch.tokens_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT, compute=compute
    )
    head_DV = model.output_head()
    if isinstance(head_DV, Int8):  # frozen: widened once, not for every chunk of tokens
        head_DV = dequantize(head_DV)
    return token_loss(x_BTD, head_DV.astype(x_BTD.dtype), batch.targets_BT, weights_BT, compute.loss_chunk, z_loss)


def next_tokens(z_loss: float = 0.0) -> Objective:
    """The cross-entropy of the tokens that a batch's loss mask keeps."""
    return Objective(lambda batch: batch.loss_mask_BT, partial(batch_loss, z_loss=z_loss))


def whole_model(model: Transformer, frozen: None, key: jax.Array) -> Transformer:
    """The model of a step that trains every weight: nothing is frozen, nothing random."""
    return model


def make_train_step(
    optimizer: optax.GradientTransformation,
    compute: Compute,
    *,
    objective: Objective = next_tokens(),  # noqa: B008 (a tuple, so immutable)
    micro_batches: int = 1,
    skip_empty: bool = False,
    layout: TrainState | None = None,
    assemble: Assemble = whole_model,
    seed: int = 0,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Builds the jitted `step(state, batch, frozen=None)`; it donates the state it is given, and reads the frozen part.

    The loss is the mean over every target of the global batch, so neither the number of micro-batches nor the number
    of devices changes it.
    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      optimizer: from `make_optimizer`.
      compute: precision, kernel, rematerialisation.
      objective: what is minimised.
      micro_batches: parts the batch is split into, one after the other, to save memory; must divide the rows each
        device holds.
      skip_empty: compute nothing for a part that has no targets; its extras are zeros.
      layout: shardings of the state on the ambient mesh, those of `abstract_state`; none on a single device.
      assemble: makes the model out of what is trained and what is frozen.
      seed: of what is random in it; every step and micro-batch has a key of its own.
    """

    def mean_gradients(trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[LossSums, Any]:
        targets = objective.targets(batch)
        weights = targets / jnp.maximum(targets.sum(), 1).astype(jnp.float32)

        def loss(trained: Any, part: Any, weights: jax.Array, key: jax.Array) -> tuple[jax.Array, LossSums]:
            sums = objective.sums(assemble(trained, frozen, key), part, weights, compute)
            return sums.loss, sums

        def gradients(part: Any, weights: jax.Array, key: jax.Array) -> tuple[LossSums, Any]:
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(trained, part, weights, key)
            return sums, (grads if layout is None else jax.lax.with_sharding_constraint(grads, layout.model))

        if micro_batches == 1:
            sums, grads = gradients(batch, weights, key)
            return sums._replace(extras=jax.tree.map(lambda extra: extra[None], sums.extras)), grads

        def split(a: jax.Array) -> jax.Array:
            # Row r goes to part r % micro_batches: every part lies on every device, and no row moves.
            return a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1)

        def without_extras(sums: LossSums, grads: Any) -> tuple[LossSums, Any]:
            return sums._replace(extras=()), grads

        def add(total: Any, part: Any) -> tuple[Any, Any]:
            sums, grads = gradients(*part)
            return jax.tree.map(jnp.add, total, without_extras(sums, grads)), sums.extras

        def skip(total: Any, part: Any) -> tuple[Any, Any]:
            return total, no_extras

        def add_or_skip(total: Any, part: Any) -> tuple[Any, Any]:
            return jax.lax.cond(part[1].any(), add, skip, total, part)

        parts = (*jax.tree.map(split, (batch, weights)), jax.random.split(key, micro_batches))
        shapes, shapes_of_grads = jax.eval_shape(gradients, *jax.tree.map(lambda a: a[0], parts))
        no_extras = jax.tree.map(jnp.zeros_like, shapes.extras)
        zeros = jax.tree.map(jnp.zeros_like, without_extras(shapes, shapes_of_grads))
        (sums, grads), extras = jax.lax.scan(add_or_skip if skip_empty else add, zeros, parts)
        return sums._replace(extras=extras), grads

    def step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        sums, grads = mean_gradients(state.model, frozen, batch, key)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        old_opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device) if compute.offload else state.opt_state
        updates, opt_state = optimizer.update(grads, old_opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        model, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (model, opt_state), (state.model, old_opt_state)
        )
        state = TrainState(
            state.step + 1,
            model,
            opt_state,
            state.skipped + ~good,
            jnp.where(good, 0, state.skipped_in_row + 1),
        )
        targets = objective.targets(batch).sum()
        counters = state.skipped, state.skipped_in_row
        return state, StepMetrics(sums.nats, sums.correct, grad_norm, targets, *counters, sums.extras)

    if layout is None:
        return jax.jit(step, donate_argnums=0)
    options = compiler_options(jax.tree.leaves(layout)[0].mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None), compiler_options=options)
