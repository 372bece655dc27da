"""RLHF in versions (paper 3.2): V1 to V4 by rejection sampling and fine-tuning, V5 with PPO on top of that (3.2.3).

A version trains reward models on all preferences known by then, lets the newest model answer, keeps the best answers and
fine-tunes on them. Through V3 these are the version's own samples; the paper's V3 had forgotten what V2 could do, so that
afterwards those of all versions compete. Two reward models judge together by the paper's piecewise rule, one alone always.

Our choices, where the paper is silent or ambiguous: fine-tuning begins with the same checkpoint in every version (`start`);
reward models begin with the newest chat model; the piecewise rule judges in rejection sampling as it does in PPO.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.dialogues import open_rows
from llama_jax.data.prompt_order import Prompt, encode_fitting, hold_out
from llama_jax.data.prompts import PromptsConfig, read_prompts
from llama_jax.data.samples import as_line
from llama_jax.errors import UserError
from llama_jax.generation.answer_scores import find_judge
from llama_jax.generation.held_out_answers import ANSWERS, Judges, answer_held_out, compare, read_answers
from llama_jax.generation.llama import Llama
from llama_jax.generation.rewards import make_score
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import ppo, rejection, reward, sft
from llama_jax.stages.ppo import PPOConfig
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.text.chat import Dialogue, Llama2Chat, Plain, Template
from llama_jax.training.metrics import say
from llama_jax.training.preemption import stopping_at_once
from llama_jax.training.run_folder import digest_of, find_recipe, make_folder, without, write_recipe, write_whole

PROMPTS, HELD_OUT, SCORES = "prompts.jsonl", "held_out.jsonl", "scores.json"
COLLECTED = ("preferences.jsonl", "safety_preferences.jsonl")


@dataclass(frozen=True)
class RLHFConfig:
    """Some versions of RLHF, one from another."""

    checkpoint: str = ""
    """The fine-tuned chat model to begin with, of any form."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    """The prompts, of which some are held out; a row's category marks it as adversarial."""
    preferences: tuple[str, ...] = ()
    """Pairs for the helpfulness model, a source for each version: V2 has the first two. Behind the last there are no more."""
    safety_preferences: tuple[str, ...] = ()
    """Pairs for the safety model, likewise; without any, the helpfulness model judges everything."""
    mixes: tuple[float, float] = (0.5, 0.9)
    """Share of its own pairs in the training of the helpfulness model and of the safety model, the rest is the other's; an
    epoch ends where either would have to repeat itself.
    """
    versions: int = 5
    """How many; may be raised later."""
    ppo_from: int = 5
    """The first version with PPO on top."""
    pool_from: int = 4
    """The first version in which the samples of all earlier ones compete too."""
    start: Literal["checkpoint", "previous"] = "checkpoint"
    """What fine-tuning begins with: `checkpoint` in every version, or the version before."""
    # Our choice: the auxiliary loss has the weight of the ranking loss.
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(safety_weight=1.0))
    """How reward models are trained; the loss on safety labels is the safety model's alone."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    """How answers are drawn, those to held-out prompts too."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """How the best answers are trained on."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO, of which the threshold of the piecewise rule holds in all versions."""
    eval_prompts: int = 500
    """Prompts that are held out, to score every version by."""
    eval_temperature: float = 1.0
    """Divides the logits where these are answered; 0 takes the likeliest token."""
    plain: bool = False
    """Prompt and answer as plain text, instead of Llama 2's chat format."""
    seed: int = 0
    """Of everything that is drawn."""
    out: str = "runs/rlhf"
    """The folder of all versions: v1, v2, ..."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with what the folder holds: if it holds something; never (refuses such a folder); or fail without it."""
    dry_run: bool = False
    """Print the plan of all versions, and touch nothing."""


