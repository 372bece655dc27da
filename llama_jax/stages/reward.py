"""Reward models (paper 3.2.2): a chat model learns which of two answers people prefer, and by how much.

The paper's settings are the defaults: one epoch, 512 pairs a batch, 1e-5 (5e-6 for 70B) after a warm-up of 3% of the steps
and at least 5, a cosine to a tenth. Helpfulness and safety are two models, of two mixes of data (`data.weights`).
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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from optax import GradientTransformation

from llama_jax.config import LlamaConfig
from llama_jax.conversion.convert import open_pinned
from llama_jax.conversion.load import load_model
from llama_jax.data.pair_statistics import described, pairs_as_json, pairs_as_text
from llama_jax.data.pairs import (
    UNKNOWN,
    BatchCursor,
    BatchShape,
    LoadedPairs,
    PairBatch,
    PairOrder,
    PreferenceConfig,
    evenly_spaced,
    load_pairs,
    pair_batches,
)
from llama_jax.errors import UserError
from llama_jax.generation.rewards import warnings_of
from llama_jax.model.heads import RewardModel, describe_reward_model, trunk_config, with_scalar_head, without_head
from llama_jax.model.lora import adapt, describe_adapters, init_adapters
from llama_jax.model.transformer import abstract
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import check_divides, make_mesh, mesh_sizes, sharding
from llama_jax.text.chat import Llama2Chat, Plain, Template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training import compiled as compiling
from llama_jax.training import step as steps
from llama_jax.training.batches import abstract_pairs, shape_of_pairs, share_of_process
from llama_jax.training.checkpoint import Checkpoints, adapters_metadata
from llama_jax.training.held_out_pairs import Findings, PairScorer, write_scores
from llama_jax.training.loop import fit
from llama_jax.training.metrics import say
from llama_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, warmed_up
from llama_jax.training.preference_loss import SMALL_MARGINS, preferences_objective
from llama_jax.training.run_config import HOW_IT_COMPUTES, TuningConfig, check_counts, length_within, run_dataclass
from llama_jax.training.run_folder import fingerprint, open_run, run_checkpoints, without, write_whole
from llama_jax.training.step import TrainState

FINDINGS = "findings.json"


@run_dataclass
class RewardConfig(TuningConfig):
    """One reward model."""

    checkpoint: str = ""
    """The chat model to begin with, of any form."""
    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The preferences."""
    # Our choice of the paper's three, whose accuracies it gives as 62.5, 63.0 and 62.9; it does not say which it kept.
    margins: tuple[float, float, float, float] = SMALL_MARGINS
    """What the better answer's score should be ahead by, from significantly to negligibly better; 0 for unknown strength."""
    safety_weight: float = 0.0
    """Weight of the auxiliary loss on safety labels, beside the ranking loss; for the safety model."""
    epochs: int = 1
    """Passes over the pairs; more made the paper's models overfit."""
    pairs: int = 512
    """Pairs in a global batch."""
    length: int = 0
    """Most tokens of a dialogue; 0: the model's context."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(peak_lr=1e-5, warmup_steps=0))
    """AdamW and its schedule; a warm-up of 0 means the paper's 3% of the steps, at least 5."""
    train: Literal["all", "lora"] = "all"
    """What is trained beside the head: every weight, or low-rank adapters beside frozen ones."""
    seed: int = 0
    """Of the head, adapters, dropout and the order of the pairs."""
    out: str = "runs/reward"
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

    config: RewardConfig
    checkpoint: Path
    model: LlamaConfig
    """The transformer's, without a next-token head."""
    tokenizer: Tokenizer
    loaded: LoadedPairs
    order: PairOrder
    shape: BatchShape
    total_steps: int
    mesh: Mesh
    schedule: OptimizerConfig
    optimizer: GradientTransformation


