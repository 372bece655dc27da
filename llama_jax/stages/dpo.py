"""Direct preference optimisation (Rafailov et al. 2023): from preferences to a better model, without reward model or sampling.

Not in the paper: the simple alternative to its reward models and PPO, from the same pairs. The defaults are those of the
authors: batches of 64 pairs, beta 0.1, a constant 1e-6 after a warm-up. Our choice: AdamW as elsewhere, where they took
RMSprop, and a warm-up of 3% of the steps instead of 150 steps.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from optax import GradientTransformation

from llama_jax.config import LlamaConfig
from llama_jax.conversion.convert import open_pinned
from llama_jax.conversion.load import load_model
from llama_jax.data.pair_statistics import pairs_as_json, pairs_as_text
from llama_jax.data.pairs import (
    BatchCursor,
    BatchShape,
    LoadedPairs,
    PairBatch,
    PairOrder,
    Pairs,
    PreferenceConfig,
    evenly_spaced,
    load_pairs,
    pack_pairs,
    pair_batches,
)
from llama_jax.errors import UserError
from llama_jax.model.lora import adapt
from llama_jax.model.transformer import Transformer, abstract
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import check_divides, constrain, make_mesh, mesh_sizes
from llama_jax.text.chat import Llama2Chat, Plain, Template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training import compiled as compiling
from llama_jax.training import step as steps
from llama_jax.training.batches import abstract_pairs, shape_of_pairs, share_of_process
from llama_jax.training.checkpoint import Checkpoints, adapters_metadata
from llama_jax.training.dpo_loss import Policies, dpo_objective, drifts, pair_terms
from llama_jax.training.held_out_pairs import of_each_pair, write_scores
from llama_jax.training.loop import fit
from llama_jax.training.metrics import improvement, say
from llama_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, warmed_up
from llama_jax.training.run_config import HOW_IT_COMPUTES, TuningConfig, check_counts, length_within, run_dataclass
from llama_jax.training.run_folder import fingerprint, open_run, run_checkpoints, without
from llama_jax.training.step import TrainState


@run_dataclass
class DPOConfig(TuningConfig):
    """One run of direct preference optimisation."""

    checkpoint: str = ""
    """The chat model to begin with, of any form; as it is, it is the reference too."""
    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The preferences."""
    beta: float = 0.1
    """What a nat of drift from the reference is worth: the greater, the nearer to the reference the model stays."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round, below a half."""
    epochs: int = 1
    """Passes over the pairs."""
    pairs: int = 64
    """Pairs in a global batch."""
    length: int = 0
    """Most tokens of a dialogue; 0: the model's context."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(peak_lr=1e-6, warmup_steps=0, final_lr_ratio=1.0, weight_decay=0.0)
    )
    """AdamW and its schedule; a warm-up of 0 means 3% of the steps, at least 5. Adapters want about ten times the rate."""
    train: Literal["all", "lora"] = "all"
    """What is trained: every weight, or low-rank adapters beside frozen ones, which are then the reference as well."""
    seed: int = 0
    """Of adapters, dropout and the order of the pairs."""
    out: str = "runs/dpo"
    """The run's folder."""
    dry_run: bool = False
    """Print a pair, the statistics of the data, the mesh and the memory, and touch nothing."""


# What may differ between a run and its continuation. The model, the tokenizer and the pairs are compared by what they turned
# out to be, not by the names under which they were found.
FREE_TO_CHANGE = (
    *HOW_IT_COMPUTES,
    *("loop", "micro_batches", "length", "checkpoint"),
    *("data.sources", "data.tests", "data.eval_pairs", "mesh", "out", "resume", "dry_run", "json"),
)


@dataclass(frozen=True)
class Run:
    """A configuration with what its checkpoint and its data turned out to be."""

    config: DPOConfig
    checkpoint: Path
    model: LlamaConfig
    tokenizer: Tokenizer
    loaded: LoadedPairs
    order: PairOrder
    shape: BatchShape
    total_steps: int
    mesh: Mesh
    schedule: OptimizerConfig
    optimizer: GradientTransformation


def run(config: DPOConfig) -> None:
    """Trains what `config` describes into `config.out`, going on where an earlier run of it stopped, and leaves the rewards
    of all held-out pairs and test sets there.

    Raises:
      UserError: checkpoint, data, devices or the run found in the folder do not fit the recipe.
      Diverged: loss or gradient was not finite three times in a row.
      Preempted: told to stop, and saved.
    """
    distributed.initialize(config.loop.lost_after, config.loop.hang_after)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        prepared = prepare(config, mesh)
        say(str(prepared.loaded))
        if config.dry_run:
            show(prepared, compile_step(prepared)[1])
            return
        folder = Path(config.out)
        with run_checkpoints(config) as checkpoints:
            pairs = prepared.loaded.train
            decisive = without(config, FREE_TO_CHANGE) | {
                "checkpoint": str(prepared.checkpoint),
                "tokenizer": prepared.tokenizer.sha256,
                "pairs": fingerprint(pairs.ids, pairs.starts, pairs.answers, np.array(pairs.sizes)),
            }
            open_run(folder, "dpo", config, decisive, prepared.tokenizer, checkpoints, config.resume)
            train(prepared, checkpoints, decisive)
    change = improvement(folder, "eval/accuracy", "accuracy of its rewards on held-out pairs")
    say(f"done: {folder}{change}; try: llama-jax chat {folder}{' --plain' if config.plain else ''}")


