"""Safety context distillation (paper 4.2.4): answers behind a safety preprompt, to train on without it.

To each adversarial prompt the model answers as it stands and behind safety preprompts; a safety reward model judges all
answers to the prompt as it stands, and the best one behind a preprompt is kept only where it scores above the original.
The training is that of the sft stage (`llama-jax sft --data.answers last`). Other prompts are counted and left out: the
paper found that to distil on these makes a model refuse what it should not.

Our choices, where the paper is silent: one answer behind a tailored preprompt unless set, and of several the best competes;
preprompts are drawn without repetition while there are any; an answer that the length limit cut is judged like any other;
an original that is empty or cannot be judged is worse than any that can.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.preprompts import (
    BUILT_IN,
    GENERIC,
    Preprompts,
    behind_preprompt,
    check_preprompts,
    read_preprompts,
)
from llama_jax.data.prompts import PromptsConfig, check_sources, read_prompts
from llama_jax.data.samples import SAMPLES, as_line, best_sample, is_scored, read_samples
from llama_jax.errors import UserError
from llama_jax.generation.answer_scores import Score, check_judge, find_judge, load_with_judge, score_answers
from llama_jax.generation.llama import Llama
from llama_jax.generation.parts import complete, make_parts, parts_of, remove_parts
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.text.chat import Dialogue, Llama2Chat, Plain, Template, encode_prompt
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.metrics import say
from llama_jax.training.run_config import check_counts
from llama_jax.training.run_folder import digest_of, find_recipe, make_folder, without, write_recipe, write_whole

DIALOGUES = "dialogues.jsonl"


@dataclass(frozen=True)
class DistillationConfig:
    """One set of safer answers."""

    checkpoint: str = ""
    """The model that answers, of any form."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    """The prompts; those without a risk category are left out."""
    reward: str = ""
    """The safety reward model that judges: a run of llama-jax reward."""
    preprompts: str = ""
    """A JSON file of preprompts, {"generic": [texts], "a risk category": [texts]}; built-in ones if empty."""
    kinds: tuple[Literal["tailored", "generic"], ...] = ("tailored",)
    """What stands before a question: an answer template of its risk category (generic where there is none), or any risk's."""
    samples: int = 1
    """Answers behind preprompts of each kind, of which the best competes with the original one."""
    temperature: float = 1.0
    """Divides the logits."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this probability; 1 for all."""
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
    """Of the preprompts and the answers."""
    out: str = "runs/distill"
    """The run's folder; what is kept is its dialogues.jsonl, all answers are its samples.jsonl."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with what the folder holds: if it holds something; never (refuses such a folder); or fail without it."""
    dry_run: bool = False
    """Print what was found and three prompts as they are asked, and touch nothing."""


# Prompts, preprompts and reward model are compared by what they turned out to be.
FREE_TO_CHANGE = ("data.sources", "data.category", "preprompts", "mesh", "out", "resume", "dry_run")


@dataclass(frozen=True)
class Prepared:
    """A configuration with what its checkpoint and its data turned out to be."""

    config: DistillationConfig
    checkpoint: Path
    reward: Path | None
    """None where a function judges."""
    prompts: list[tuple[Dialogue, str]]
    """The adversarial prompts, each with its risk category."""
    preprompts: Preprompts
    template: Template

    @property
    def answers(self) -> int:
        """How many are drawn for each prompt: the original one, and those behind preprompts."""
        return 1 + self.config.samples * len(self.config.kinds)

    @property
    def parts(self) -> list[range]:
        """The numbers of the prompts that are saved together."""
        return parts_of(len(self.prompts), self.answers, self.config.batch)


def run(config: DistillationConfig, *, score: Score | None = None) -> None:
    """Samples, judges and selects what `config` describes in `config.out`, going on where an earlier run of it stopped.

    Args:
      config: of the run.
      score: judges in place of the reward model, see `Score`; it is given prompts without preprompts.

    Raises:
      UserError: checkpoint, data, preprompts, scores or what is found in the folder do not fit.
      Preempted: told to stop; what was saved is gone on with.
    """
    prepared = prepare(config, score is not None)
    if config.dry_run:
        show(prepared)
        return
    folder = Path(config.out)
    found = find_recipe(folder, "distillation", config.resume)
    make_folder(folder)
    write_recipe(folder, "distillation", config, recipe_of(prepared), found)
    if not (folder / DIALOGUES).exists():
        complete(folder, prepared.parts, SAMPLES, partial(sample, prepared, score))
        select(folder)
    remove_parts(folder, prepared.parts)
    say(
        f"done: {folder / DIALOGUES}; train on it, with other dialogues lest they be unlearned: llama-jax sft "
        f"{config.checkpoint} --data {folder / DIALOGUES} OTHERS.jsonl --data.answers last{' --plain' * config.plain} "
        f"--out {folder}-sft"
    )


