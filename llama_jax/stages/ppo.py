"""PPO (paper 3.2.3): the policy answers, reward models judge, and it learns to answer better without leaving its reference.

The paper's settings are the defaults: 512 answers an iteration in mini-batches of 64, one step on each, clip 0.2, a constant
learning rate of 1e-6, KL weight 0.01 (0.005 for 34B and 70B), 200 to 400 iterations, an end when held-out prompts stop
gaining. One program on the whole mesh: it samples, judges and trains on the same devices, and gathers the weights once
before sampling.

Our choices, where the paper is silent: answers are drawn at temperature 1 from all tokens; the KL penalty falls on each
token; the critic is a model of its own that begins as the reward model, with an optimizer of its own; γ 1, λ 0.95; rewards
and advantages are whitened over the batch.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from optax import GradientTransformation

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.named_functions import load_function
from llama_jax.data.prompt_order import batch_of, encode_fitting, hold_out
from llama_jax.data.prompts import read_prompts
from llama_jax.errors import Preempted, UserError
from llama_jax.generation.answer_scores import Score
from llama_jax.generation.ppo_models import (
    Actors,
    abstract_frozen,
    assemble_critic,
    assemble_policy,
    read_frozen,
)
from llama_jax.generation.rewards import trusted_judge
from llama_jax.generation.rollouts import make_gather
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import check_divides, make_mesh, mesh_sizes, sharding, ways
from llama_jax.stages.ppo_config import FREE_TO_CHANGE, PPOConfig, check, with_micro_batches
from llama_jax.stages.ppo_iteration import (
    Parts,
    Run,
    Trained,
    draw,
    evaluation,
    experienced,
    standardise_critic,
    times,
    update,
)
from llama_jax.stages.ppo_state import Best, begin, describe_states, save
from llama_jax.text.chat import Llama2Chat, Plain, Template
from llama_jax.training import compiled as compiling
from llama_jax.training import step as steps
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.experience import Programs
from llama_jax.training.loop import due, profile
from llama_jax.training.metrics import MetricsLog, format_duration, say
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.ppo_loss import Experience, policy_objective, value_objective
from llama_jax.training.preemption import StopSignal
from llama_jax.training.run_folder import fingerprint, open_run, run_checkpoints, without, write_whole
from llama_jax.training.step import TrainState


def run(config: PPOConfig, *, score: Score | None = None) -> None:
    """Trains what `config` describes into `config.out`, going on where an earlier run of it stopped.

    Args:
      config: of the run.
      score: judges in place of reward models, see `Score`; a program that knows the right answers, for example.

    Raises:
      UserError: checkpoint, reward models, data, devices, scores or the run found in the folder do not fit.
      Diverged: loss or gradient was not finite three times in a row.
      Preempted: told to stop, and saved.
    """
    distributed.initialize(config.loop.lost_after, config.loop.hang_after)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        score = score or (load_function(config.function, "--function") if config.function else None)
        prepared = prepare(config, mesh, score is not None)
        policy_step, critic_step, plan = compile_steps(prepared)
        if config.dry_run:
            print(json.dumps(recipe_of(prepared) | plan, indent=2) if config.json else banner(prepared, plan))
            return
        say(banner(prepared, plan))
        folder = Path(config.out)
        with run_checkpoints(config) as saved, closing(Checkpoints(folder / "best", keep_last=1)) as best:
            decisive = recipe_of(prepared)
            open_run(folder, "ppo", config, decisive, prepared.tokenizer, saved, config.resume)
            train(prepared, saved, best, decisive, score, policy_step, critic_step)


def prepare(config: PPOConfig, mesh: Mesh, has_score: bool) -> Run:
    """Opens the checkpoints without reading their weights, and reads the prompts.

    Raises:
      UserError: they do not fit each other, the recipe or the devices.
    """
    check(config, has_score)
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    template: Template = Plain() if config.plain else Llama2Chat()
    judges = [
        trusted_judge(path, tokenizer, template, config.accept_warnings) if path else None
        for path in (config.safety, config.helpfulness)
    ]
    actors = Actors(checkpoint, model, config.adapters, *judges, config.compute, config.int8, config.nf4)
    dialogues, found = read_prompts(config.data, template)
    context = min(one.config.context_length for one in (actors, *filter(None, judges)))
    prompts, left_out = encode_fitting(dialogues, tokenizer, template, context, config.max_new_tokens)
    say("\n".join(filter(None, (found, left_out))))
    prompts, held_out = hold_out(prompts, config.eval_prompts, config.seed)
    longest = max(len(prompt.ids) for prompt in (*prompts, *held_out)) + config.max_new_tokens
    length = longest + -longest % (16 * ways("length"))
    config = with_micro_batches(config, ways("batch"))
    check_divides(mesh_sizes(mesh), model, config.mini_batch // config.micro_batches, length)
    per_iteration = config.batch // config.mini_batch
    optimizers = (
        make_optimizer(
            config.optimizer, actors.declared_policy(), (config.iterations - config.critic_warmup) * per_iteration
        ),
        make_optimizer(config.critic, actors.declared_critic(), config.iterations * per_iteration),
    )
    return Run(config, actors, tokenizer, template, prompts, held_out, length, mesh, *optimizers)


def recipe_of(prepared: Run) -> dict[str, Any]:
    """What decides a run's results."""
    config, actors = prepared.config, prepared.actors
    everything = [*prepared.prompts, *prepared.held_out]
    lengths = np.array([len(prompt.ids) for prompt in everything], np.int32)
    tags = np.frombuffer(json.dumps([prompt.category for prompt in everything]).encode(), np.uint8)
    decays = any(
        optimizer.final_lr_ratio != 1 or optimizer.warmup_steps for optimizer in (config.optimizer, config.critic)
    )
    return without(config, FREE_TO_CHANGE) | {
        "checkpoint": str(actors.checkpoint),
        "judges": [info and str(info.folder) for info in (actors.safety, actors.helpfulness)],
        "tokenizer": prepared.tokenizer.sha256,
        "prompts": fingerprint(np.concatenate([prompt.ids for prompt in everything]).astype(np.int32), lengths, tags),
        "schedule": config.iterations if decays else None,
    }