def run(config: RewardConfig) -> None:
    """Trains what `config` describes into `config.out`, going on where an earlier run of it stopped, and scores the
    held-out pairs and the test sets with the result.

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
                "pairs": fingerprint(pairs.ids, pairs.starts, pairs.strength, pairs.safe, np.array(pairs.sizes)),
            }
            open_run(folder, "reward", config, decisive, prepared.tokenizer, checkpoints, config.resume)
            model = train(prepared, checkpoints, decisive)
        reasons = write_findings(prepared, model)
    for reason in reasons:
        say(f"warning: not to be used for PPO: {reason}")
    say(f"done: {folder}")


def prepare(config: RewardConfig, mesh: Mesh) -> Run:
    """Opens the checkpoint without reading its weights, and reads and encodes the data.

    Raises:
      UserError: they do not fit each other, the recipe or the devices.
    """
    if not config.checkpoint:
        raise UserError("name the model to begin with: llama-jax reward CHECKPOINT --data PAIRS.jsonl")
    check_counts(config, "epochs", "pairs", "micro_batches")
    if not all(math.isfinite(value) and value >= 0 for value in (*config.margins, config.safety_weight)):
        raise UserError(f"--margins {config.margins} and --safety-weight {config.safety_weight} must be 0 or more")
    checkpoint, whole, tokenizer = open_pinned(config.checkpoint)
    most = length_within(config.length, whole)
    template: Template = Plain() if config.plain else Llama2Chat()
    loaded = load_pairs(config.data, tokenizer, template, most)
    if config.safety_weight and (loaded.train.safe == UNKNOWN).all():
        raise UserError("--safety-weight is for pairs with safety labels (`safety`), and none here has one")
    order = PairOrder(loaded.train, config.pairs, config.seed, config.data.weights)
    shape = shape_of_pairs(order, loaded.longest, config.epochs, config.micro_batches)
    check_divides(mesh_sizes(mesh), whole, shape.rows // config.micro_batches, shape.length)
    total_steps = config.epochs * order.batches
    schedule = warmed_up(config.optimizer, total_steps)
    model = trunk_config(whole)
    optimizer = make_optimizer(schedule, declared(config, model), total_steps)
    return Run(config, checkpoint, model, tokenizer, loaded, order, shape, total_steps, mesh, schedule, optimizer)


def train(prepared: Run, checkpoints: Checkpoints, decisive: dict[str, Any]) -> RewardModel:
    """Feeds the batches behind the newest checkpoint's cursor to the loop, on the ambient mesh; gives the trained model."""
    config, mesh, shape, held_out = prepared.config, prepared.mesh, prepared.shape, prepared.loaded.held_out
    compiled, plan = compile_step(prepared)
    say(banner(prepared, plan))
    state, frozen, cursor = begin(prepared, checkpoints)
    scorer, numbers = make_scorer(prepared), evenly_spaced(len(held_out), config.data.eval_pairs)
    newest: Findings | None = None

    def evaluate(state: TrainState) -> dict[str, float]:
        nonlocal newest
        if not len(numbers):
            return {}
        newest, scores = scorer.findings(assemble(config, state.model, frozen), held_out, numbers)
        named = dataclasses.asdict(newest) | {"score": scores.mean(), "margin": -np.diff(scores, axis=1).mean()}
        return {
            f"eval/{name}": float(value) for name, value in named.items() if name != "pairs" and math.isfinite(value)
        }

    def save(state: TrainState, cursor: BatchCursor) -> None:
        reward = {
            "plain": config.plain,
            "findings": newest and dataclasses.asdict(newest),
            "adapters": config.adapters and adapters_metadata(config.adapters, prepared.checkpoint),
        }
        own = {"model": dataclasses.asdict(prepared.model), "reward": reward, "recipe": decisive}
        checkpoints.save(state, own | {"cursor": cursor._asdict()}, prepared.tokenizer)

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
    return assemble(config, state.model, frozen)


