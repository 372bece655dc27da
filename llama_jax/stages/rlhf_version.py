"""A version of RLHF (paper 3.2.2, 3.2.3): reward models, rejection sampling, fine-tuning and PPO, and what each is given.

Two reward models judge together by the paper's piecewise rule, one alone always.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.dialogues import open_rows
from llama_jax.data.prompt_order import Prompt
from llama_jax.data.prompts import PromptsConfig
from llama_jax.errors import UserError
from llama_jax.generation.answer_scores import find_judge
from llama_jax.generation.held_out_answers import Judges
from llama_jax.generation.rewards import make_score
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import ppo, ppo_config, rejection, reward, sft
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.text.chat import Dialogue, Template
from llama_jax.training.run_folder import without

PROMPTS = "prompts.jsonl"  # in the folder of all versions
COLLECTED = ("preferences.jsonl", "safety_preferences.jsonl")  # in a version's own


@dataclass(frozen=True)
class Prepared:
    """A configuration with what its checkpoint and its prompts turned out to be."""

    config: RLHFConfig
    checkpoint: Path
    template: Template
    prompts: list[Prompt]
    held_out: list[Prompt]

    @property
    def categories(self) -> dict[Dialogue, str]:
        """The risk category of each prompt; empty where it is not adversarial."""
        return {prompt.dialogue: prompt.category for prompt in (*self.prompts, *self.held_out)}


@dataclass(frozen=True)
class Version:
    """What a version runs, in this order."""

    number: int
    folder: str
    helpfulness: RewardConfig
    safety: RewardConfig | None
    rejection: RejectionConfig
    sft: SFTConfig
    ppo: PPOConfig | None

    @property
    def teacher(self) -> str:
        """The newest model before it, which answers."""
        return self.rejection.checkpoint

    @property
    def model(self) -> str:
        """The model that it leaves: of PPO that which held-out prompts liked best, where they were asked."""
        if self.ppo is None:
            return self.sft.out
        return f"{self.ppo.out}/best" if self.ppo.eval_prompts and self.ppo.loop.eval_every else self.ppo.out


class Stage(NamedTuple):
    """A step of a version."""

    folder: str
    """Where in the version's folder it works."""
    settings: str
    """The field of `RLHFConfig` that holds its settings."""
    what: str
    """What it is, for people."""
    run: Callable[[], None]


def plan(config: RLHFConfig, number: int) -> Version:
    """What a version runs, on the preferences that are known by then."""
    folder, teacher = f"{config.out}/v{number}", newest(config, number - 1)
    # Seeds of no two versions are the same, nor of one version under two seeds of less than a thousand versions.
    common = {"plain": config.plain, "seed": 1000 * config.seed + number}
    prompts = PromptsConfig(sources=(f"{config.out}/{PROMPTS}",), bad_rows=0.0)
    helpful, safe = preferences_of(config, number)

    def judge(name: str, sources: tuple[str, ...], safety_weight: float) -> RewardConfig:
        own = {"checkpoint": teacher, "safety_weight": safety_weight, "out": f"{folder}/{name}"}
        return replace(config.reward, data=replace(config.reward.data, sources=sources), **own, **common)

    helpfulness = judge("helpfulness", helpful + safe, 0.0)
    safety = judge("safety", safe + helpful, config.reward.safety_weight) if safe else None

    earlier = range(1, number) if number >= config.pool_from else ()
    pool = tuple(f"{config.out}/v{one}/reject" for one in earlier)
    rejecting = replace(config.rejection, checkpoint=teacher, data=prompts, pool=pool, out=f"{folder}/reject", **common)

    start = teacher if config.start == "previous" else config.checkpoint
    best = replace(config.sft.data, sources=(f"{rejecting.out}/{rejection.DIALOGUES}",), answers="last")
    tuning = replace(config.sft, checkpoint=start, data=best, out=f"{folder}/sft", **common)

    optimising = None
    if number >= config.ppo_from:
        paths = {"helpfulness": helpfulness.out, "safety": safety.out if safety else ""}
        own = {"checkpoint": tuning.out, "data": prompts, "out": f"{folder}/ppo"}
        optimising = replace(config.ppo, **own, **paths, **common)
    return Version(number, folder, helpfulness, safety, rejecting, tuning, optimising)


def newest(config: RLHFConfig, number: int) -> str:
    """The model that a version leaves; of 0 the one that it all begins with."""
    return plan(config, number).model if number else config.checkpoint