def compile_steps(prepared: Run) -> tuple[Callable, Callable, dict[str, Any]]:
    """Compiles both training steps without any array; gives `step(state, batch, frozen)` of the policy and of the critic,
    and what they will take.
    """
    actors, mesh = prepared.actors, prepared.mesh
    optimizers = prepared.policy_optimizer, prepared.critic_optimizer
    made, plans = [], []
    for (step, arguments), model in zip(
        describe_steps(prepared.config, actors, prepared.length, optimizers, mesh),
        (actors.config, actors.critic_config),
        strict=True,
    ):
        compiled, plan = compiling.compile_step(step, mesh, model.n_params, *arguments)
        made.append(compiled)
        plans.append(plan)
    return *made, {"policy": plans[0], "critic": plans[1], "length": prepared.length}


def describe_steps(
    config: PPOConfig, actors: Actors, length: int, optimizers: tuple[GradientTransformation, ...], mesh: Mesh
) -> list[tuple[Callable, tuple[TrainState, Experience, Any]]]:
    """The training steps of policy and critic on rows of `length` tokens, each with the state, mini-batch and frozen weights
    that it takes as shapes, dtypes and shardings.
    """
    place, shape = sharding(mesh, "batch", "length"), (config.mini_batch, length)
    dtypes = Experience(*[jnp.int32] * 3, jnp.bool_, *[jnp.float32] * 3)
    batch = Experience(*(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in dtypes))
    states = describe_states(actors, optimizers, mesh)
    objectives = (policy_objective(config.clip, config.temperature), value_objective())
    assembled = (partial(assemble_policy, actors), partial(assemble_critic, actors))
    described = []
    for state, under, objective, assemble, optimizer in zip(
        states, abstract_frozen(actors, mesh), objectives, assembled, optimizers, strict=True
    ):
        step = steps.make_train_step(
            optimizer,
            config.compute,
            objective=objective,
            micro_batches=config.micro_batches,
            skip_empty=True,
            layout=jax.tree.map(lambda leaf: leaf.sharding, state),
            assemble=assemble,
            seed=config.seed,
        )
        described.append((step, (state, batch, under)))
    return described


