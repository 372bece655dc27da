"""Ghost Attention (paper 3.3): dialogues in which an instruction, given in the first turn alone, is held to the last.

A trick to make them without anybody writing them: an instruction is concatenated to every question, and the model, which
obeys what it was told a moment ago, answers turn by turn; then all but the first turn's is taken away. Fine-tuned on the
last answer of each (`llama-jax sft --data.answers last`), it learns to look back to the first turn. This stage makes the
dialogues; the training is that of the sft stage.

Our choices, where the paper is silent: each answer is the model's own behind its own earlier ones (the paper may have
kept the earlier ones of its dialogues); an answer that it does not end, or that is empty, ends its dialogue before it.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_jax.conversion.convert import open_pinned
from llama_jax.data.constraints import (
    KINDS,
    Instruction,
    Kind,
    check_kinds,
    draw_instruction,
    for_sampling,
    for_training,
    kinds_as_json,
    read_kinds,
    with_values,
)
from llama_jax.data.questions import QuestionsConfig, read_questions
from llama_jax.data.samples import as_line
from llama_jax.errors import Preempted, UserError
from llama_jax.generation.answer_scores import Score
from llama_jax.generation.lists import write_list
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.text.chat import Llama2Chat, Message, Plain, Template
from llama_jax.training.metrics import format_duration, say
from llama_jax.training.preemption import StopSignal
from llama_jax.training.run_config import check_counts
from llama_jax.training.run_folder import digest_of, find_recipe, make_folder, without, write_recipe, write_whole

DIALOGUES, LISTS = "dialogues.jsonl", "constraints.json"
_SECONDS_BETWEEN_LINES = 10
# The kinds whose lists the paper let the model write, and what it is asked for.
WRITTEN_BY_MODEL = {"hobby": "hobbies", "figure": "famous public figures"}


@dataclass(frozen=True)
class GhostAttentionConfig:
    """One set of dialogues."""

    checkpoint: str = ""
    """The model that answers, of any form; the paper takes the newest after RLHF."""
    data: QuestionsConfig = field(default_factory=QuestionsConfig)
    """The questions."""
    dialogues: int = 0
    """How many to make, each with its own instruction; beyond the data's own number it begins anew. 0: every one once."""
    constraints: str = ""
    """A JSON file of lists, such as {"hobby": ["tennis"], "figure": ["Napoleon"]}; built-in ones if empty."""
    generate_lists: bool = False
    """Let the model write the lists of hobbies and figures itself, as the paper does, so that it knows all of them."""
    list_length: int = 40
    """Entries of each list that the model writes."""
    combine: int = 3
    """At most so many constraints in an instruction, each of another kind."""
    as_system: bool = False
    """For training, make the instruction the system message instead of a part of the first question."""
    plain: bool = False
    """Prompt and completion as plain text, instead of Llama 2's chat format."""
    max_new_tokens: int = 512
    """Of an answer."""
    temperature: float = 1.0
    """Divides the logits."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that together hold this probability."""
    batch: int = 16
    """Dialogues that are answered side by side; what is done is saved after so many."""
    int8: bool = False
    """Keep the weights in 8 bits."""
    mesh: str = ""
    """Devices to lie on, such as auto or tensor=4; one if empty."""
    seed: int = 0
    """Of the instructions and the answers."""
    out: str = "runs/ghost_attention"
    """The run's folder; the dialogues are its dialogues.jsonl."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with what the folder holds: if it holds something; never (refuses such a folder); or fail without it."""
    dry_run: bool = False
    """Print three dialogues as they will be asked and trained, and touch nothing."""


FREE_TO_CHANGE = ("data.sources", "mesh", "out", "resume", "dry_run")  # of the data, what was read is compared


@dataclass(frozen=True)
class Prepared:
    """A configuration with what its checkpoint and its data turned out to be."""

    config: GhostAttentionConfig
    checkpoint: Path
    questions: list[tuple[str, ...]]
    kinds: tuple[Kind, ...]
    template: Template
    samples: int
    score: Score | None

    @property
    def count(self) -> int:
        """How many dialogues are made."""
        return self.config.dialogues or len(self.questions)

    def asked(self, number: int) -> tuple[str, ...]:
        """The questions of a dialogue."""
        return self.questions[number % len(self.questions)]

    def instruction(self, number: int) -> Instruction:
        """The instruction of a dialogue."""
        return draw_instruction(self.kinds, self.config.combine, self.config.seed, number)

    def part(self, first: int) -> Path:
        """Where the dialogues from this number on are saved, so many as are answered side by side."""
        return Path(self.config.out) / "samples" / f"{first:08}.jsonl"


@dataclass
class Growing:
    """A dialogue while it is sampled."""

    number: int
    questions: tuple[str, ...]
    instruction: Instruction
    replies: list[str] = field(default_factory=list)
    ended: str = ""
    """Why it has no more turns: "whole" if all its questions are answered."""


