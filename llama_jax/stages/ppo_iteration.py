"""One iteration of PPO (paper 3.2.3): draw, judge, train; and what it is told by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from optax import GradientTransformation

from llama_jax.data.prompt_order import Prompt, batch_of
from llama_jax.errors import Diverged
from llama_jax.generation.answer_scores import Score, finite_scores
from llama_jax.generation.llama import Llama
from llama_jax.generation.ppo_models import Actors, Frozen, assemble_critic, assemble_policy
from llama_jax.generation.rollouts import Rollout, sample_rollouts
from llama_jax.generation.session import spoken_text
from llama_jax.model.heads import standardised
from llama_jax.parallel.mesh import batch_rows_of_process
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.text.chat import Template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.batches import to_devices
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
from llama_jax.training.loop import MAX_SKIPPED_IN_ROW
from llama_jax.training.ppo_loss import Experience, explained_variance, policy_metrics
from llama_jax.training.step import StepMetrics, TrainState


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
    under = parts.frozen.reference if config.adapters else None
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