# What a version gives its stages itself; in the recipe of a stage it must stay as it is.
_GIVEN = ("checkpoint", "plain", "seed", "out", "resume", "dry_run")
GIVEN = {
    "reward": (*_GIVEN, "json", "data.sources", "data.weights"),
    "rejection": (*_GIVEN, "data", "reward", "pool"),
    "sft": (*_GIVEN, "json", "data.sources", "data.weights", "data.answers"),
    "ppo": (*_GIVEN, "json", "data", "helpfulness", "safety", "function"),
}
# Prompts are compared by what they turned out to be, and everything that a version depends on in its own recipe.
FREE_TO_CHANGE = (
    *("data", "preferences", "safety_preferences", "mixes", "versions", "ppo_from", "pool_from", "start"),
    *("reward", "rejection", "sft", "ppo", "out", "resume", "dry_run"),
)


class Collected(NamedTuple):
    """Preferences on answers of the newest model, as rows of any shape that the reward stage reads."""

    helpfulness: Sequence[dict[str, Any]]
    safety: Sequence[dict[str, Any]] = ()


Annotate = Callable[[int, Llama], Collected]
"""Collects preferences for a version, from answers that it lets the newest model give."""
Evaluate = Callable[[Llama], dict[str, float]]
"""Scores a model by what it knows itself: by the right answers, for example."""


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


def run(
    config: RLHFConfig,
    *,
    annotate: Annotate | None = None,
    evaluate: Evaluate | None = None,
    report: Callable[[Path], Any] | None = None,
) -> None:
    """Makes all versions in `config.out`, going on where an earlier run stopped.

    Args:
      config: of the run.
      annotate: collects preferences at the beginning of each version, beside those of the sources.
      evaluate: scores each version's model, beside the reward models.
      report: called with the folder after every version.

    Raises:
      UserError: checkpoint, data, the stages' settings or what is found in the folder do not fit.
      Diverged: a training did.
      Preempted: told to stop; what was done is gone on with.
    """
    prepared = prepare(config, annotate is not None)
    if config.dry_run:
        show(prepared)
        return
    folder = Path(config.out)
    found = find_recipe(folder, "rlhf", config.resume)
    make_folder(folder)
    write_recipe(folder, "rlhf", config, recipe_of(prepared), found)
    write_whole(folder / PROMPTS, "".join(map(as_line, map(_row, prepared.prompts))).encode())
    write_whole(folder / HELD_OUT, "".join(map(as_line, map(_row, prepared.held_out))).encode())
    for number in range(config.versions + 1):
        with stopping_at_once():
            make_version(prepared, number, annotate, evaluate)
        if report is not None:
            report(folder)
    say(f"done: {folder}; try: llama-jax chat {plan(config, config.versions).model}{' --plain' * config.plain}")


def prepare(config: RLHFConfig, has_annotate: bool = False) -> Prepared:
    """Reads the prompts, and opens the checkpoint without reading its weights.

    Raises:
      UserError: they do not fit each other or the settings.
    """
    _check(config, has_annotate)
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    template: Template = Plain() if config.plain else Llama2Chat()
    dialogues, found = read_prompts(config.data, template)
    # PPO, whose limit is its own, leaves out what has no room for that.
    room = config.rejection.max_new_tokens
    prompts, left_out = encode_fitting(dialogues, tokenizer, template, model.context_length, room)
    say("\n".join(filter(None, (found, left_out))))
    return Prepared(config, checkpoint, template, *hold_out(prompts, config.eval_prompts, config.seed))