def preferences_of(config: RLHFConfig, number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources of helpfulness and of safety preferences that a version knows: what was collected for it too."""
    kinds = zip((config.preferences, config.safety_preferences), COLLECTED, strict=True)
    paths = [
        (sources[:number], [f"{config.out}/v{one}/{name}" for one in range(1, number + 1)]) for sources, name in kinds
    ]
    helpful, safe = ((*known, *filter(lambda path: Path(path).exists(), own)) for known, own in paths)
    return helpful, safe


def check_stages(config: RLHFConfig) -> None:
    """Raises UserError for what the stages of the last version would refuse: now, and not after days."""
    last = plan(config, config.versions)
    in_stage("rejection", lambda: rejection.check(last.rejection, has_score=True))
    if last.ppo is not None:
        in_stage("ppo", lambda: ppo_config.check(last.ppo, has_score=False))


def in_stage(settings: str, run: Callable[[], None]) -> None:
    """Runs what is a stage's, and says of its complaints how its settings are given here."""
    try:
        run()
    except UserError as error:
        raise UserError(f"{error}\n(a setting of this stage has --{settings}. before its name)") from error


def stages_of(prepared: Prepared, version: Version) -> list[Stage]:
    """What a version does, in order."""
    config = prepared.config
    helpful, safe = preferences_of(config, version.number)
    judge = partial(train_judge, version.helpfulness, helpful, safe, config.mixes[0])
    stages = [Stage("helpfulness", "reward", "reward model of helpful answers", judge)]
    if version.safety is not None:
        judge = partial(train_judge, version.safety, safe, helpful, config.mixes[1])
        stages.append(Stage("safety", "reward", "reward model of safe answers", judge))
    asked, start = f"rejection sampling from {version.teacher}", f"fine-tuning from {version.sft.checkpoint}"
    stages.append(Stage("reject", "rejection", asked, partial(reject, prepared, version)))
    stages.append(Stage("sft", "sft", start, partial(sft.run, version.sft)))
    if version.ppo is not None:
        stages.append(Stage("ppo", "ppo", f"PPO from {version.ppo.checkpoint}", partial(ppo.run, version.ppo)))
    return stages


def train_judge(judge: RewardConfig, own: Sequence[str], others: Sequence[str], share: float) -> None:
    """Trains a reward model on its own pairs and the other one's, mixed."""
    reward.run(replace(judge, data=replace(judge.data, weights=mixed(own, others, share))))


def mixed(own: Sequence[str], others: Sequence[str], share: float) -> tuple[float, ...]:
    """The weight of each source, so that the own ones have this share of the pairs together, each as large as it is.

    None, which is every pair once, where there are no others.
    """
    if not others:
        return ()
    counts = [np.array([len(open_rows(source)) for source in sources]) for sources in (own, others)]
    shares = zip(counts, (share, 1 - share), strict=True)
    return tuple(float(weight) for sizes, part in shares for weight in part * sizes / sizes.sum())


def reject(prepared: Prepared, version: Version) -> None:
    """Keeps the best of the newest model's answers, by the version's reward models."""
    if version.safety is None:
        rejection.run(replace(version.rejection, reward=version.helpfulness.out))
        return
    for judge in (version.helpfulness, version.safety):
        find_judge(judge.out, prepared.template)  # says what speaks against it
    rejection.run(version.rejection, score=make_judges(prepared, version))


def make_judges(prepared: Prepared, version: Version) -> Judges:
    """Reads the reward models of a version."""
    config = prepared.config
    mesh = make_mesh(config.rejection.mesh) if config.rejection.mesh else None
    helpfulness = make_score(version.helpfulness.out, mesh)
    safety = make_score(version.safety.out, mesh) if version.safety else None
    return Judges(helpfulness, safety, prepared.categories, config.ppo.threshold)


def recipe_of_version(config: RLHFConfig, version: Version) -> dict[str, Any]:
    """What decides the results of one version, beside those of the versions before it."""
    judges = {name: getattr(version, name) for name in ("helpfulness", "safety")}
    rejecting = (*rejection.FREE_TO_CHANGE, "checkpoint", "reward")
    return {
        "preferences": config.preferences[: version.number],
        "safety_preferences": config.safety_preferences[: version.number],
        "mixes": config.mixes,
        "start": config.start,
        "pool": len(version.rejection.pool),
        **{name: judge and without(judge, reward.FREE_TO_CHANGE) for name, judge in judges.items()},
        "reject": without(version.rejection, rejecting),
        "sft": without(version.sft, sft.FREE_TO_CHANGE),
        "ppo": version.ppo and without(version.ppo, ppo_config.FREE_TO_CHANGE),
    }
