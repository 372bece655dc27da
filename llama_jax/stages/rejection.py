"""Rejection sampling (paper 3.2.3): K answers to each prompt, of which the one that a reward model scores best is trained on.

Every sample is kept with its score; the training is that of the sft stage (`llama-jax sft --data.answers last`). The best
are those of this run, or of it and of earlier ones (`pool`): with those of the last iteration alone the paper's V3 forgot
what V2 could do.

Our choices, where the paper is silent: K is 10 unless set; nothing is cut from the distribution (top-p 1); samples of
several temperatures compete in one pool; those of earlier runs are scored anew, as scores of two reward models do not
compare; an answer that the length limit cut is judged like any other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.prompt_order import encode_fitting
from llama_jax.data.prompts import PromptsConfig, check_sources, read_prompts
from llama_jax.data.samples import SAMPLES, as_line, best_sample, read_pool, read_samples
from llama_jax.errors import UserError
from llama_jax.generation.answer_scores import Score, check_judge, find_judge, load_with_judge, score_answers
from llama_jax.generation.llama import Llama
from llama_jax.generation.parts import complete, make_parts, parts_of, remove_parts
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.text.chat import Dialogue, Llama2Chat, Plain, Template
from llama_jax.training.metrics import say
from llama_jax.training.run_config import check_counts
from llama_jax.training.run_folder import digest_of, find_recipe, make_folder, without, write_recipe, write_whole

DIALOGUES = "dialogues.jsonl"


@dataclass(frozen=True)
class RejectionConfig:
    """One round of rejection sampling."""

    checkpoint: str = ""
    """The model that answers, of any form."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    """The prompts."""
    reward: str = ""
    """The reward model that judges: a run of llama-jax reward."""
    samples: int = 10
    """K: answers drawn for each prompt, at each temperature."""
    temperatures: tuple[float, ...] = (1.0,)
    """Each divides the logits; the paper found 1.2 to 1.3 best for RLHF models at 10 to 100 samples, and it shifts."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this probability; 1 for all."""
    pool: tuple[str, ...] = ()
    """Folders of earlier runs, whose samples compete too; the paper did so after its V3."""
    plain: bool = False
    """Prompt and completion as plain text, instead of Llama 2's chat format."""
    max_new_tokens: int = 512
    """Of an answer."""
    batch: int = 64
    """Answers that are drawn side by side; what is done is saved after so many, or after those to one prompt."""
    int8: bool = False
    """Keep the weights of the model that answers in 8 bits."""
    mesh: str = ""
    """Devices to lie on, such as auto or tensor=4; one if empty."""
    seed: int = 0
    """Of the answers."""
    out: str = "runs/reject"
    """The run's folder; the best answers are its dialogues.jsonl, all are its samples.jsonl."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with what the folder holds: if it holds something; never (refuses such a folder); or fail without it."""
    dry_run: bool = False
    """Print what was found and three prompts, and touch nothing."""


# Data, pool and reward model are compared by what they turned out to be.
FREE_TO_CHANGE = ("data.sources", "data.category", "pool", "mesh", "out", "resume", "dry_run")


@dataclass(frozen=True)
class Prepared:
    """A configuration with what its checkpoint, its data and its pool turned out to be."""

    config: RejectionConfig
    checkpoint: Path
    reward: Path | None
    """None where a function judges."""
    prompts: list[Dialogue]
    """Those of the data, then those that only earlier runs have."""
    asked: int
    """How many of them are the data's."""
    earlier: dict[Dialogue, list[dict[str, Any]]]
    """The samples of earlier runs, by prompt."""
    template: Template

    @property
    def parts(self) -> list[range]:
        """The numbers of the prompts that are saved together."""
        return parts_of(len(self.prompts), self.config.samples, self.config.batch)