def _check(config: RLHFConfig, has_annotate: bool) -> None:
    """Raises UserError for settings that cannot be."""
    if not config.checkpoint:
        raise UserError(
            "name the model to begin with: llama-jax rlhf CHECKPOINT --data FILE.jsonl --preferences PAIRS.jsonl"
        )
    if not config.data.sources:
        raise UserError("No prompts. Set --data.sources to a .jsonl file of dialogues, hf:NAME or tfds:NAME.")
    if not config.preferences and not has_annotate:
        raise UserError(
            "No preferences. Set --preferences to a .jsonl file of pairs for each version, hf:NAME or tfds:NAME."
        )
    for name in ("versions", "ppo_from", "pool_from", "eval_prompts"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be 1 or more")
    if not all(0 < share < 1 for share in config.mixes):
        raise UserError(f"--mixes is {config.mixes}; expected two shares between 0 and 1, such as 0.5 0.9")
    if not 0 <= config.eval_temperature < float("inf"):
        raise UserError(f"--eval-temperature is {config.eval_temperature}; it must be 0 or more")
    default = asdict(RLHFConfig())
    for stage, names in GIVEN.items():
        for name in names:
            if _at(asdict(getattr(config, stage)), name) != _at(default[stage], name):
                raise UserError(
                    f"--{stage}.{name.replace('_', '-')} is given by each version to its stages; leave it out (what it can "
                    "be told stands without a stage's name in llama-jax rlhf --help)"
                )
    last = plan(config, config.versions)
    # Now, and not after days.
    in_stage("rejection", lambda: rejection.check(last.rejection, has_score=True))
    if last.ppo is not None:
        in_stage("ppo", lambda: ppo.check(last.ppo, has_score=False))


def in_stage(name: str, run: Callable[[], None]) -> None:
    """Runs what is a stage's, and says of its complaints how its settings are given here."""
    try:
        run()
    except UserError as error:
        raise UserError(f"{error}\n(a setting of this stage has --{name}. before its name)") from error


def plan(config: RLHFConfig, number: int) -> Version:
    """What a version runs, on the preferences that are known by then."""
    folder, start = f"{config.out}/v{number}", config.checkpoint
    teacher = plan(config, number - 1).model if number > 1 else config.checkpoint
    # Seeds of no two versions are the same, nor of one version under two seeds of less than a thousand versions.
    common = {"plain": config.plain, "seed": 1000 * config.seed + number}
    prompts = PromptsConfig(sources=(f"{config.out}/{PROMPTS}",), bad_rows=0.0)
    helpful, safe = preferences_of(config, number)

    def judge(name: str, sources: tuple[str, ...], safety_weight: float) -> RewardConfig:
        own = {"checkpoint": teacher, "safety_weight": safety_weight, "out": f"{folder}/{name}"}
        return replace(config.reward, data=replace(config.reward.data, sources=sources), **own, **common)

    judges = judge("helpfulness", helpful + safe, 0.0), None
    if safe:
        judges = judges[0], judge("safety", safe + helpful, config.reward.safety_weight)
    pool = (
        tuple(f"{config.out}/v{earlier}/reject" for earlier in range(1, number)) if number >= config.pool_from else ()
    )
    rejecting = replace(config.rejection, checkpoint=teacher, data=prompts, pool=pool, out=f"{folder}/reject", **common)
    if config.start == "previous":
        start = teacher
    best = replace(config.sft.data, sources=(f"{rejecting.out}/{rejection.DIALOGUES}",), answers="last")
    tuning = replace(config.sft, checkpoint=start, data=best, out=f"{folder}/sft", **common)
    optimising = None
    if number >= config.ppo_from:
        paths = {"helpfulness": judges[0].out, "safety": judges[1].out if judges[1] else ""}
        own = {"checkpoint": tuning.out, "data": prompts, "out": f"{folder}/ppo"}
        optimising = replace(config.ppo, **own, **paths, **common)
    return Version(number, folder, *judges, rejecting, tuning, optimising)


def preferences_of(config: RLHFConfig, number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources of helpfulness and of safety preferences that a version knows: what was collected for it too."""
    kinds = zip((config.preferences, config.safety_preferences), COLLECTED, strict=True)
    paths = [
        (sources[:number], [f"{config.out}/v{one}/{name}" for one in range(1, number + 1)]) for sources, name in kinds
    ]
    helpful, safe = ((*known, *filter(lambda path: Path(path).exists(), own)) for known, own in paths)
    return helpful, safe


def make_version(prepared: Prepared, number: int, annotate: Annotate | None, evaluate: Evaluate | None) -> None:
    """Makes what of a version is not there yet; 0 is the model that it all begins with."""
    config, folder = prepared.config, Path(prepared.config.out) / f"v{number}"
    folder.mkdir(exist_ok=True)
    if number and annotate is not None:
        collect(config, number, annotate)
    version = plan(config, number) if number else None
    if version:
        found = find_recipe(folder, "rlhf version", "auto")
        write_recipe(folder, "rlhf version", version, recipe_of_version(config, version), found)
    if (folder / SCORES).exists():
        return
    for name, what, stage in stages_of(prepared, version) if version else ():
        # A stage that was stopped goes on by itself; one that was finished would be opened in vain.
        if not (folder / f"{name}.done").exists():
            say(f"--- version {number} of {config.versions}: {what} ({folder / name})")
            in_stage({"helpfulness": "reward", "safety": "reward", "reject": "rejection"}.get(name, name), stage)
            write_whole(folder / f"{name}.done", b"")
    score_version(prepared, number, version, evaluate)


def collect(config: RLHFConfig, number: int, annotate: Annotate) -> None:
    """Writes the preferences that are collected for a version with the newest model, unless they are there.

    Raises:
      UserError: there are none.
    """
    helpful, safe = (Path(config.out) / f"v{number}" / name for name in COLLECTED)
    if helpful.exists():
        return
    teacher = newest(config, number - 1)
    say(f"--- version {number} of {config.versions}: preferences on answers of {teacher} ({helpful})")
    found = annotate(number, load(config, teacher))
    if not found.helpfulness:
        raise UserError(
            f"no preferences on helpfulness were collected for version {number}; expected a row for each pair"
        )
    if found.safety:
        write_whole(safe, "".join(map(as_line, found.safety)).encode())
    write_whole(helpful, "".join(map(as_line, found.helpfulness)).encode())  # the last: it says that both are there


def stages_of(prepared: Prepared, version: Version) -> list[tuple[str, str, Callable[[], None]]]:
    """The folder, the name and the run of each stage of a version, in order."""
    config = prepared.config
    helpful, safe = preferences_of(config, version.number)

    def train_judge(judge: RewardConfig, own: Sequence[str], others: Sequence[str], share: float) -> None:
        reward.run(replace(judge, data=replace(judge.data, weights=mixed(own, others, share))))

    def help_judge() -> None:
        train_judge(version.helpfulness, helpful, safe, config.mixes[0])

    def safety_judge() -> None:
        train_judge(version.safety, safe, helpful, config.mixes[1])

    def reject() -> None:
        if version.safety is None:
            rejection.run(replace(version.rejection, reward=version.helpfulness.out))
            return
        for judge in (version.helpfulness, version.safety):
            find_judge(judge.out, prepared.template)  # says what speaks against it
        rejection.run(version.rejection, score=make_judges(prepared, version))

    stages = [("helpfulness", "reward model of helpful answers", help_judge)]
    if version.safety is not None:
        stages.append(("safety", "reward model of safe answers", safety_judge))
    stages.append(("reject", f"rejection sampling from {version.teacher}", reject))
    stages.append(("sft", f"fine-tuning from {version.sft.checkpoint}", lambda: sft.run(version.sft)))
    if version.ppo is not None:
        stages.append(("ppo", f"PPO from {version.ppo.checkpoint}", lambda: ppo.run(version.ppo)))
    return stages


def mixed(own: Sequence[str], others: Sequence[str], share: float) -> tuple[float, ...]:
    """The weight of each source, so that the own ones have this share of the pairs together, each as large as it is.

    None, which is every pair once, where there are no others.
    """
    if not others:
        return ()
    counts = [np.array([len(open_rows(source)) for source in sources]) for sources in (own, others)]
    shares = zip(counts, (share, 1 - share), strict=True)
    return tuple(float(weight) for sizes, part in shares for weight in part * sizes / sizes.sum())


def make_judges(prepared: Prepared, version: Version) -> Judges:
    """Reads the reward models of a version."""
    config = prepared.config
    mesh = make_mesh(config.rejection.mesh) if config.rejection.mesh else None
    helpfulness = make_score(version.helpfulness.out, mesh)
    safety = make_score(version.safety.out, mesh) if version.safety else None
    return Judges(helpfulness, safety, prepared.categories, config.ppo.threshold)


def score_version(prepared: Prepared, number: int, version: Version | None, evaluate: Evaluate | None) -> None:
    """Lets a version's model answer the held-out prompts, and writes what its reward models think of the answers of this
    and all earlier versions.
    """
    config, folder = prepared.config, Path(prepared.config.out) / f"v{number}"
    model = newest(config, number)
    say(f"--- version {number} of {config.versions}: answers to held-out prompts ({folder / ANSWERS})")
    answer_held_out(
        lambda: load(config, model),
        prepared.held_out,
        prepared.template,
        folder,
        max_new_tokens=config.rejection.max_new_tokens,
        temperature=config.eval_temperature,
        batch=config.rejection.batch,
        seed=1000 * config.seed,
    )
    judged, measured = [], {}
    if version is not None:
        answers = [read_answers(Path(config.out) / f"v{one}") for one in range(number + 1)]
        judged = compare(make_judges(prepared, version), answers)
    if evaluate is not None:
        found = evaluate(load(config, model))
        measured = {name: float(value) if np.isfinite(value) else None for name, value in found.items()}
    scores = {"model": model, "judged": judged, "measured": measured}
    write_whole(folder / SCORES, json.dumps(scores, indent=2).encode())


def newest(config: RLHFConfig, number: int) -> str:
    """The model that a version leaves, or the one that it all begins with."""
    return plan(config, number).model if number else config.checkpoint


def load(config: RLHFConfig, model: str) -> Llama:
    """Reads a model as rejection sampling does."""
    return Llama.load(model, mesh=config.rejection.mesh or None, int8=config.rejection.int8)


def recipe_of(prepared: Prepared) -> dict[str, Any]:
    """What decides the results of all versions."""
    return without(prepared.config, FREE_TO_CHANGE) | {
        "checkpoint": str(prepared.checkpoint.resolve()),
        "prompts": digest_of([_row(prompt) for prompt in prepared.prompts]),
        "held_out": digest_of([_row(prompt) for prompt in prepared.held_out]),
    }


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
        "ppo": version.ppo and without(version.ppo, ppo.FREE_TO_CHANGE),
    }


def show(prepared: Prepared) -> None:
    """Prints a dry run: what was found, and what each version will run."""
    config = prepared.config
    asked, held_out = prepared.prompts, prepared.held_out
    adversarial = sum(bool(prompt.category) for prompt in asked)
    print(f"checkpoint   {prepared.checkpoint}")
    print(
        f"prompts      {', '.join(config.data.sources)}: {len(asked)}, {adversarial} of them adversarial; {len(held_out)} held out"
    )
    for number in range(1, config.versions + 1):
        version = plan(config, number)
        helpful, safe = preferences_of(config, number)
        print(f"--- version {number}, in {version.folder}")
        print(f"helpfulness  from {version.teacher}, on {', '.join(helpful) or 'what is collected'}")
        if version.safety:
            print(f"safety       from {version.teacher}, on {', '.join(safe)}")
        pool = f", beside those of versions 1 to {number - 1}" if version.rejection.pool else ""
        drawn = config.rejection.samples * len(config.rejection.temperatures)
        print(f"reject       {drawn} answers to each prompt from {version.teacher}{pool}")
        print(f"sft          from {version.sft.checkpoint}, {config.sft.epochs} epochs")
        if version.ppo:
            print(f"ppo          from {version.ppo.checkpoint}, {config.ppo.iterations} iterations")


def _row(prompt: Prompt) -> dict[str, Any]:
    return {"messages": [message._asdict() for message in prompt.dialogue], "risk": prompt.category}


def _at(value: Any, name: str) -> Any:
    """What stands in nested dictionaries under a dotted name."""
    for part in name.split("."):
        value = value[part]
    return value
