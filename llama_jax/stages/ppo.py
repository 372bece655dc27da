"""PPO (paper 3.2.3): the policy answers, reward models judge, and it learns to answer better without leaving its reference.

The paper's settings are the defaults: 512 answers an iteration in mini-batches of 64, one step on each, clip 0.2, a constant
learning rate of 1e-6, KL weight 0.01 (0.005 for 34B and 70B), 200 to 400 iterations, an end when held-out prompts stop
gaining. One program on the whole mesh: it samples, judges and trains on the same devices, and gathers the weights once
before sampling.

Our choices, where the paper is silent: answers are drawn at temperature 1 from all tokens; the KL penalty falls on each
token; the critic is a model of its own that begins as the reward model, with an optimizer of its own; γ 1, λ 0.95; rewards
and advantages are whitened over the batch.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import GradientTransformation

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.prompt_order import Prompt, batch_of, encode_fitting, hold_out
from llama_jax.data.prompts import PromptsConfig, read_prompts
from llama_jax.errors import Diverged, Preempted, UserError
from llama_jax.generation.answer_scores import Score, finite_scores
from llama_jax.generation.llama import Llama
from llama_jax.generation.ppo_models import (
    Actors,
    Frozen,
    abstract_frozen,
    abstract_trained,
    assemble_critic,
    assemble_policy,
    first_critic,
    first_policy,
    read_frozen,
)
from llama_jax.generation.rewards import load_function, trusted_judge
from llama_jax.generation.rollouts import Rollout, make_gather, sample_rollouts
from llama_jax.generation.session import spoken_text
from llama_jax.model.heads import standardised
from llama_jax.model.lora import LoraConfig
from llama_jax.parallel import distributed
from llama_jax.parallel.mesh import (
    batch_rows_of_process,
    check_divides,
    make_mesh,
    mesh_sizes,
    sharding,
    ways,
)
from llama_jax.text.chat import Llama2Chat, Plain, Template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training import compiled as compiling
from llama_jax.training import step as steps
from llama_jax.training.advantages import THRESHOLD
from llama_jax.training.batches import to_devices
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.experience import (
    Answers,
    Programs,
    Rewards,
    combine,
    make_answers,
    make_experience,
    mini_batch_of,
    of_function,
)
from llama_jax.training.loop import MAX_SKIPPED_IN_ROW, LoopConfig, due, profile
from llama_jax.training.metrics import MetricsLog, format_duration, say
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.ppo_loss import (
    Experience,
    explained_variance,
    policy_metrics,
    policy_objective,
    value_objective,
)
from llama_jax.training.preemption import StopSignal
from llama_jax.training.run_config import RunConfig, run_dataclass
from llama_jax.training.run_folder import fingerprint, make_folder, open_run, without, write_whole
from llama_jax.training.step import StepMetrics, TrainState

CONSTANT = OptimizerConfig(peak_lr=1e-6, warmup_steps=0, final_lr_ratio=1.0)


@run_dataclass
class PPOConfig(RunConfig):
    """One run of PPO."""

    checkpoint: str = ""
    """The chat model to begin with, which is also the reference; of any form."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    """The prompts; a row's `risk` marks it as adversarial."""
    plain: bool = False
    """Prompt and answer as plain text, instead of Llama 2's chat format."""
    helpfulness: str = ""
    """The reward model of helpful answers: a run of llama-jax reward."""
    safety: str = ""
    """The reward model of safe answers, likewise; with one of the two alone, it judges everything."""
    function: str = ""
    """FILE.py:NAME, a function of dialogues that returns a number for each last answer, in place of reward models."""
    threshold: float = THRESHOLD
    """The safety model's probability below which it judges, whatever was asked."""
    accept_warnings: bool = False
    """Use reward models in spite of what their held-out scores say against them."""
    beta: float = 0.01
    """Weight of the KL divergence from the reference: 0.01 for 7B and 13B, 0.005 for 34B and 70B."""
    gamma: float = 1.0
    """Discount of each token."""
    lam: float = 0.95
    """Of generalised advantage estimation."""
    iterations: int = 400
    """Batches of answers, at most."""
    batch: int = 512
    """Answers of an iteration."""
    mini_batch: int = 64
    """Answers of a gradient step; each answer is in one."""
    clip: float = 0.2
    """How far a token's probability ratio may leave 1 before it is no longer rewarded."""
    temperature: float = 1.0
    """Divides the logits, where answers are drawn and wherever their probabilities are computed."""
    max_new_tokens: int = 512
    """Of an answer."""
    cut_penalty: float = 0.0
    """Taken from the whitened reward of an answer that max_new_tokens cut."""
    optimizer: OptimizerConfig = CONSTANT
    """The policy's: AdamW at a constant learning rate, where final_lr_ratio is 1."""
    critic: OptimizerConfig = CONSTANT
    """The critic's."""
    critic_warmup: int = 0
    """First iterations that train the critic alone; one that foresees nothing yet makes the first steps of a policy noise."""
    train: Literal["all", "lora"] = "all"
    """What is trained: every weight, or low-rank adapters beside one frozen backbone that all four models may share."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters, where they are trained."""
    int8: bool = False
    """Keep the frozen backbone in 8 bits."""
    nf4: bool = False
    """Keep the frozen backbone in 4 bits, as QLoRA does."""
    eval_prompts: int = 64
    """Prompts that are held out, to stop by and to show answers to."""
    patience: int = 5
    """Stop after so many evaluations without a better mean reward on them; 0: never."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=1, eval_every=10, save_every=10))
    """How often to log, evaluate and save; counted in iterations."""
    rows: int = 64
    """Answers that are drawn side by side; a finished one makes room for the next. Memory and speed, not the result."""
    micro_batches: int = 0
    """Parts a mini-batch is split into, one after the other; the result is the same. Answers share rows, and parts that they
    leave empty cost nothing. 0: up to 8, as many as leave each device a row."""
    seed: int = 0
    """Of the order of prompts, of answers, heads and adapters."""
    out: str = "runs/ppo"
    """The run's folder; where held-out prompts gained most is its best/."""
    dry_run: bool = False
    """Print what was found, the mesh and the memory, and touch nothing."""