def begin(prepared: Run, checkpoints: Checkpoints) -> tuple[TrainState, Any, BatchCursor]:
    """The state to train from, what stays frozen beside it, and the place in the data."""
    config, mesh, optimizer = prepared.config, prepared.mesh, prepared.optimizer
    abstract_state = describe_state(config, prepared.model, optimizer, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    frozen = without_head(load_model(prepared.checkpoint, mesh, config.compute.dtype)[0]) if config.adapters else None
    if restored := checkpoints.restore_newest(abstract_state):
        state, metadata = restored
        say(f"resumed at step {int(state.step)} from {checkpoints.folder}")
        return state, frozen, BatchCursor(**metadata["cursor"])
    key = jax.random.key(config.seed)

    def fresh(trunk: Any) -> TrainState:
        return steps.new_state(with_scalar_head(trunk, prepared.model, key), optimizer)

    if config.adapters:
        make = jax.jit(lambda: fresh(init_adapters(prepared.model, config.adapters, key)), out_shardings=layout)
        return make(), frozen, BatchCursor()
    trunk = without_head(load_model(prepared.checkpoint, mesh, "float32")[0])
    return jax.jit(fresh, out_shardings=layout, donate_argnums=0)(trunk), None, BatchCursor()


def assemble(config: RewardConfig, trained: RewardModel, frozen: Any, key: jax.Array | None = None) -> RewardModel:
    """The whole model: what is trained, with adapters put into what is frozen; with a key, their dropout is on."""
    if config.adapters is None:
        return trained
    return dataclasses.replace(trained, trunk=adapt(frozen, trained.trunk, config.adapters, key))


def declared(config: RewardConfig, model: LlamaConfig) -> RewardModel:
    """What is trained, as a tree of declarations."""
    whole = describe_reward_model(model)
    return dataclasses.replace(whole, trunk=describe_adapters(model, config.adapters)) if config.adapters else whole


def describe_state(
    config: RewardConfig, model: LlamaConfig, optimizer: GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state as shapes, dtypes and shardings."""
    trained = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=sharding(mesh, *p.axes)), declared(config, model)
    )
    return steps.abstract_new_state(trained, optimizer, mesh, offload=config.compute.offload)


def make_scorer(prepared: Run) -> PairScorer:
    """Scores held-out pairs, a micro-batch at a time."""
    config, shape = prepared.config, prepared.shape
    return PairScorer(prepared.mesh, config.compute, shape.rows // config.micro_batches, shape.length)


def describe_step(
    config: RewardConfig, model: LlamaConfig, shape: BatchShape, optimizer: GradientTransformation, mesh: Mesh
) -> tuple[Callable, tuple[TrainState, PairBatch, Any]]:
    """The training step for a transformer without a next-token head and batches of a shape, and the state, batch and frozen
    weights that it takes as shapes, dtypes and shardings.
    """
    state = describe_state(config, model, optimizer, mesh)
    frozen = abstract(model, mesh, config.compute.dtype) if config.adapters else None
    train_step = steps.make_train_step(
        optimizer,
        config.compute,
        objective=preferences_objective(config.margins, config.safety_weight),
        micro_batches=config.micro_batches,
        layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        assemble=partial(assemble, config),
        seed=config.seed,
    )
    return train_step, (state, abstract_pairs(mesh, shape), frozen)


def compile_step(prepared: Run) -> tuple[Callable, dict[str, Any]]:
    """Compiles the training step without any array; gives `step(state, batch, frozen)` and what it will take."""
    model, mesh = prepared.model, prepared.mesh
    train_step, arguments = describe_step(prepared.config, model, prepared.shape, prepared.optimizer, mesh)
    return compiling.compile_step(train_step, mesh, model.n_params, *arguments)


def write_findings(prepared: Run, model: RewardModel) -> list[str]:
    """Scores every held-out pair and every test set, writes the scores and what is known of the data into the run's
    folder, and gives the reasons not to use the model, if any.
    """
    folder, loaded, scorer = Path(prepared.config.out), prepared.loaded, make_scorer(prepared)
    findings, scores = None, np.zeros((0, 2), np.float32)
    if len(loaded.held_out):
        findings, scores = scorer.findings(model, loaded.held_out, np.arange(len(loaded.held_out)))
    tested = scorer.scores(model, loaded.tests, np.arange(len(loaded.tests)))
    known = {
        "findings": findings and dataclasses.asdict(findings),
        "warnings": warnings_of(findings),
        "data": described(loaded),
    }
    write_scores(folder, loaded, scores, tested)
    if jax.process_index() == 0:
        write_whole(folder / FINDINGS, json.dumps(known, indent=2).encode())
    return known["warnings"]


def banner(prepared: Run, plan: dict[str, Any]) -> str:
    """The plan for people."""
    config, known = prepared.config, compiling.describe_plan(plan)
    shape, drawn, held_out = prepared.shape, sum(prepared.order.drawn), len(prepared.loaded.held_out)
    return "\n".join(
        [
            f"devices     {known['devices']}",
            f"model       {prepared.model.n_params:,} parameters from {config.checkpoint}, under a scalar head; trained: "
            + (f"adapters of rank {config.adapters.rank}" if config.adapters else "every weight"),
            f"data        {', '.join(config.data.sources)}: {drawn:,} pairs an epoch, {held_out:,} held out",
            f"steps       {prepared.total_steps:,}: {config.epochs} epochs in batches of {config.pairs} pairs, in "
            f"{shape.rows} rows of {shape.length} tokens; warm-up {prepared.schedule.warmup_steps}",
            f"loss        margins {', '.join(f'{margin:.3g}' for margin in config.margins)}; weight of safety labels "
            f"{config.safety_weight:g}",
            f"memory      {known['memory']}",
            f"run folder  {config.out}",
        ]
    )


def show(prepared: Run, plan: dict[str, Any]) -> None:
    """Prints a dry run: the plan, the statistics of each source, and a pair with its judged answers between arrows."""
    if prepared.config.json:
        own = {"recipe": dataclasses.asdict(prepared.config), "steps": prepared.total_steps}
        print(json.dumps(own | pairs_as_json(prepared.loaded, prepared.tokenizer) | plan, indent=2))
    else:
        print(f"{banner(prepared, plan)}\n{pairs_as_text(prepared.loaded, prepared.tokenizer)}")