def run(config: RejectionConfig, *, score: Score | None = None) -> None:
    """Samples, judges and selects what `config` describes in `config.out`, going on where an earlier run of it stopped.

    Args:
      config: of the run.
      score: judges in place of the reward model, see `Score`; a program that knows the right answers, for example.

    Raises:
      UserError: checkpoint, data, pool, scores or what is found in the folder do not fit.
      Preempted: told to stop; what was saved is gone on with.
    """
    prepared = prepare(config, score is not None)
    if config.dry_run:
        show(prepared)
        return
    folder = Path(config.out)
    found = find_recipe(folder, "rejection", config.resume)
    make_folder(folder)
    write_recipe(folder, "rejection", config, recipe_of(prepared), found)
    if not (folder / DIALOGUES).exists():
        complete(folder, prepared.parts, SAMPLES, partial(sample, prepared, score))
        select(folder)
    remove_parts(folder, prepared.parts)
    say(
        f"done: {folder / DIALOGUES}; train on it: llama-jax sft {config.checkpoint} --data {folder / DIALOGUES} "
        f"--data.answers last{' --plain' * config.plain} --out {folder}-sft"
    )


def prepare(config: RejectionConfig, has_score: bool = False) -> Prepared:
    """Reads prompts and pool, and opens the checkpoints without reading their weights.

    Raises:
      UserError: they do not fit each other or the settings.
    """
    check(config, has_score)
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    template: Template = Plain() if config.plain else Llama2Chat()
    reward = None if has_score else find_judge(config.reward, template)
    prompts, found = read_prompts(config.data, template)
    fitting, left_out = encode_fitting(prompts, tokenizer, template, model.context_length, config.max_new_tokens)
    say("\n".join(filter(None, (found, left_out))))
    earlier = read_pool(config.pool, template)
    asked = dict.fromkeys(prompt.dialogue for prompt in fitting)
    return Prepared(config, checkpoint, reward, list(asked | earlier), len(asked), earlier, template)


def check(config: RejectionConfig, has_score: bool) -> None:
    """Raises UserError for settings that cannot be."""
    if not config.checkpoint:
        raise UserError(
            "name the model that answers: llama-jax reject CHECKPOINT --data FILE.jsonl --reward REWARD_RUN"
        )
    check_sources(config.data)
    check_judge(config.reward, has_score, "reward model")
    check_counts(config, "samples", "batch", "max_new_tokens")
    temperatures = config.temperatures
    if not temperatures or not all(0 < t < math.inf for t in temperatures) or len({*temperatures}) < len(temperatures):
        raise UserError(f"--temperatures is {temperatures}; expected different numbers above 0, such as 0.8 1.0 1.2")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p is {config.top_p}; it is a probability, above 0 and up to 1 (all tokens)")
    if Path(config.out).resolve() in [Path(folder).resolve() for folder in config.pool]:
        raise UserError(f"--pool names --out {config.out} itself; name the folders of earlier runs")


def sample(prepared: Prepared, score: Score | None, missing: Sequence[range]) -> None:
    """Reads the model that answers and what judges; samples, judges and saves these parts.

    Raises:
      UserError: scores that are none.
      Preempted: told to stop; the parts that are whole are saved.
    """
    config, drawn = prepared.config, prepared.config.samples * len(prepared.config.temperatures)
    llama, score = load_with_judge(prepared.checkpoint, prepared.reward, score, mesh=config.mesh, int8=config.int8)
    make_parts(
        config.out,
        missing,
        len(prepared.prompts),
        make=lambda part: judged(prepared, draw(prepared, llama, part), score),
        answers_in=lambda part: drawn * sum(number < prepared.asked for number in part),
    )


def draw(prepared: Prepared, llama: Llama, part: range) -> list[dict[str, Any]]:
    """A row for each prompt, its samples by temperature and then by number, not judged yet."""
    config = prepared.config
    rows = [{"prompt": prepared.prompts[number], "samples": []} for number in part]
    asked = [number for number in part if number < prepared.asked]
    # Of one size in every part, so that the last compiles nothing of its own.
    filled = asked + asked[:1] * (len(prepared.parts[0]) - len(asked)) if asked else []
    together = min(config.samples, config.batch)
    for temperature in config.temperatures:
        for first in range(0, config.samples, together):
            numbers = range(first, min(first + together, config.samples))
            replies = iter(
                reply_to(
                    llama,
                    [prepared.prompts[number] for number in filled],
                    prepared.template,
                    seeds=[seed_of(config.seed, number, k, _bits(temperature)) for number in filled for k in numbers],
                    max_new_tokens=config.max_new_tokens,
                    temperature=temperature,
                    top_p=config.top_p,
                    samples=len(numbers),
                )
            )
            for number in asked:
                rows[number - part.start]["samples"] += [
                    {"temperature": temperature, "sample": k, "text": reply.text, "ended": reply.ended}
                    for k, reply in zip(numbers, replies, strict=False)
                ]
    return rows


