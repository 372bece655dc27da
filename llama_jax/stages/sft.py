"""Supervised fine-tuning (paper 3.1): next-token prediction on dialogues, with the loss on the answers alone.

The paper's settings are the defaults: two epochs, batches of 64 rows of 4096 tokens, a cosine from 2e-5, weight decay
0.1. With `train="lora"` every weight is frozen and low-rank adapters beside them are trained instead (not in the paper).
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from optax import GradientTransformation

from llama_jax.config import LlamaConfig
from llama_jax.conversion.convert import open_pinned
from llama_jax.conversion.load import load_model
from llama_jax.data.examples import (
    DialogueConfig,
    Examples,
    Loaded,
    Packing,
    RowCursor,
    answer_batches,
    held_out_answer_batches,
    load_examples,
)
from llama_jax.data.packing import Batch
from llama_jax.errors import UserError
from llama_jax.model.lora import adapt
from llama_jax.model.nf4 import nf4_abstract
from llama_jax.model.quantize import quantize_abstract
from llama_jax.model.transformer import Transformer, abstract
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import check_divides, make_mesh, mesh_sizes
from llama_jax.text.chat import Encoded, Llama2Chat, Plain, Template, shown
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training import compiled as compiling
from llama_jax.training import step as steps
from llama_jax.training.batches import share_of_process
from llama_jax.training.checkpoint import Checkpoints, adapters_metadata
from llama_jax.training.held_out import make_score
from llama_jax.training.loop import fit
from llama_jax.training.metrics import improvement, say
from llama_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from llama_jax.training.run_config import (
    HOW_IT_COMPUTES,
    TuningConfig,
    check_bits,
    check_counts,
    length_within,
    run_dataclass,
)
from llama_jax.training.run_folder import fingerprint, open_run, run_checkpoints, without
from llama_jax.training.step import TrainState

PAPER_PEAK_LR = 2e-5


@run_dataclass
class SFTConfig(TuningConfig):
    """One fine-tuning run."""

    data: DialogueConfig = field(default_factory=DialogueConfig)
    """The dialogues."""
    epochs: int = 2
    """Passes over the dialogues."""
    rows: int = 64
    """Rows of packed dialogues in a global batch."""
    length: int = 0
    """Tokens in a row; 0: the model's context."""
    # Our choice: no warm-up and a tenth of the peak at the end; the paper says neither.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(peak_lr=PAPER_PEAK_LR, warmup_steps=0))
    """AdamW and its schedule; 1e-4 to 2e-4 is common for adapters."""
    int8: bool = False
    """Keep the frozen weights in 8 bits."""
    nf4: bool = False
    """Keep the frozen weights in 4 bits, as QLoRA does."""
    seed: int = 0
    """Of adapters, dropout and the order of the dialogues."""
    out: str = "runs/sft"
    """The run's folder."""
    dry_run: bool = False
    """Print three examples with the trained tokens marked, the mesh and the memory, and touch nothing."""


# What may differ between a run and its continuation. The model, the tokenizer and the dialogues are compared by what they
# turned out to be, not by the names under which they were found.
FREE_TO_CHANGE = (
    *HOW_IT_COMPUTES,
    *("loop", "micro_batches"),
    *("checkpoint", "data.sources", "data.eval_dialogues", "mesh", "out", "resume", "dry_run", "json"),
)


@dataclass(frozen=True)
class Run:
    """A configuration with what its checkpoint and its data turned out to be."""

    config: SFTConfig
    checkpoint: Path
    model: LlamaConfig
    tokenizer: Tokenizer
    loaded: Loaded
    packing: Packing
    total_steps: int
    mesh: Mesh
    optimizer: GradientTransformation