def run(config: GhostAttentionConfig, *, samples: int = 1, score: Score | None = None) -> None:
    """Makes the dialogues that `config` describes in `config.out`, going on where an earlier run of it stopped.

    Args:
      config: of the run.
      samples: answers drawn for each question, of which the one with the best score is kept, as in rejection sampling.
      score: judges them; see `Score`.

    Raises:
      UserError: checkpoint, data, constraints or what is found in the folder do not fit.
      Preempted: told to stop; what was saved is gone on with.
    """
    prepared = prepare(config, samples, score)
    if config.dry_run:
        show(prepared)
        return
    folder = Path(config.out)
    recipe = find_recipe(folder, "ghost_attention", config.resume)
    make_folder(folder)
    llama = None
    if config.generate_lists:
        if recipe is None:
            llama = load(prepared)
            write_whole(folder / LISTS, kinds_as_json(written_by_model(prepared, llama)))
        prepared = dataclasses.replace(prepared, kinds=read_kinds(folder / LISTS))
        check_kinds(prepared.kinds, prepared.template)
    write_recipe(folder, "ghost_attention", config, recipe_of(prepared), recipe)
    parts = range(0, prepared.count, config.batch)
    if not (folder / DIALOGUES).exists():
        if missing := [first for first in parts if not prepared.part(first).exists()]:
            sample(prepared, llama or load(prepared), missing)
        join([prepared.part(first) for first in parts], folder / DIALOGUES)
    for first in parts:
        prepared.part(first).unlink(missing_ok=True)
    say(
        f"done: {folder / DIALOGUES}; train on it: llama-jax sft {config.checkpoint} --data {folder / DIALOGUES} "
        f"--data.answers last{' --plain' * config.plain} --out {folder}-sft"
    )


def prepare(config: GhostAttentionConfig, samples: int = 1, score: Score | None = None) -> Prepared:
    """Reads the questions and lists and opens the checkpoint without reading its weights.

    Raises:
      UserError: they do not fit each other or the settings.
    """
    if not config.checkpoint:
        raise UserError("name the model that answers: llama-jax ghost-attention CHECKPOINT --data FILE.jsonl")
    if not config.data.sources:
        raise UserError("No questions. Set --data.sources to a .jsonl file of dialogues, hf:NAME or tfds:NAME.")
    check_counts(config, "data.join", "combine", "batch", "list_length", "max_new_tokens")
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be 1 or more")
    if samples > 1 and score is None:
        raise UserError(f"of {samples} samples the best should be kept, but no score function says which; give `score`")
    checkpoint, model, _ = open_pinned(config.checkpoint)
    context = model.context_length
    if config.max_new_tokens >= context:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a question in the model's context of {context}"
        )
    template: Template = Plain() if config.plain else Llama2Chat()
    kinds = read_kinds(config.constraints) if config.constraints else KINDS
    check_kinds(kinds, template)
    questions, found = read_questions(config.data, template)
    say(found)
    return Prepared(config, checkpoint, questions, kinds, template, samples, score)


def load(prepared: Prepared) -> Llama:
    """The model that answers."""
    config = prepared.config
    return Llama.load(prepared.checkpoint, mesh=config.mesh or None, int8=config.int8)


def written_by_model(prepared: Prepared, llama: Llama) -> tuple[Kind, ...]:
    """The kinds, with lists of hobbies and figures that the model writes. Raises UserError if it writes none."""
    config = prepared.config
    settings = {"seed": config.seed, "temperature": config.temperature, "top_p": config.top_p}
    values = {
        kind.name: write_list(llama, WRITTEN_BY_MODEL[kind.name], config.list_length, prepared.template, **settings)
        for kind in prepared.kinds
        if kind.name in WRITTEN_BY_MODEL
    }
    for name, entries in values.items():
        say(f"{name}, by the model: {', '.join(entries)}")
    return with_values(prepared.kinds, values)


def sample(prepared: Prepared, llama: Llama, missing: Sequence[int]) -> None:
    """Samples and saves the parts that begin with these numbers.

    Raises:
      Preempted: told to stop; the parts that are whole are saved.
    """
    count, done, began = prepared.count, 0, time.monotonic()
    parts = [range(first, min(first + prepared.config.batch, count)) for first in missing]
    saved, later = count - sum(map(len, parts)), sum(len(prepared.asked(n)) for part in parts for n in part)
    said = began
    with StopSignal() as stop:
        for part in parts:
            growing = [Growing(number, prepared.asked(number), prepared.instruction(number)) for number in part]
            later -= sum(len(dialogue.questions) for dialogue in growing)
            while waiting := [dialogue for dialogue in growing if not dialogue.ended]:
                answer(prepared, llama, waiting)
                done += len(waiting)
                now = time.monotonic()
                if now - said > _SECONDS_BETWEEN_LINES:
                    said, rate = now, done / (now - began)
                    left = later + sum(len(d.questions) - len(d.replies) for d in waiting if not d.ended)
                    say(f"{saved}/{count} dialogues saved, {rate:.1f} answers/s, eta {format_duration(left / rate)}")
                if name := stop.received(done):
                    raise Preempted(f"{name} received: {saved} of {count} dialogues are saved; start it again to go on")
            rows = [_row(dialogue, prepared.config.as_system) for dialogue in growing]
            write_whole(prepared.part(part.start), "".join(map(as_line, rows)).encode())
            saved += len(part)
    say(f"{done} answers in {format_duration(time.monotonic() - began)}")