def prepare(config: DistillationConfig, has_score: bool = False) -> Prepared:
    """Reads prompts and preprompts, and opens the checkpoints without reading their weights.

    Raises:
      UserError: they do not fit each other or the settings.
    """
    _check(config, has_score)
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    template: Template = Plain() if config.plain else Llama2Chat()
    reward = None if has_score else find_judge(config.reward, template)
    preprompts = read_preprompts(config.preprompts) if config.preprompts else BUILT_IN
    check_preprompts(preprompts, template)
    found, note = read_prompts(config.data, template)
    say(note)
    adversarial = [(prompt, risk) for prompt, risk in found.items() if risk]
    if not adversarial:
        raise UserError(
            f"none of {len(found)} prompts is adversarial, and no other is distilled on; name the rows' field of the risk "
            f"category with --data.category (it is {config.data.category})"
        )
    if len(adversarial) < len(found):
        say(f"{len(found) - len(adversarial)} of {len(found)} prompts are not adversarial and are left out")
    if "tailored" in config.kinds and (others := sorted({risk for _, risk in adversarial} - {*preprompts})):
        say(f"no tailored preprompt for the risk category {', '.join(others)}: generic ones stand in")
    whole = Prepared(config, checkpoint, reward, adversarial, preprompts, template)
    return dataclasses.replace(whole, prompts=_with_room(whole, tokenizer, model.context_length))


def _with_room(prepared: Prepared, tokenizer: Tokenizer, context: int) -> list[tuple[Dialogue, str]]:
    """The prompts that leave room for an answer however they are asked. Raises UserError if none does."""
    longest = context - prepared.config.max_new_tokens
    short = [
        (prompt, risk)
        for prompt, risk in prepared.prompts
        if all(
            len(encode_prompt(tokenizer, asked, prepared.template)) <= longest
            for asked, *_ in variants(prepared, prompt, risk)
        )
    ]
    count = len(prepared.prompts)
    if not short:
        raise UserError(
            f"none of {count} prompts leaves room, with a preprompt, for --max-new-tokens {prepared.config.max_new_tokens} "
            f"in the model's context of {context} tokens; lower it"
        )
    if len(short) < count:
        say(f"{count - len(short)} of {count} prompts leave no room for an answer and are left out")
    return short


def _check(config: DistillationConfig, has_score: bool) -> None:
    """Raises UserError for settings that cannot be."""
    if not config.checkpoint:
        raise UserError(
            "name the model that answers: llama-jax distill CHECKPOINT --data FILE.jsonl --reward REWARD_RUN"
        )
    check_sources(config.data)
    check_judge(config.reward, has_score, "safety reward model")
    if not config.kinds or len({*config.kinds}) < len(config.kinds):
        raise UserError(
            f"--kinds is {' '.join(config.kinds) or 'empty'}; expected tailored, generic or both, each once"
        )
    check_counts(config, "samples", "batch", "max_new_tokens")
    if not 0 <= config.temperature < math.inf:
        raise UserError(f"--temperature is {config.temperature}; expected 0 (the likeliest answer) or more")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p is {config.top_p}; it is a probability, above 0 and up to 1 (all tokens)")


def variants(prepared: Prepared, prompt: Dialogue, risk: str) -> Iterator[tuple[Dialogue, str, str]]:
    """What is asked for a prompt: first itself, then it behind each preprompt; with the preprompt's kind and text.

    The preprompts depend on the prompt, its risk category and the seed alone.
    """
    config, known = prepared.config, prepared.preprompts
    yield prompt, "", ""
    drawn = Counter()
    start = seed_of(config.seed, int(digest_of(prompt)[:8], 16))
    for wanted in config.kinds:
        kind = wanted if risk in known else GENERIC
        texts = known[GENERIC if kind == GENERIC else risk]
        for _ in range(config.samples):
            text = texts[(start + drawn[kind]) % len(texts)]
            drawn[kind] += 1
            yield behind_preprompt(text, prompt), kind, text


def sample(prepared: Prepared, score: Score | None, missing: Sequence[range]) -> None:
    """Reads the model that answers and what judges; samples, judges and saves these parts.

    Raises:
      UserError: scores that are none.
      Preempted: told to stop; the parts that are whole are saved.
    """
    config = prepared.config
    llama, score = load_with_judge(prepared.checkpoint, prepared.reward, score, mesh=config.mesh, int8=config.int8)
    make_parts(
        config.out,
        missing,
        len(prepared.prompts),
        make=lambda part: judged(prepared, part, draw(prepared, llama, part), score),
        answers_in=lambda part: prepared.answers * len(part),
    )