def run(config: SFTConfig) -> None:
    """Fine-tunes what `config` describes into `config.out`, going on where an earlier run of it stopped.

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
        if config.data.held_out and not len(prepared.loaded.held_out):
            say("so few dialogues leave none to measure the loss on; --data.held-out 0.1 keeps a tenth of them back")
        if config.adapters and config.optimizer.peak_lr <= PAPER_PEAK_LR:
            say(
                f"--optimizer.peak-lr {config.optimizer.peak_lr:g} is little for adapters, which begin at nothing; "
                "1e-4 to 2e-4 is common"
            )
        if config.dry_run:
            show(prepared, compile_step(prepared)[1])
            return
        folder = Path(config.out)
        with run_checkpoints(config) as checkpoints:
            examples = prepared.loaded.train
            decisive = without(config, FREE_TO_CHANGE) | {
                "checkpoint": str(prepared.checkpoint),
                "tokenizer": prepared.tokenizer.sha256,
                "dialogues": fingerprint(examples.ids, examples.answer_mask, examples.starts),
            }
            open_run(folder, "sft", config, decisive, prepared.tokenizer, checkpoints, config.resume)
            metadata = {"recipe": decisive}
            if config.adapters:
                adapters = adapters_metadata(config.adapters, prepared.checkpoint)
                metadata |= {"model": dataclasses.asdict(prepared.model), "adapters": adapters}

            def save(state: TrainState, cursor: RowCursor) -> None:
                checkpoints.save(state, metadata | {"cursor": cursor._asdict()}, prepared.tokenizer)

            train(prepared, checkpoints, save)
    change = improvement(folder, "eval/loss", "held-out loss")
    say(f"done: {folder}{change}; try: llama-jax chat {folder}{' --plain' if config.plain else ''}")


def prepare(config: SFTConfig, mesh: Mesh) -> Run:
    """Opens the checkpoint without reading its weights, and reads, encodes and packs the data.

    Raises:
      UserError: they do not fit each other, the recipe or the devices.
    """
    if not config.checkpoint:
        raise UserError("name the model to fine-tune: llama-jax sft CHECKPOINT --data FILE.jsonl")
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    length = check(config, model, mesh_sizes(mesh))
    template: Template = Plain() if config.plain else Llama2Chat()
    loaded = load_examples(config.data, tokenizer, template, length)
    packing = Packing(loaded.train, length, config.seed, config.data.weights)
    check_length(config, packing)
    total_steps = math.ceil(packing.count(config.epochs) / config.rows)
    optimizer = make_optimizer(config.optimizer, steps.declared(model, config.adapters), total_steps)
    return Run(config, checkpoint, model, tokenizer, loaded, packing, total_steps, mesh, optimizer)


def check(config: SFTConfig, model: LlamaConfig, sizes: dict[str, int]) -> int:
    """Checks that the settings suit each other, the model and a mesh of these sizes, and gives the tokens in a row.

    Raises:
      UserError: they do not; says what would.
    """
    check_bits(config)
    length = length_within(config.length, model)
    if config.micro_batches < 1 or config.rows % config.micro_batches:
        raise UserError(f"--micro-batches {config.micro_batches} does not divide the {config.rows} rows of a batch")
    check_divides(sizes, model, config.rows // config.micro_batches, length)
    return length


def check_length(config: SFTConfig, packing: Packing) -> None:
    """Checks that there is something to train for, and an epoch in every batch at the most.

    Raises:
      UserError: a batch would hold dialogues several times, or nothing is asked for.
    """
    check_counts(config, "epochs", "rows")
    rows = len(packing.epoch(0))
    if rows < config.rows:
        raise UserError(
            f"the dialogues fill {rows} rows of {packing.length} tokens, and a batch has {config.rows}: it would hold "
            f"them several times; try --rows {max(rows // 8, 1)}, or shorter rows with --length"
        )


def train(prepared: Run, checkpoints: Checkpoints, save: Callable[[TrainState, RowCursor], None]) -> None:
    """Feeds the batches behind the newest checkpoint's cursor to the loop, on the ambient mesh."""
    config, mesh = prepared.config, prepared.mesh
    compiled, plan = compile_step(prepared)
    say(banner(prepared, plan))
    state, frozen, cursor = begin(prepared, checkpoints)
    batches = answer_batches(prepared.packing, rows=config.rows, cursor=cursor, **share_of_process(mesh, config.rows))
    fit(
        state,
        lambda state, batch: compiled(state, batch, frozen),
        batches,
        model=prepared.model,
        mesh=mesh,
        rows=config.rows,
        length=prepared.packing.length,
        total_steps=prepared.total_steps,
        loop=config.loop,
        schedule=learning_rate(config.optimizer, prepared.total_steps),
        folder=Path(config.out),
        save=save,
        evaluate=make_evaluation(prepared, frozen),
        evaluate_first=True,
    )


