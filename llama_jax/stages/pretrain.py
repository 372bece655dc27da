"""Pretraining (paper 2.2): next-token prediction over packed documents, from a recipe to a run folder.

A run folder holds config.json, tokenizer.model, metrics.jsonl, tensorboard/, samples/ and checkpoints/<step>/.
Starting the same command again goes on from the newest checkpoint, to the bit as if it had never stopped.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from optax import GradientTransformation

from llama_jax.config import LlamaConfig
from llama_jax.conversion.load import load_model
from llama_jax.data.packing import Batch
from llama_jax.data.pipeline import Cursor, DataConfig, make_batches, training_documents
from llama_jax.errors import UserError
from llama_jax.generation.llama import Llama
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import check_divides, make_mesh, mesh_sizes
from llama_jax.text.tokenizer import FILE_NAME, Tokenizer
from llama_jax.training import compiled as compiling
from llama_jax.training import step as steps
from llama_jax.training.batches import share_of_process
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.held_out import make_held_out_loss
from llama_jax.training.loop import LoopConfig, fit
from llama_jax.training.metrics import format_count, say
from llama_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from llama_jax.training.run_config import HOW_IT_COMPUTES, RunConfig, run_dataclass
from llama_jax.training.run_folder import differences, open_run, run_checkpoints, without, write_whole
from llama_jax.training.step import TrainState


@run_dataclass
class PretrainConfig(RunConfig):
    """One pretraining run."""

    model: LlamaConfig
    """The architecture."""
    train_tokens: int
    """Tokens to train on in all; 2.0T in the paper."""
    tokenizer: str = ""
    """A SentencePiece model file, or a folder with tokenizer.model; empty: train one on the training documents."""
    data: DataConfig = field(default_factory=DataConfig)
    """The documents."""
    batch_tokens: int = 4 * 2**20
    """Tokens in a global batch; 4M in the paper."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How often to log, evaluate and save."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting; 0 as in the paper."""
    init_from: str = ""
    """A checkpoint whose parameters to begin with, such as for a longer context; random ones if empty."""
    sample_prompts: tuple[str, ...] = ("",)
    """Prompts continued at each evaluation, written to samples/; an empty one starts from BOS."""
    seed: int = 0
    """Of initialisation and data order."""
    out: str = "runs/pretrain"
    """The run's folder."""
    dry_run: bool = False
    """Print the resolved recipe, the mesh and the memory, and touch nothing."""

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.model.context_length

    @property
    def rows(self) -> int:
        """Sequences in a global batch."""
        return self.batch_tokens // self.length

    @property
    def total_steps(self) -> int:
        """Batches in the run."""
        return math.ceil(self.train_tokens / self.batch_tokens)


# What may differ between a run and its continuation: where and how it runs, not what it computes. The tokenizer is
# compared by its content.
FREE_TO_CHANGE = (
    *HOW_IT_COMPUTES,
    *("data.workers", "data.prefetch"),
    *("data.eval_documents", "loop", "micro_batches", "sample_prompts"),
    *("mesh", "out", "resume", "dry_run", "json", "tokenizer"),
)


