"""RLHF in versions (paper 3.2): V1 to V4 by rejection sampling and fine-tuning, V5 with PPO on top of that (3.2.3).

A version trains reward models on all preferences known by then, lets the newest model answer, keeps the best answers and
fine-tunes on them. Through V3 these are the version's own samples; the paper's V3 had forgotten what V2 could do, so that
afterwards those of all versions compete. The settings are in `rlhf_config`, what a version runs is in `rlhf_version`.

Our choices, where the paper is silent or ambiguous: fine-tuning begins with the same checkpoint in every version (`start`);
reward models begin with the newest chat model; the piecewise rule judges in rejection sampling as it does in PPO.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.prompt_order import Prompt, encode_fitting, hold_out
from llama_jax.data.prompts import read_prompts
from llama_jax.data.samples import as_line
from llama_jax.errors import UserError
from llama_jax.generation.held_out_answers import ANSWERS, answer_held_out, compare, read_answers
from llama_jax.generation.llama import Llama
from llama_jax.stages.rlhf_config import FREE_TO_CHANGE, RLHFConfig, check
from llama_jax.stages.rlhf_version import (
    COLLECTED,
    PROMPTS,
    Prepared,
    Version,
    check_stages,
    in_stage,
    make_judges,
    newest,
    plan,
    preferences_of,
    recipe_of_version,
    stages_of,
)
from llama_jax.text.chat import Llama2Chat, Plain, Template
from llama_jax.training.metrics import say
from llama_jax.training.preemption import stopping_at_once
from llama_jax.training.run_folder import digest_of, find_recipe, make_folder, without, write_recipe, write_whole

HELD_OUT, SCORES = "held_out.jsonl", "scores.json"


class Collected(NamedTuple):
    """Preferences on answers of the newest model, as rows of any shape that the reward stage reads."""

    helpfulness: Sequence[dict[str, Any]]
    safety: Sequence[dict[str, Any]] = ()


Annotate = Callable[[int, Llama], Collected]
"""Collects preferences for a version, from answers that it lets the newest model give."""
Evaluate = Callable[[Llama], dict[str, float]]
"""Scores a model by what it knows itself: by the right answers, for example."""


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
    check(config, has_annotate)
    check_stages(config)
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    template: Template = Plain() if config.plain else Llama2Chat()
    dialogues, found = read_prompts(config.data, template)
    # PPO, whose limit is its own, leaves out what has no room for that.
    room = config.rejection.max_new_tokens
    prompts, left_out = encode_fitting(dialogues, tokenizer, template, model.context_length, room)
    say("\n".join(filter(None, (found, left_out))))
    return Prepared(config, checkpoint, template, *hold_out(prompts, config.eval_prompts, config.seed))


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
    for stage in stages_of(prepared, version) if version else ():
        # A stage that was stopped goes on by itself; one that was finished would be opened in vain.
        done = folder / f"{stage.folder}.done"
        if not done.exists():
            say(f"--- version {number} of {config.versions}: {stage.what} ({folder / stage.folder})")
            in_stage(stage.settings, stage.run)
            write_whole(done, b"")
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