def draw(prepared: Prepared, llama: Llama, part: range) -> list[list[dict[str, Any]]]:
    """The answers to each prompt, not judged yet: the original, then those behind preprompts."""
    config = prepared.config
    # Of one size in every part, so that the last compiles nothing of its own.
    filled = [*part, *[part.start] * (len(prepared.parts[0]) - len(part))]
    asked = [
        (number, k, one) for number in filled for k, one in enumerate(variants(prepared, *prepared.prompts[number]))
    ]
    replies = reply_to(
        llama,
        [dialogue for _, _, (dialogue, *_) in asked],
        prepared.template,
        seeds=[seed_of(config.seed, number, k) for number, k, _ in asked],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    answers = [
        {"kind": kind, "preprompt": preprompt, "sample": k, "text": reply.text, "ended": reply.ended}
        for (_, k, (_, kind, preprompt)), reply in zip(asked, replies, strict=True)
    ]
    return [
        answers[first : first + prepared.answers] for first in range(0, len(part) * prepared.answers, prepared.answers)
    ]


def judged(
    prepared: Prepared, part: range, answers: Sequence[list[dict[str, Any]]], score: Score
) -> Iterator[dict[str, Any]]:
    """The rows as they are saved: every answer with its score as one to the prompt without a preprompt.

    Raises:
      UserError: the scores are not one number for each answer.
    """
    prompts = [prepared.prompts[number] for number in part]
    # Each text once: an answer like the original must not score above it by a rounding of its place in a batch.
    different = list(
        dict.fromkeys((prompt, one["text"]) for (prompt, _), own in zip(prompts, answers, strict=True) for one in own)
    )
    scores = dict(zip(different, score_answers(score, different), strict=True))
    for (prompt, risk), own in zip(prompts, answers, strict=True):
        original, *samples = ({**one, "score": scores[prompt, one["text"]]} for one in own)
        messages = [message._asdict() for message in prompt]
        yield {"prompt": messages, "risk": risk, "original": original, "samples": samples}


def is_safer(row: dict[str, Any]) -> bool:
    """Whether the best answer behind a preprompt scores above the original one."""
    best, original = best_sample(row), row["original"]
    return best is not None and (not is_scored(original) or best["score"] > original["score"])


def select(folder: Path) -> None:
    """Writes the dialogues: each prompt, without a preprompt, with its best answer behind one, where that is safer.

    Raises:
      UserError: it nowhere is.
    """
    rows, kept = read_samples(folder), []
    for row in filter(is_safer, rows):
        best = best_sample(row)
        how = {name: value for name, value in best.items() if name != "text"}
        answer = {"role": "assistant", "content": best["text"]}
        kept.append(
            {"messages": [*row["prompt"], answer], "risk": row["risk"]}
            | how
            | {"original_score": row["original"]["score"]}
        )
    if not kept:
        raise UserError(
            f"no answer in {folder / SAMPLES} scores above the original one: there is nothing to distil. Try more --samples "
            "or other --preprompts, unless the model is as safe as it can be"
        )
    risen = [row["score"] - row["original_score"] for row in kept if row["original_score"] is not None]
    cut = sum(row["ended"] == "too long" for row in kept)
    asked, safer = (Counter(row["risk"] for row in those) for those in (rows, kept))
    say(
        f"{len(kept)} of {len(rows)} prompts ({len(kept) / len(rows):.1%}) have an answer that scores above the original"
        + (f", by {np.mean(risen):.4g} in the mean" if risen else "")
        + (f"; {cut} of these were cut by --max-new-tokens" if cut else "")
        + "; by risk category: "
        + ", ".join(f"{risk} {safer[risk]}/{count}" for risk, count in asked.items())
    )
    write_whole(folder / DIALOGUES, "".join(map(as_line, kept)).encode())


def recipe_of(prepared: Prepared) -> dict[str, Any]:
    """What decides the answers and their scores."""
    return without(prepared.config, FREE_TO_CHANGE) | {
        "checkpoint": str(prepared.checkpoint.resolve()),
        "reward": "a function" if prepared.reward is None else str(prepared.reward.resolve()),
        "prompts": digest_of(prepared.prompts),
        "preprompts": digest_of(dict(prepared.preprompts)),
    }


def show(prepared: Prepared) -> None:
    """Prints a dry run: what was found, and the first prompts as they are asked."""
    config = prepared.config
    print(f"checkpoint   {prepared.checkpoint}")
    print(f"judge        {prepared.reward or 'a function'}")
    print(f"prompts      {', '.join(config.data.sources)}: {len(prepared.prompts)}")
    print(f"answers      {len(prepared.prompts) * prepared.answers}: {prepared.answers} to each prompt")
    for category, texts in prepared.preprompts.items():
        print(f"preprompts   {category}: {len(texts)}")
    for number in range(min(3, len(prepared.prompts))):
        print(f"--- prompt {number} ({prepared.prompts[number][1]})")
        for dialogue, kind, _ in variants(prepared, *prepared.prompts[number]):
            print(f"{kind or 'original'}: {dialogue[-1].content}")