def prepare(config: DPOConfig, mesh: Mesh) -> Run:
    """Opens the checkpoint without reading its weights, and reads and encodes the data.

    Raises:
      UserError: they do not fit each other, the recipe or the devices.
    """
    check(config)
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    most = length_within(config.length, model)
    template: Template = Plain() if config.plain else Llama2Chat()
    loaded = load_pairs(config.data, tokenizer, template, most)
    order = PairOrder(loaded.train, config.pairs, config.seed, config.data.weights)
    shape = shape_of_pairs(order, loaded.longest, config.epochs, config.micro_batches)
    check_divides(mesh_sizes(mesh), model, shape.rows // config.micro_batches, shape.length)
    total_steps = config.epochs * order.batches
    schedule = warmed_up(config.optimizer, total_steps)
    optimizer = make_optimizer(schedule, steps.declared(model, config.adapters), total_steps)
    return Run(config, checkpoint, model, tokenizer, loaded, order, shape, total_steps, mesh, schedule, optimizer)


def check(config: DPOConfig) -> None:
    """Checks what needs neither model nor data. Raises UserError."""
    if not config.checkpoint:
        raise UserError("name the model to begin with: llama-jax dpo CHECKPOINT --data PAIRS.jsonl")
    check_counts(config, "epochs", "pairs", "micro_batches")
    if not (math.isfinite(config.beta) and config.beta > 0):
        raise UserError(f"--beta {config.beta} must be above 0, and 0.1 is common")
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(
            f"--label-smoothing {config.label_smoothing} must be from 0 to below 0.5, where labels say nothing"
        )


def train(prepared: Run, checkpoints: Checkpoints, decisive: dict[str, Any]) -> None:
    """Feeds the batches behind the newest checkpoint's cursor to the loop, on the ambient mesh, and writes the rewards of the
    pairs that were kept back.
    """
    config, mesh, shape, loaded = prepared.config, prepared.mesh, prepared.shape, prepared.loaded
    compiled, plan = compile_step(prepared)
    say(banner(prepared, plan))
    state, frozen, cursor = begin(prepared, checkpoints)
    drifts_of, few = make_drifts(prepared), evenly_spaced(len(loaded.held_out), config.data.eval_pairs)

    def evaluate(state: TrainState) -> dict[str, float]:
        if not len(few):
            return {}
        drift_n2 = drifts_of(assemble(config, state.model, frozen), loaded.held_out, few)
        terms = pair_terms(drift_n2, config.beta, config.label_smoothing)
        return {f"eval/{name}": float(np.mean(values)) for name, values in terms.items()}

    def save(state: TrainState, cursor: BatchCursor) -> None:
        own = {"recipe": decisive, "cursor": cursor._asdict()}
        if config.adapters:
            adapters = adapters_metadata(config.adapters, prepared.checkpoint)
            own |= {"model": dataclasses.asdict(prepared.model), "adapters": adapters}
        checkpoints.save(state, own, prepared.tokenizer)

    state = fit(
        state,
        lambda state, batch: compiled(state, batch, frozen),
        pair_batches(prepared.order, shape, cursor=cursor, **share_of_process(mesh, shape.rows)),
        model=prepared.model,
        mesh=mesh,
        rows=shape.rows,
        length=shape.length,
        total_steps=prepared.total_steps,
        loop=config.loop,
        schedule=learning_rate(prepared.schedule, prepared.total_steps),
        folder=Path(config.out),
        save=save,
        evaluate=evaluate,
        evaluate_first=True,
    )
    policies = assemble(config, state.model, frozen)
    rewards = (config.beta * drifts_of(policies, pairs, np.arange(len(pairs))) for pairs in loaded[1:3])
    write_scores(Path(config.out), loaded, *rewards)


def begin(prepared: Run, checkpoints: Checkpoints) -> tuple[TrainState, Transformer, BatchCursor]:
    """The state to train from, the frozen reference beside it, and the place in the data."""
    config, mesh, optimizer = prepared.config, prepared.mesh, prepared.optimizer
    abstract_state = steps.abstract_state(
        prepared.model, optimizer, mesh, config.adapters, offload=config.compute.offload
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    frozen = load_model(prepared.checkpoint, mesh, config.compute.dtype)[0]
    if restored := checkpoints.restore_newest(abstract_state):
        state, metadata = restored
        say(f"resumed at step {int(state.step)} from {checkpoints.folder}")
        return state, frozen, BatchCursor(**metadata["cursor"])
    if config.adapters:
        state = steps.begin_adapters(prepared.model, config.adapters, optimizer, layout, config.seed)
        return state, frozen, BatchCursor()
    model = load_model(prepared.checkpoint, mesh, "float32")[0]
    return steps.adopt(model, optimizer, layout), frozen, BatchCursor()


def assemble(config: DPOConfig, trained: Any, frozen: Transformer, key: jax.Array | None = None) -> Policies:
    """The policy, which is what is trained or the frozen model with adapters, beside the reference; with a key, the dropout
    of the policy's adapters is on.
    """
    return Policies(adapt(frozen, trained, config.adapters, key) if config.adapters else trained, frozen)


def make_drifts(prepared: Run) -> Callable[[Policies, Pairs, np.ndarray], np.ndarray]:
    """Builds a function from models, pairs and the numbers of some to their `drifts`, float32 (n, 2), nats; made a
    micro-batch at a time.
    """
    config, mesh, length = prepared.config, prepared.mesh, prepared.shape.length
    rows = prepared.shape.rows // config.micro_batches

    @jax.jit
    def on_every_device(policies: Policies, batch: PairBatch) -> jax.Array:
        return constrain(drifts(policies, batch, config.compute), None, None, None)

    def drifts_of(policies: Policies, pairs: Pairs, numbers: np.ndarray) -> np.ndarray:
        packed = pack_pairs(pairs, numbers, length)
        shape = BatchShape(rows, length, max(map(len, packed), default=0))
        return of_each_pair(partial(on_every_device, policies), mesh, pairs, packed, shape)[numbers]

    return drifts_of


def describe_step(
    config: DPOConfig, model: LlamaConfig, shape: BatchShape, optimizer: GradientTransformation, mesh: Mesh
) -> tuple[Callable, tuple[TrainState, PairBatch, Transformer]]:
    """The training step for batches of a shape, and the state, batch and reference that it takes as shapes, dtypes and
    shardings.
    """
    state = steps.abstract_state(model, optimizer, mesh, config.adapters, offload=config.compute.offload)
    train_step = steps.make_train_step(
        optimizer,
        config.compute,
        objective=dpo_objective(config.beta, config.label_smoothing),
        micro_batches=config.micro_batches,
        layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        assemble=partial(assemble, config),
        seed=config.seed,
    )
    return train_step, (state, abstract_pairs(mesh, shape), abstract(model, mesh, config.compute.dtype))


def compile_step(prepared: Run) -> tuple[Callable, dict[str, Any]]:
    """Compiles the training step without any array; gives `step(state, batch, frozen)` and what it will take."""
    model, mesh = prepared.model, prepared.mesh
    train_step, arguments = describe_step(prepared.config, model, prepared.shape, prepared.optimizer, mesh)
    return compiling.compile_step(train_step, mesh, model.n_params, *arguments)


def banner(prepared: Run, plan: dict[str, Any]) -> str:
    """The plan for people."""
    config, known = prepared.config, compiling.describe_plan(plan)
    shape, drawn, held_out = prepared.shape, sum(prepared.order.drawn), len(prepared.loaded.held_out)
    trained = "every weight, beside a frozen copy as reference"
    if config.adapters:
        trained = f"adapters of rank {config.adapters.rank} beside frozen weights, which are the reference"
    return "\n".join(
        [
            f"devices     {known['devices']}",
            f"model       {prepared.model.n_params:,} parameters from {config.checkpoint}; trained: {trained}",
            f"data        {', '.join(config.data.sources)}: {drawn:,} pairs an epoch, {held_out:,} held out",
            f"steps       {prepared.total_steps:,}: {config.epochs} epochs in batches of {config.pairs} pairs, in "
            f"{shape.rows} rows of {shape.length} tokens; warm-up {prepared.schedule.warmup_steps}",
            f"loss        beta {config.beta:g}, label smoothing {config.label_smoothing:g}",
            f"memory      {known['memory']}",
            f"run folder  {config.out}",
        ]
    )


def show(prepared: Run, plan: dict[str, Any]) -> None:
    """Prints a dry run: the plan, the statistics of each source, and a pair with its answers between arrows."""
    if prepared.config.json:
        own = {"recipe": dataclasses.asdict(prepared.config), "steps": prepared.total_steps}
        print(json.dumps(own | pairs_as_json(prepared.loaded, prepared.tokenizer) | plan, indent=2))
    else:
        print(f"{banner(prepared, plan)}\n{pairs_as_text(prepared.loaded, prepared.tokenizer)}")