def answer(prepared: Prepared, llama: Llama, dialogues: Sequence[Growing]) -> None:
    """Gives each dialogue its next answer, or ends it."""
    config, samples = prepared.config, prepared.samples
    waiting = [for_sampling(d.instruction, d.questions, d.replies) for d in dialogues for _ in range(samples)]
    seeds = [seed_of(config.seed, d.number, 1 + len(d.replies), k) for d in dialogues for k in range(samples)]
    settings = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": config.top_p}
    replies = reply_to(llama, waiting, prepared.template, seeds=seeds, **settings)
    scores = [0.0] * len(replies)
    if samples > 1:
        scores = prepared.score(
            [(*asked, Message("assistant", r.text)) for asked, r in zip(waiting, replies, strict=True)]
        )
    for at, dialogue in enumerate(dialogues):
        own = range(at * samples, (at + 1) * samples)
        best = max(own, key=lambda i: (replies[i].ended == "whole", scores[i]))
        text, ended = replies[best]
        if ended == "whole":
            dialogue.replies.append(text)
        if ended != "whole" or len(dialogue.replies) == len(dialogue.questions):
            dialogue.ended = ended


def join(parts: Sequence[Path], path: Path) -> None:
    """Puts the parts together, without the dialogues that have no answer, and says what became of all.

    Raises:
      UserError: no dialogue has one.
    """
    rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").split("\n") if line]
    ended = Counter(row["ended"] for row in rows)
    kept = [row for row in rows if row["messages"]]
    answers = sum(message["role"] == "assistant" for row in kept for message in row["messages"])
    early = ", ".join(f"{ended[why]} {what}" for why, what in _ENDINGS.items() if ended[why])
    if not kept:
        raise UserError(
            f"no dialogue has an answer; they end: {early}. Is it a model that was trained on dialogues in this format?"
        )
    say(
        f"{len(kept)} dialogues with {answers} answers; {ended['whole']} are whole"
        + (f", and these end early: {early}" if early else "")
        + (f"; {len(rows) - len(kept)} without any answer are left out" if len(kept) < len(rows) else "")
    )
    write_whole(path, "".join(map(as_line, kept)).encode())


_ENDINGS = {
    "no room": "where the context is full",
    "too long": "before an answer longer than --max-new-tokens",
    "empty": "before an empty answer",
}


def show(prepared: Prepared) -> None:
    """Prints a dry run: the settings, and the first dialogues as they are asked and as they are trained."""
    config = prepared.config
    print(f"checkpoint   {prepared.checkpoint}")
    print(
        f"questions    {', '.join(config.data.sources)}: {len(prepared.questions)} dialogues, {prepared.count} to make"
    )
    for kind in prepared.kinds:
        by_model = " (the model will write others)" if config.generate_lists and kind.name in WRITTEN_BY_MODEL else ""
        print(f"{kind.name:<12} {len(kind.values)}: {', '.join(kind.values)}{by_model}")
    for number in range(min(3, prepared.count)):
        instruction, questions = prepared.instruction(number), prepared.asked(number)
        unknown = ["(an answer)"] * len(questions)
        print(f"--- dialogue {number}: as it is asked, turn by turn")
        print("\n".join(f"{role}: {text}" for role, text in for_sampling(instruction, questions, unknown)))
        print("--- and as it is trained, on the last answer alone")
        print(
            "\n".join(
                f"{role}: {text}" for role, text in for_training(instruction, questions, unknown, config.as_system)
            )
        )


def _row(dialogue: Growing, as_system: bool) -> dict[str, Any]:
    """A finished dialogue as a row of training data; without messages if it has no answer."""
    instruction = dialogue.instruction
    messages = for_training(instruction, dialogue.questions, dialogue.replies, as_system) if dialogue.replies else ()
    return {
        "messages": [message._asdict() for message in messages],
        "instruction": dataclasses.asdict(instruction) | {"constraints": dict(instruction.constraints)},
        "ended": dialogue.ended,
    }


def recipe_of(prepared: Prepared) -> dict[str, Any]:
    """What decides the dialogues."""
    return without(prepared.config, FREE_TO_CHANGE) | {
        "checkpoint": str(prepared.checkpoint.resolve()),
        "questions": digest_of(prepared.questions),
        "kinds": json.loads(kinds_as_json(prepared.kinds)),
        "samples": prepared.samples,
    }