# What may differ between a run and its continuation. Models and prompts are compared by what they turned out to be.
FREE_TO_CHANGE = (
    *("compute.attention", "compute.remat", "compute.loss_chunk", "loop", "micro_batches", "rows", "patience"),
    *("iterations", "accept_warnings", "checkpoint", "data.sources", "helpfulness", "safety", "function"),
    *("mesh", "out", "resume", "dry_run", "json"),
)


@dataclass(frozen=True)
class Run:
    """A configuration with what its checkpoints and its data turned out to be."""

    config: PPOConfig
    actors: Actors
    tokenizer: Tokenizer
    template: Template
    prompts: list[Prompt]
    held_out: list[Prompt]
    length: int
    """Tokens of a row: the longest prompt with the longest answer."""
    mesh: Mesh
    policy_optimizer: GradientTransformation
    critic_optimizer: GradientTransformation

    @property
    def part(self) -> int:
        """Rows that a program sees at once."""
        return self.config.mini_batch // self.config.micro_batches


@struct.dataclass
class PPOState(TrainState):
    """What a checkpoint holds: the policy's state with iterations as its `step`, and the critic's."""

    policy_steps: jax.Array
    """int32, gradient steps, which `step` counts in the state that trains."""
    critic: TrainState


class Trained(NamedTuple):
    """What an iteration changes."""

    policy: TrainState
    critic: TrainState


class Parts(NamedTuple):
    """What an iteration works with and leaves as it is."""

    frozen: Frozen
    programs: Programs
    gather: Callable
    """From weights as they are trained to weights to draw with."""
    score: Score | None
    """Judges in place of reward models."""
    policy_step: Callable
    critic_step: Callable