def train(
    prepared: Run,
    saved: Checkpoints,
    best_saved: Checkpoints,
    recipe: dict[str, Any],
    score: Score | None,
    policy_step: Callable,
    critic_step: Callable,
) -> None:
    """Iterates from the newest checkpoint on: draw, judge, train, log, evaluate, save, in that order."""
    config = prepared.config
    trained, start, best = begin(prepared, saved)
    parts = read_parts(prepared, trained, score, policy_step, critic_step)
    if not start and prepared.actors.judge:
        trained = standardise_critic(prepared, parts, trained)
    log, began = MetricsLog(Path(config.out), start or -1), time.monotonic()

    def evaluate(done: int) -> None:
        nonlocal best
        values, page = evaluation(prepared, parts, trained)
        log.write(done, values)
        if jax.process_index() == 0:
            write_whole(Path(config.out) / "samples" / f"{done:06}.md", page.encode())
        say(f"iteration {done} held out: " + " ".join(f"{name[5:]} {value:.4g}" for name, value in values.items()))
        if values["eval/reward"] > best.reward:
            best = Best(done, values["eval/reward"])
            save(best_saved, prepared, recipe, trained, done, best)

    try:
        with StopSignal() as stop:
            if not start and config.loop.eval_every and prepared.held_out:
                evaluate(0)
            for iteration in range(start, config.iterations):
                if is_over(config, best, iteration):
                    break
                profile(config.loop, Path(config.out), iteration - start)
                distributed.note_step(iteration + 1)
                prompts = batch_of(prepared.prompts, config.batch, iteration, config.seed)
                clock = [time.monotonic()]
                drawn = draw(prepared, parts, trained, prompts, iteration + 1)
                clock.append(time.monotonic())
                # Nothing of this iteration has been trained on yet: what is saved here, is done anew.
                if name := stop.received(2 * iteration):
                    if iteration > start:
                        save(saved, prepared, recipe, trained, iteration, best)
                    kept = f"iteration {iteration} is saved" if iteration else "no iteration was finished"
                    raise Preempted(f"{name} received: {kept}; start it again to go on")
                try:
                    experience, values = experienced(prepared, parts, trained, prompts, drawn)
                except UserError:
                    if iteration > start:
                        save(saved, prepared, recipe, trained, iteration, best)
                    raise
                clock.append(time.monotonic())
                trained, learned = update(prepared, parts, trained, experience, iteration)
                clock.append(time.monotonic())
                done = iteration + 1
                values |= learned | times(clock, int(experience.answer_mask_BT.sum()), config.batch)
                log.write(done, {name: value for name, value in values.items() if math.isfinite(value)})
                if due(config.loop.log_every, done, config.iterations):
                    left = (config.iterations - done) * (time.monotonic() - began) / (done - start)
                    say(line(values, done, config.iterations, left))
                if prepared.held_out and due(config.loop.eval_every, done, config.iterations):
                    evaluate(done)
                name, ended = stop.received(2 * iteration + 1), is_over(config, best, done) or done == config.iterations
                if name or ended or due(config.loop.save_every, done, config.iterations):
                    save(saved, prepared, recipe, trained, done, best)
                if name and not ended:
                    raise Preempted(f"{name} received: iteration {done} is saved; start it again to go on")
    finally:
        log.close()
    if best.iteration >= 0:
        say(
            f"held-out prompts gained most at iteration {best.iteration}: reward {best.reward:.4g}, in {config.out}/best"
        )
    say(f"done: {config.out}; try: llama-jax chat {config.out}{' --plain' * config.plain}")


def read_parts(
    prepared: Run, trained: Trained, score: Score | None, policy_step: Callable, critic_step: Callable
) -> Parts:
    """What the iterations work with: reads what is frozen, and makes the programs that say what models think of answers."""
    config, actors = prepared.config, prepared.actors
    frozen = read_frozen(actors, prepared.mesh)
    programs = Programs(prepared.mesh, prepared.part, config.temperature, config.compute)
    gather = make_gather(assemble_policy(actors, trained.policy.model, frozen.reference), config.compute.dtype)
    return Parts(frozen, programs, gather, score, policy_step, critic_step)


def is_over(config: PPOConfig, best: Best, done: int) -> bool:
    """Whether held-out prompts have not gained for too long."""
    return bool(config.patience and config.loop.eval_every and best.iteration >= 0) and (
        done - best.iteration >= config.patience * config.loop.eval_every
    )


def line(values: dict[str, float], done: int, total: int, left: float) -> str:
    """An iteration in a line."""
    policy = "the critic alone"
    if "policy/loss" in values:
        policy = (
            f"entropy {values['policy/entropy']:.2f} clipped {values['policy/clip_fraction']:.1%} "
            f"gnorm {values['policy/grad_norm']:.2f}"
        )
    return (
        f"iteration {done}/{total} {done / total:.1%} reward {values['reward/mean']:.3f} kl {values['kl/sequence']:.2f} "
        f"{policy} value loss {values['critic/loss']:.3f} length {values['answers/length']:.0f} "
        f"cut {values['answers/cut']:.0%} {values['speed/samples_per_s']:.1f} samples/s "
        f"({values['time/generate']:.0%} drawing) eta {format_duration(left)}"
    )


def banner(prepared: Run, plan: dict[str, Any]) -> str:
    """The plan for people."""
    config, actors = prepared.config, prepared.actors
    memory = {name: compiling.describe_plan(plan[name]) for name in ("policy", "critic")}
    judges = {"safety": actors.safety, "helpfulness": actors.helpfulness}
    named = ", ".join(f"{name} {info.folder}" for name, info in judges.items() if info) or "a function"
    trained = f"adapters of rank {actors.lora.rank}" if actors.lora else "every weight"
    adversarial = sum(bool(prompt.category) for prompt in prepared.prompts)
    return "\n".join(
        [
            f"devices     {memory['policy']['devices']}",
            f"policy      {actors.config.n_params:,} parameters from {config.checkpoint}; trained: {trained}",
            f"judges      {named}{'; the backbone is shared' * actors.shares(actors.judge)}",
            f"data        {', '.join(config.data.sources)}: {len(prepared.prompts):,} prompts, {adversarial:,} of them "
            f"adversarial; {len(prepared.held_out):,} held out",
            f"iterations  {config.iterations:,} of {config.batch} answers in mini-batches of {config.mini_batch}, in rows of "
            f"{prepared.length} tokens; KL weight {config.beta:g}",
            f"memory      policy: {memory['policy']['memory']}",
            f"            critic: {memory['critic']['memory']}",
            f"run folder  {config.out}",
        ]
    )