def run(config: PretrainConfig) -> None:
    """Trains what `config` describes into `config.out`, going on where an earlier run of it stopped.

    Raises:
      UserError: the recipe does not fit the data, the tokenizer, the devices or the run found in the folder.
      Diverged: loss or gradient was not finite three times in a row.
      Preempted: told to stop, and saved.
    """
    distributed.initialize(config.loop.lost_after, config.loop.hang_after)
    check_batch(config)
    mesh = make_mesh(config.mesh)
    check_divides(mesh_sizes(mesh), config.model, config.rows // config.micro_batches, config.length)
    optimizer = make_optimizer(config.optimizer, config.model, config.total_steps)
    with jax.set_mesh(mesh):
        if config.dry_run:
            plan = compile_step(config, optimizer, mesh)[1]
            recipe = json.dumps(plan["recipe"], indent=2)
            print(json.dumps(plan, indent=2) if config.json else f"{banner(config, plan)}\nrecipe {recipe}")
            return
        folder = Path(config.out)
        with run_checkpoints(config) as checkpoints:
            tokenizer = find_tokenizer(config)
            decisive = without(config, FREE_TO_CHANGE) | {"tokenizer": tokenizer.sha256}
            open_run(folder, "pretrain", config, decisive, tokenizer, checkpoints, config.resume)

            def save(state: TrainState, cursor: Cursor) -> None:
                checkpoints.save(state, {"recipe": decisive, "cursor": cursor._asdict()}, tokenizer)

            state, cursor = begin(config, tokenizer, checkpoints, optimizer, mesh)
            train(config, tokenizer, mesh, optimizer, state, cursor, save)
    say(f'done: {folder}; try: llama-jax generate {folder} ""')


def train(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    optimizer: GradientTransformation,
    state: TrainState,
    cursor: Cursor,
    save: Callable[[TrainState, Cursor], None],
) -> None:
    """Feeds the batches behind `cursor` to the loop, on the ambient mesh."""
    shape = {"rows": config.rows, "length": config.length}
    share = share_of_process(mesh, config.rows)
    batches = make_batches(config.data, tokenizer, **shape, seed=config.seed, cursor=cursor, **share)
    try:
        evaluate = make_evaluation(config, tokenizer, mesh)
        train_step, plan = compile_step(config, optimizer, mesh)
        say(banner(config, plan))
        fit(
            state,
            train_step,
            batches,
            model=config.model,
            mesh=mesh,
            **shape,
            total_steps=config.total_steps,
            loop=config.loop,
            schedule=learning_rate(config.optimizer, config.total_steps),
            folder=Path(config.out),
            save=save,
            evaluate=evaluate,
        )
    finally:
        batches.close()


def check_batch(config: PretrainConfig) -> None:
    """Checks that a batch is made of whole sequences and micro-batches of whole sequences.

    Raises:
      UserError: it is not; says what would be.
    """
    if config.rows < 1 or config.batch_tokens % config.length:
        raise UserError(
            f"--batch-tokens {config.batch_tokens} is not a multiple of the sequence length {config.length}; "
            f"try --batch-tokens {max(config.rows, 1) * config.length}"
        )
    if config.micro_batches < 1 or config.rows % config.micro_batches:
        raise UserError(
            f"--micro-batches {config.micro_batches} does not divide the {config.rows} sequences of a batch"
        )


def find_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The recipe's tokenizer; where it names none, the one of the run's folder, which is trained on the run's
    training documents when the run begins.

    Raises:
      UserError: it cannot be read or trained, or has another vocabulary than the model.
    """
    path = Path(config.tokenizer or Path(config.out) / FILE_NAME)
    try:
        if not config.tokenizer and not path.exists() and jax.process_index() == 0:
            say(f"training a tokenizer of {config.model.vocab_size} pieces on the training documents ...")
            Tokenizer.train(training_documents(config.data), path, vocab_size=config.model.vocab_size)
    finally:  # also when it failed, so that the other processes find no tokenizer instead of waiting for one
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tokenizer")
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces, the model has {config.model.vocab_size}; "
            f"use --model.vocab-size {tokenizer.vocab_size}, or a tokenizer of {config.model.vocab_size} pieces"
        )
    return tokenizer


def begin(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    optimizer: GradientTransformation,
    mesh: Mesh,
) -> tuple[TrainState, Cursor]:
    """The state to train from: the newest checkpoint's, or a new one around `init_from`'s or random parameters.

    Raises:
      UserError: `init_from` is another model's or another tokenizer's.
    """
    abstract = steps.abstract_state(config.model, optimizer, mesh, offload=config.compute.offload)
    if restored := checkpoints.restore_newest(abstract):
        state, metadata = restored
        say(f"resumed at step {int(state.step)} from {checkpoints.folder}")
        return state, Cursor(**metadata["cursor"])
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if not config.init_from:
        create = jax.jit(
            lambda: steps.init_state(config.model, optimizer, jax.random.key(config.seed)), out_shardings=layout
        )
        return create(), Cursor()
    model, other_tokenizer = load_model(config.init_from, mesh, jnp.float32)
    # The rotary embedding has no parameters: a longer context may stretch it (as Code Llama did).
    stretched = {name: getattr(config.model, name) for name in ("context_length", "rope_theta", "rope_scaling")}
    changes = differences(
        dataclasses.asdict(dataclasses.replace(model.config, **stretched)) | {"tokenizer": other_tokenizer.sha256},
        dataclasses.asdict(config.model) | {"tokenizer": tokenizer.sha256},
    )
    if changes:
        listed = ", ".join(f"{name} {was} there and {now} here" for name, was, now in changes)
        raise UserError(f"--init-from {config.init_from} is a checkpoint of another model: {listed}")
    adopt = jax.jit(
        lambda leaves: steps.new_state(jax.tree.unflatten(jax.tree.structure(abstract.model), leaves), optimizer),
        out_shardings=layout,
    )
    return adopt(jax.tree.leaves(model)), Cursor()


def describe_step(
    config: PretrainConfig, optimizer: GradientTransformation, mesh: Mesh
) -> tuple[Callable, tuple[TrainState, Batch]]:
    """The training step, and the state and batch that it takes as shapes, dtypes and shardings."""
    state = steps.abstract_state(config.model, optimizer, mesh, offload=config.compute.offload)
    train_step = steps.make_train_step(
        optimizer,
        config.compute,
        objective=steps.next_tokens(config.z_loss),
        micro_batches=config.micro_batches,
        layout=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return train_step, (state, steps.abstract_batch(mesh, config.rows, config.length))


def compile_step(
    config: PretrainConfig, optimizer: GradientTransformation, mesh: Mesh
) -> tuple[Callable, dict[str, Any]]:
    """Compiles the training step without any array, and reports what it will take.

    Returns:
      the compiled step, and the resolved recipe with mesh, parameters and bytes per device.

    Raises:
      UserError: the compiler finds that it does not fit the device's memory.
    """
    train_step, arguments = describe_step(config, optimizer, mesh)
    compiled, plan = compiling.compile_step(train_step, mesh, config.model.n_params, *arguments)
    own = {"steps": config.total_steps, "sequences_per_batch": config.rows}
    return compiled, {"recipe": dataclasses.asdict(config)} | plan | own


def banner(config: PretrainConfig, plan: dict[str, Any]) -> str:
    """The plan of `compile_step` for people."""
    known = compiling.describe_plan(plan)
    lines = [
        f"devices     {known['devices']}",
        f"parameters  {config.model.n_params:,}",
        f"data        {', '.join(config.data.sources)}",
        f"batch       {config.batch_tokens:,} tokens: {config.rows} sequences of {config.length}, "
        f"in {config.micro_batches} part(s)",
        f"steps       {config.total_steps:,} for {format_count(config.train_tokens)} tokens",
        f"memory      {known['memory']}",
        f"compute     {config.compute.dtype} matmuls, attention {config.compute.attention}, remat {config.compute.remat}; "
        f"compiled in {plan['compile_seconds']} s",
        f"run folder  {config.out}",
    ]
    return "\n".join(lines)


def make_evaluation(
    config: PretrainConfig, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """Builds the evaluation of a state: held-out loss where documents are held out, and samples in the run's folder."""
    held_out = config.data.held_out or config.data.eval_sources
    scores = {"rows": config.rows // config.micro_batches, "length": config.length}
    loss = make_held_out_loss(config.data, tokenizer, mesh, config.compute, **scores) if held_out else lambda _: {}

    def evaluate(state: TrainState) -> dict[str, float]:
        write_samples(config, tokenizer, state)
        return loss(state.model)

    return evaluate


def write_samples(config: PretrainConfig, tokenizer: Tokenizer, state: TrainState) -> None:
    """Writes continuations of the recipe's prompts to samples/<step>.txt."""
    if not config.sample_prompts or jax.process_count() > 1:
        return  # Our choice: a run over several hosts is sampled from its checkpoints instead of stalling all of them
    engine = Llama(state.model, tokenizer)
    completions = engine.generate(
        list(config.sample_prompts), seed=config.seed, max_new_tokens=min(100, config.length - 1)
    )
    text = "\n\n".join(f"{prompt}|{c.text}" for prompt, c in zip(config.sample_prompts, completions, strict=True))
    write_whole(Path(config.out) / "samples" / f"{int(state.step)}.txt", (text + "\n").encode())