def begin(prepared: Run, checkpoints: Checkpoints) -> tuple[TrainState, Any, RowCursor]:
    """The state to train from, what stays frozen beside it, and the place in the data."""
    config, mesh, optimizer = prepared.config, prepared.mesh, prepared.optimizer
    abstract_state = steps.abstract_state(
        prepared.model, optimizer, mesh, config.adapters, offload=config.compute.offload
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    frozen = None
    if config.adapters:
        frozen = load_model(prepared.checkpoint, mesh, config.compute.dtype, int8=config.int8, nf4=config.nf4)[0]
    if restored := checkpoints.restore_newest(abstract_state):
        state, metadata = restored
        say(f"resumed at step {int(state.step)} from {checkpoints.folder}")
        return state, frozen, RowCursor(**metadata["cursor"])
    if config.adapters:
        state = steps.begin_adapters(prepared.model, config.adapters, optimizer, layout, config.seed)
        return state, frozen, RowCursor()
    model = load_model(prepared.checkpoint, mesh, "float32")[0]
    return steps.adopt(model, optimizer, layout), None, RowCursor()


def describe_step(
    config: SFTConfig, model: LlamaConfig, length: int, optimizer: GradientTransformation, mesh: Mesh
) -> tuple[Callable, tuple[TrainState, Batch, Any]]:
    """The training step for a model and rows of `length` tokens, and the state, batch and frozen weights that it takes as
    shapes, dtypes and shardings.
    """
    state = steps.abstract_state(model, optimizer, mesh, config.adapters, offload=config.compute.offload)
    frozen, assemble = None, steps.whole_model
    if config.adapters:
        frozen = abstract(model, mesh, config.compute.dtype)
        frozen = quantize_abstract(frozen) if config.int8 else nf4_abstract(frozen) if config.nf4 else frozen

        def assemble(adapters: Any, frozen: Transformer, key: jax.Array) -> Transformer:
            return adapt(frozen, adapters, config.adapters, key)

    train_step = steps.make_train_step(
        optimizer,
        config.compute,
        micro_batches=config.micro_batches,
        layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        assemble=assemble,
        seed=config.seed,
    )
    return train_step, (state, steps.abstract_batch(mesh, config.rows, length), frozen)


def compile_step(prepared: Run) -> tuple[Callable, dict[str, Any]]:
    """Compiles the training step without any array; gives `step(state, batch, frozen)` and what it will take."""
    config, model, mesh = prepared.config, prepared.model, prepared.mesh
    train_step, arguments = describe_step(config, model, prepared.packing.length, prepared.optimizer, mesh)
    return compiling.compile_step(train_step, mesh, model.n_params, *arguments)


def make_evaluation(prepared: Run, frozen: Any) -> Callable[[TrainState], dict[str, float]]:
    """Builds the loss of a state on the held-out answers, in nats per token."""
    config, mesh = prepared.config, prepared.mesh
    examples: Examples = prepared.loaded.held_out
    rows = config.rows // config.micro_batches
    score = make_score(mesh, config.compute, rows)

    def batches() -> Iterator[Any]:
        share = share_of_process(mesh, rows)
        most = config.data.eval_dialogues
        return held_out_answer_batches(examples, length=prepared.packing.length, rows=rows, most=most, **share)

    def evaluate(state: TrainState) -> dict[str, float]:
        if not len(examples):
            return {}
        model = adapt(frozen, state.model, config.adapters) if config.adapters else state.model
        nats, targets = score(model, batches())
        return {"eval/loss": nats / targets}

    return evaluate


def banner(prepared: Run, plan: dict[str, Any]) -> str:
    """The plan for people."""
    config, known = prepared.config, compiling.describe_plan(plan)
    trained = "every weight"
    if config.adapters:
        base = "int8" if config.int8 else "nf4" if config.nf4 else config.compute.dtype
        trained = f"adapters of rank {config.adapters.rank} beside frozen {base} weights"
    epoch = prepared.packing.report()
    return "\n".join(
        [
            f"devices     {known['devices']}",
            f"model       {prepared.model.n_params:,} parameters from {config.checkpoint}; trained: {trained}",
            f"data        {', '.join(config.data.sources)}: {epoch['examples']:,} examples, "
            f"{epoch['answer_tokens']:,} trained tokens, {epoch['rows']:,} rows of {prepared.packing.length} "
            f"that are {epoch['efficiency']:.1%} full",
            f"steps       {prepared.total_steps:,}: {config.epochs} epochs in batches of {config.rows} rows",
            f"memory      {known['memory']}",
            f"run folder  {config.out}",
        ]
    )


def show(prepared: Run, plan: dict[str, Any]) -> None:
    """Prints a dry run: the plan, and the first examples with what is trained marked: green, or between arrows."""
    colour = sys.stdout.isatty() and not prepared.config.json
    marks = ("\x1b[32m", "\x1b[0m") if colour else ("\u00bb", "\u00ab")
    numbers = range(min(3, len(prepared.loaded.train)))
    encoded = [Encoded(*(part.tolist() for part in prepared.loaded.train[number])) for number in numbers]
    examples = [shown(prepared.tokenizer, example, marks) for example in encoded]
    if prepared.config.json:
        recipe = dataclasses.asdict(prepared.config)
        print(json.dumps({"recipe": recipe, "examples": examples, "steps": prepared.total_steps} | plan, indent=2))
        return
    print(banner(prepared, plan))
    for example in examples:
        print(f"--- an example; trained is what stands {marks[0]}so{marks[1]}\n{example}")