class Best(NamedTuple):
    """The evaluation with the highest mean reward so far."""

    iteration: int = -1
    reward: float = -math.inf


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
    distributed.initialize()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        score = score or (load_function(config.function) if config.function else None)
        prepared = prepare(config, mesh, score is not None)
        policy_step, critic_step, plan = compile_steps(prepared)
        if config.dry_run:
            print(json.dumps(recipe_of(prepared) | plan, indent=2) if config.json else banner(prepared, plan))
            return
        say(banner(prepared, plan))
        folder = Path(config.out)
        make_folder(folder)
        saved = Checkpoints(folder / "checkpoints", config.loop.keep_last, config.loop.keep_every or None)
        best = Checkpoints(folder / "best", keep_last=1)
        try:
            decisive = recipe_of(prepared)
            open_run(folder, "ppo", config, decisive, prepared.tokenizer, saved, config.resume)
            train(prepared, saved, best, decisive, score, policy_step, critic_step)
        finally:
            best.close()
            saved.close()


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
    lora = config.lora if config.train == "lora" else None
    actors = Actors(checkpoint, model, lora, *judges, config.compute, config.int8, config.nf4)
    dialogues, found = read_prompts(config.data, template)
    context = min(judge.config.context_length for judge in (actors, *filter(None, judges)))
    prompts, left_out = encode_fitting(dialogues, tokenizer, template, context, config.max_new_tokens)
    say("\n".join(filter(None, (found, left_out))))
    prompts, held_out = hold_out(prompts, config.eval_prompts, config.seed)
    longest = max(len(prompt.ids) for prompt in (*prompts, *held_out)) + config.max_new_tokens
    length = longest + -longest % (16 * ways("length"))
    if not config.micro_batches:
        fitting = [n for n in range(1, 9) if config.mini_batch % (n * ways("batch")) == 0]
        config = dataclasses.replace(config, micro_batches=max(fitting, default=1))
    check_divides(mesh_sizes(mesh), model, config.mini_batch // config.micro_batches, length)
    total = config.iterations * (config.batch // config.mini_batch)
    optimizers = (
        make_optimizer(config.optimizer, actors.declared_policy(), total),
        make_optimizer(config.critic, actors.declared_critic(), total),
    )
    return Run(config, actors, tokenizer, template, prompts, held_out, length, mesh, *optimizers)


def check(config: PPOConfig, has_score: bool) -> None:
    """Raises UserError for settings that cannot be."""
    if not config.checkpoint:
        raise UserError("name the model to begin with: llama-jax ppo CHECKPOINT --data FILE.jsonl --helpfulness RUN")
    if not config.data.sources:
        raise UserError("No prompts. Set --data.sources to a .jsonl file of dialogues, hf:NAME or tfds:NAME.")
    if has_score == bool(config.helpfulness or config.safety):
        raise UserError(
            "both a function and reward models were given; one of them judges"
            if has_score
            else "nothing judges: name a run of llama-jax reward with --helpfulness, --safety or both, or a Python "
            "function with --function FILE.py:NAME"
        )
    if (config.int8 or config.nf4) and config.train != "lora":
        raise UserError("--int8 and --nf4 are for frozen weights, and --train all trains them; say --train lora")
    if config.int8 and config.nf4:
        raise UserError("--int8 and --nf4 were both given; the frozen weights have 8 bits or 4")
    counts = ("iterations", "batch", "mini_batch", "max_new_tokens", "rows")
    for name in counts:
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be 1 or more")
    if config.batch % config.mini_batch:
        fitting = [n for n in range(1, config.batch + 1) if config.batch % n == 0]
        raise UserError(
            f"--mini-batch {config.mini_batch} does not divide --batch {config.batch}; it may be one of {fitting}"
        )
    if config.micro_batches < 0 or (config.micro_batches and config.mini_batch % config.micro_batches):
        raise UserError(f"--micro-batches {config.micro_batches} does not divide --mini-batch {config.mini_batch}")
    ranges = {
        "temperature": (config.temperature, 0 < config.temperature < math.inf, "above 0"),
        "clip": (config.clip, 0 < config.clip < 1, "between 0 and 1"),
        "beta": (config.beta, 0 <= config.beta < math.inf, "0 or more"),
        "gamma": (config.gamma, 0 <= config.gamma <= 1, "from 0 to 1"),
        "lam": (config.lam, 0 <= config.lam <= 1, "from 0 to 1"),
        "threshold": (config.threshold, 0 <= config.threshold <= 1, "from 0 to 1"),
        "cut-penalty": (config.cut_penalty, 0 <= config.cut_penalty < math.inf, "0 or more"),
        "critic-warmup": (
            config.critic_warmup,
            0 <= config.critic_warmup < config.iterations,
            "0 or more, below --iterations",
        ),
    }
    for name, (value, is_right, expected) in ranges.items():
        if not is_right:
            raise UserError(f"--{name} is {value}; it must be {expected}")


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
    config, mesh, actors = prepared.config, prepared.mesh, prepared.actors
    place = sharding(mesh, "batch", "length")
    shape = (config.mini_batch, prepared.length)
    dtypes = Experience(*[jnp.int32] * 3, jnp.bool_, *[jnp.float32] * 4)
    batch = Experience(*(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in dtypes))
    frozen = abstract_frozen(actors, mesh)
    states = describe_states(prepared)
    objectives = (policy_objective(config.clip, config.temperature), value_objective())
    assembled = (partial(assemble_policy, actors), partial(assemble_critic, actors))
    optimizers = (prepared.policy_optimizer, prepared.critic_optimizer)
    made, plans = [], []
    for state, under, objective, assemble, optimizer, model in zip(
        states, frozen, objectives, assembled, optimizers, (actors.config, actors.critic_config), strict=True
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
        compiled, plan = compiling.compile_step(step, mesh, model.n_params, state, batch, under)
        made.append(compiled)
        plans.append(plan)
    return *made, {"policy": plans[0], "critic": plans[1], "length": prepared.length}


def describe_states(prepared: Run) -> tuple[TrainState, TrainState]:
    """The states of policy and critic as shapes, dtypes and shardings."""
    actors, mesh = prepared.actors, prepared.mesh
    trained = [abstract_trained(declared, mesh) for declared in (actors.declared_policy(), actors.declared_critic())]
    optimizers = (prepared.policy_optimizer, prepared.critic_optimizer)
    return tuple(steps.abstract_new_state(*pair, mesh) for pair in zip(trained, optimizers, strict=True))


def begin(prepared: Run, saved: Checkpoints) -> tuple[Trained, int, Best]:
    """The states of policy and critic to go on from, how many iterations they have behind them, and the best evaluation."""
    policy, critic = describe_states(prepared)
    wanted = PPOState(**vars(policy) | {"policy_steps": policy.step, "critic": critic})
    if restored := saved.restore_newest(wanted):
        state, metadata = restored
        say(f"resumed at iteration {int(state.step)} from {saved.folder}")
        fields = {name: getattr(state, name) for name in vars(policy)} | {"step": state.policy_steps}
        return Trained(TrainState(**fields), state.critic), int(state.step), Best(**metadata["best"] or {})
    actors, mesh, seed = prepared.actors, prepared.mesh, prepared.config.seed
    states = []
    for abstract, model, optimizer in (
        (policy, first_policy(actors, mesh, seed), prepared.policy_optimizer),
        (critic, first_critic(actors, mesh, seed), prepared.critic_optimizer),
    ):
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        adopt = jax.jit(partial(steps.new_state, optimizer=optimizer), out_shardings=layout, donate_argnums=0)
        states.append(adopt(model))
    return Trained(*states), 0, Best()


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
    config, mesh = prepared.config, prepared.mesh
    trained, start, best = begin(prepared, saved)
    frozen = read_frozen(prepared.actors, mesh)
    programs = Programs(mesh, prepared.part, config.temperature, config.compute)
    whole_policy = assemble_policy(prepared.actors, trained.policy.model, frozen.reference)
    gather = make_gather(whole_policy, config.compute.dtype)
    parts = Parts(frozen, programs, gather, score, policy_step, critic_step)
    if not start and prepared.actors.judge:
        trained = standardise_critic(prepared, parts, trained)
    log, began = MetricsLog(Path(config.out), start or -1), time.monotonic()

    def save(into: Checkpoints, done: int) -> None:
        into.wait()
        if done in into.steps():  # before a stop; it is the same
            return
        policy = trained.policy
        counted = {name: getattr(policy, name) for name in vars(policy)} | {"policy_steps": policy.step}
        everywhere = NamedSharding(mesh, PartitionSpec())
        counted["step"] = jax.device_put(np.int32(done), everywhere)
        own = {"model": dataclasses.asdict(prepared.actors.config), "recipe": recipe}
        own["best"] = best._asdict() if best.iteration >= 0 else None
        if config.train == "lora":
            base = str(prepared.actors.checkpoint.resolve())
            own["adapters"] = {"lora": dataclasses.asdict(config.lora), "base": base}
        into.save(PPOState(**counted, critic=trained.critic), own | {"cursor": {"iteration": done}}, prepared.tokenizer)

    def evaluate(done: int) -> None:
        nonlocal best
        values, page = evaluation(prepared, parts, trained)
        log.write(done, values)
        if jax.process_index() == 0:
            write_whole(Path(config.out) / "samples" / f"{done:06}.md", page.encode())
        say(f"iteration {done} held out: " + " ".join(f"{name[5:]} {value:.4g}" for name, value in values.items()))
        if values["eval/reward"] > best.reward:
            best = Best(done, values["eval/reward"])
            save(best_saved, done)

    try:
        with StopSignal() as stop:
            if not start and config.loop.eval_every and prepared.held_out:
                evaluate(0)
            for iteration in range(start, config.iterations):
                if is_over(config, best, iteration):
                    break
                profile(config.loop, Path(config.out), iteration - start)
                prompts = batch_of(prepared.prompts, config.batch, iteration, config.seed)
                clock = [time.monotonic()]
                drawn = draw(prepared, parts, trained, prompts, iteration + 1)
                clock.append(time.monotonic())
                # Nothing of this iteration has been trained on yet: what is saved here, is done anew.
                if name := stop.received(2 * iteration):
                    if iteration > start:
                        save(saved, iteration)
                    raise Preempted(f"{name} received: iteration {iteration} is saved; start it again to go on")
                try:
                    experience, values = experienced(prepared, parts, trained, prompts, drawn)
                except UserError:
                    if iteration > start:
                        save(saved, iteration)
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
                    save(saved, done)
                if name and not ended:
                    raise Preempted(f"{name} received: iteration {done} is saved; start it again to go on")
    finally:
        log.close()
    if best.iteration >= 0:
        say(
            f"held-out prompts gained most at iteration {best.iteration}: reward {best.reward:.4g}, in {config.out}/best"
        )
    say(f"done: {config.out}; try: llama-jax chat {config.out}{' --plain' * config.plain}")


def standardise_critic(prepared: Run, parts: Parts, trained: Trained) -> Trained:
    """The critic, which begins as a reward model, in the units of what it is to foresee: whitened rewards.

    Our choice: else its first values are the rewards' logits, and the first advantages nothing but that difference.
    """
    config, (policy, critic) = prepared.config, trained
    prompts = batch_of(prepared.prompts, config.batch, 0, config.seed)
    drawn = draw(prepared, parts, trained, prompts, 1)
    answers = make_answers([prompt.ids for prompt in prompts], [one.ids for one in drawn], prepared.length)
    whole = assemble_critic(prepared.actors, critic.model, parts.frozen.trunk)
    scores_B = parts.programs.values(whole, answers)[np.arange(config.batch), answers.last_B]
    layout = jax.tree.map(lambda leaf: leaf.sharding, critic.model)
    std = max(float(scores_B.std(ddof=1)), 1e-3) if config.batch > 1 else 1.0
    model = jax.jit(standardised, out_shardings=layout)(critic.model, float(scores_B.mean()), std)
    return Trained(policy, critic.replace(model=model))


def is_over(config: PPOConfig, best: Best, done: int) -> bool:
    """Whether held-out prompts have not gained for too long."""
    return bool(config.patience and config.loop.eval_every and best.iteration >= 0) and (
        done - best.iteration >= config.patience * config.loop.eval_every
    )


def draw(prepared: Run, parts: Parts, trained: Trained, prompts: Sequence[Prompt], number: int) -> list[Rollout]:
    """An answer to each prompt, from weights that are gathered once for all of them (paper 3.2.3).

    `number` tells the answers of an iteration from those of another: 0 is for the held-out prompts.
    """
    config = prepared.config
    model = assemble_policy(prepared.actors, trained.policy.model, parts.frozen.reference)
    return sample_rollouts(
        Llama(parts.gather(model), prepared.tokenizer, config.compute.dtype),
        [prompt.ids for prompt in prompts],
        seeds=np.random.SeedSequence([config.seed, number]).generate_state(len(prompts)).tolist(),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        rows=config.rows,
        slots=prepared.length,
    )


def judge(
    prepared: Run, parts: Parts, prompts: Sequence[Prompt], drawn: Sequence[Rollout], answers: Answers
) -> Rewards:
    """The rewards of the reward models, or of the function. Raises UserError as `finite_scores`."""
    if parts.score is not None:
        texts = [spoken_text(prepared.tokenizer, prepared.template, one.ids, one.ended) for one in drawn]
        return of_function(finite_scores(parts.score, [prompt.dialogue for prompt in prompts], texts))
    models = (parts.frozen.safety, parts.frozen.helpfulness)
    scores = [None if model is None else parts.programs.scores(model, answers) for model in models]
    return combine(*scores, np.array([bool(prompt.category) for prompt in prompts]), prepared.config.threshold)


def experienced(
    prepared: Run, parts: Parts, trained: Trained, prompts: Sequence[Prompt], drawn: Sequence[Rollout]
) -> tuple[Experience, dict[str, float]]:
    """What is trained on, all of it found before the first step of the iteration, and its numbers for the log."""
    config, actors, frozen, programs = prepared.config, prepared.actors, parts.frozen, parts.programs
    answers = make_answers([prompt.ids for prompt in prompts], [one.ids for one in drawn], prepared.length)
    rewards = judge(prepared, parts, prompts, drawn, answers)
    is_cut_B = np.array([not one.ended for one in drawn])
    log_probs_BT, _ = programs.log_probs(assemble_policy(actors, trained.policy.model, frozen.reference), answers)
    reference_BT, _ = programs.log_probs(frozen.reference, answers)
    values_BT = programs.values(assemble_critic(actors, trained.critic.model, frozen.trunk), answers)
    experience, kl_BT = make_experience(
        answers,
        rewards.whitened_B - config.cut_penalty * is_cut_B.astype(np.float32),
        log_probs_BT,
        reference_BT,
        values_BT,
        beta=config.beta,
        gamma=config.gamma,
        lam=config.lam,
    )
    mask_BT, sampled_BT = answers.answer_mask_BT, np.zeros_like(log_probs_BT)
    sampled_BT[mask_BT] = np.concatenate([one.log_probs for one in drawn])
    return experience, {
        **reward_numbers(rewards),
        "kl/token": float(kl_BT[mask_BT].mean()),
        "kl/sequence": float(kl_BT.sum(1).mean()),
        "answers/length": float(mask_BT.sum(1).mean()),
        "answers/cut": float(is_cut_B.mean()),
        "sampler/largest_difference": float(np.abs(sampled_BT - log_probs_BT)[mask_BT].max()),
    }


def reward_numbers(rewards: Rewards) -> dict[str, float]:
    """Means of the reward and of each model's, and the share that each decided."""
    found = {"reward/mean": rewards.reward_B.mean(), "reward/std": rewards.reward_B.std()}
    if rewards.safety_B is not None:
        found |= {"reward/safety": rewards.safety_B.mean(), "reward/by_safety": rewards.by_safety_B.mean()}
    if rewards.helpfulness_B is not None:
        by_helpfulness = 1 - rewards.by_safety_B.mean()
        found |= {"reward/helpfulness": rewards.helpfulness_B.mean(), "reward/by_helpfulness": by_helpfulness}
    return {name: float(value) for name, value in found.items()}


def update(
    prepared: Run, parts: Parts, trained: Trained, experience: Experience, iteration: int
) -> tuple[Trained, dict[str, float]]:
    """One step of policy and critic on each mini-batch of the experience, in an order of the iteration's own.

    Raises:
      Diverged: loss or gradient was not finite three times in a row.
    """
    config, mesh = prepared.config, prepared.mesh
    policy, critic = trained
    under = parts.frozen.reference if config.train == "lora" else None
    order = np.random.default_rng([config.seed, 3, iteration]).permutation(config.batch)
    own = batch_rows_of_process(mesh, config.mini_batch)
    of_policy: list[StepMetrics] = []
    of_critic: list[StepMetrics] = []
    for numbers in order.reshape(-1, config.mini_batch):
        whole = mini_batch_of(experience, numbers, config.mini_batch, config.micro_batches)
        batch = to_devices(mesh, Experience(*(array[own] for array in whole)), config.mini_batch)
        if iteration >= config.critic_warmup:
            policy, metrics = parts.policy_step(policy, batch, under)
            of_policy.append(metrics)
        critic, metrics = parts.critic_step(critic, batch, parts.frozen.trunk)
        of_critic.append(metrics)
    of_policy, of_critic = ([jax.tree.map(np.asarray, m) for m in column] for column in (of_policy, of_critic))
    for name, metrics in (("policy", of_policy), ("critic", of_critic)):
        if any(m.skipped_in_row >= MAX_SKIPPED_IN_ROW for m in metrics):
            raise Diverged(
                f"the {name}'s loss or gradient was not finite in {MAX_SKIPPED_IN_ROW} steps in a row, in iteration "
                f"{iteration + 1}. Lower its learning rate, then start the same command again from the last checkpoint"
            )

    def mean(metrics: list[StepMetrics], name: str) -> float:
        return float(np.mean([getattr(m, name) for m in metrics]))

    found = {
        "critic/loss": mean(of_critic, "loss"),
        "critic/grad_norm": mean(of_critic, "grad_norm"),
        "critic/explained_variance": explained_variance([m.extras for m in of_critic]),
        "critic/skipped": float(of_critic[-1].skipped),
    }
    if of_policy:
        found |= {f"policy/{name}": value for name, value in policy_metrics([m.extras for m in of_policy]).items()}
        found |= {f"policy/{name}": mean(of_policy, name) for name in ("loss", "grad_norm")}
        found["policy/skipped"] = float(of_policy[-1].skipped)
    return Trained(policy, critic), found


def evaluation(prepared: Run, parts: Parts, trained: Trained) -> tuple[dict[str, float], str]:
    """Scores of the answers to the held-out prompts, always drawn with the same keys, and a page with some of these."""
    drawn = draw(prepared, parts, trained, prepared.held_out, 0)
    answers = make_answers([prompt.ids for prompt in prepared.held_out], [one.ids for one in drawn], prepared.length)
    rewards = judge(prepared, parts, prepared.held_out, drawn, answers)
    texts = [spoken_text(prepared.tokenizer, prepared.template, one.ids, one.ended) for one in drawn]
    page = "".join(
        f"reward {reward:.4g}{f', {prompt.category}' * bool(prompt.category)}\n\n"
        + "".join(f"> {message.role}: {message.content}\n\n" for message in prompt.dialogue)
        + f"{text}\n\n---\n\n"
        for prompt, text, reward in list(zip(prepared.held_out, texts, rewards.reward_B, strict=True))[:10]
    )
    numbers = {name.replace("reward/mean", "reward/reward"): value for name, value in reward_numbers(rewards).items()}
    return {
        **{name.replace("reward/", "eval/"): value for name, value in numbers.items()},
        "eval/length": float(answers.answer_mask_BT.sum(1).mean()),
        "eval/cut": float(np.mean([not one.ended for one in drawn])),
    }, page


def times(clock: Sequence[float], tokens: int, samples: int) -> dict[str, float]:
    """Shares and speeds of drawing, judging (old probabilities and values with it) and training."""
    parts = dict(zip(("generate", "judge", "train"), np.diff(clock), strict=True))
    whole = max(sum(parts.values()), 1e-9)
    return {
        **{f"time/{name}": float(seconds / whole) for name, seconds in parts.items()},
        "time/seconds": float(whole),
        "speed/generate_tokens_per_s": tokens / max(float(parts["generate"]), 1e-9),
        "speed/train_tokens_per_s": tokens / max(float(parts["train"]), 1e-9),
        "speed/samples_per_s": samples / whole,
    }


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
    trained = f"adapters of rank {config.lora.rank}" if actors.lora else "every weight"
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