def judged(prepared: Prepared, rows: Sequence[dict[str, Any]], score: Score) -> Iterator[dict[str, Any]]:
    """The rows as they are saved: every sample with its score, those of earlier runs beside them.

    Raises:
      UserError: the scores are not one number for each answer.
    """
    pools = [prepared.earlier.get(row["prompt"], []) for row in rows]
    answers = [(row["prompt"], one) for row, pool in zip(rows, pools, strict=True) for one in (*row["samples"], *pool)]
    scores = iter(score_answers(score, [(prompt, one["text"]) for prompt, one in answers]))
    for row, pool in zip(rows, pools, strict=True):
        own, old = ([one | {"score": next(scores)} for one in samples] for samples in (row["samples"], pool))
        yield {"prompt": [message._asdict() for message in row["prompt"]], "samples": own, "earlier": old}


def select(folder: Path) -> None:
    """Writes the dialogues: each prompt with the best of its samples.

    Raises:
      UserError: no sample has a score.
    """
    rows, kept = read_samples(folder), []
    for row in rows:
        if best := best_sample(row):
            answer = {"role": "assistant", "content": best["text"]}
            how = {name: value for name, value in best.items() if name != "text"}
            kept.append({"messages": [*row["prompt"], answer], **how})
    if not kept:
        raise UserError(
            f"not one answer in {folder / SAMPLES} is both not empty and possible to judge. Is the model one that was "
            "trained on dialogues in this format?"
        )
    cut, old = sum(row["ended"] == "too long" for row in kept), sum("run" in row for row in kept)
    say(
        f"{len(kept)} prompts with their best answer, mean score {np.mean([row['score'] for row in kept]):.4g}"
        + (f"; {old} of these are from earlier runs" if old else "")
        + (f"; {cut} of these were cut by --max-new-tokens" if cut else "")
        + (f"; {len(rows) - len(kept)} prompts without one are left out" if len(kept) < len(rows) else "")
    )
    write_whole(folder / DIALOGUES, "".join(map(as_line, kept)).encode())


def recipe_of(prepared: Prepared) -> dict[str, Any]:
    """What decides the samples and their scores."""
    reward = "a function" if prepared.reward is None else str(prepared.reward.resolve())
    return without(prepared.config, FREE_TO_CHANGE) | {
        "checkpoint": str(prepared.checkpoint.resolve()),
        "reward": reward,
        "prompts": digest_of(prepared.prompts),
        "pool": digest_of(list(prepared.earlier.items())),
    }


def show(prepared: Prepared) -> None:
    """Prints a dry run: what was found, and the first prompts."""
    config = prepared.config
    drawn = prepared.asked * config.samples * len(config.temperatures)
    print(f"checkpoint   {prepared.checkpoint}")
    print(f"judge        {prepared.reward or 'a function'}")
    print(f"prompts      {', '.join(config.data.sources)}: {prepared.asked}")
    print(
        f"samples      {drawn}: {config.samples} to each prompt at each of the temperatures "
        f"{', '.join(f'{t:g}' for t in config.temperatures)}"
    )
    if config.pool:
        old, others = sum(map(len, prepared.earlier.values())), len(prepared.prompts) - prepared.asked
        print(f"pool         {old} samples of {len(config.pool)} earlier runs; {others} prompts are theirs alone")
    for number, prompt in enumerate(prepared.prompts[:3]):
        print(f"--- prompt {number}")
        print("\n".join(f"{role}: {text}" for role, text in prompt))


def _bits(temperature: float) -> int:
    """A temperature as a number that a seed can be made of."""
    return int(np.float32(temperature).view(np.uint32))
