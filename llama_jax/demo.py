"""The whole pipeline on a laptop: the stages a pod runs, one after the other, on data that needs no download."""

import dataclasses
import math
import time
from pathlib import Path

import jax

from llama_jax.conversion.load import load_model
from llama_jax.data.instruction_world import ADVERSARIAL_GRADES, SAFE_GRADES, annotated, textbook
from llama_jax.data.pipeline import held_out_documents
from llama_jax.data.python_corpus import write_python_corpus
from llama_jax.demo_rlhf import Sizes, distil, learn_from_preferences, rlhf_config
from llama_jax.evaluation.compression import compressor_bits_per_byte
from llama_jax.evaluation.instruction_world import Answered, play, scores
from llama_jax.evaluation.report import plot_shares, table, training_section, write_page
from llama_jax.evaluation.versions import read_versions
from llama_jax.generation.llama import Llama
from llama_jax.parallel.mesh import make_mesh
from llama_jax.recipes import load_recipe
from llama_jax.stages import pretrain, sft
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.held_out import make_held_out_loss
from llama_jax.training.metrics import format_duration, say
from llama_jax.training.run_folder import write_rows

PROMPTS = ("def main(", "The for statement is used to", "import os\n")
CORPUS, TEXTBOOK, ANNOTATED = "corpus.jsonl", "textbook.jsonl", "annotated.jsonl"
ALIGNED = ("score", "right", "whole", "violations", "false_refusals", "borderline_refusals", "personas")
PAGES, DIALOGUES, QUESTIONED, SIZES = 3_000, 4_000, 200, Sizes()


def run(out: str, *, seed: int = 0, train_tokens: int = 0, dialogues: int = 0, dry_run: bool = False) -> None:
    """Pretraining, fine-tuning on dialogues, reward models, distillation, rejection sampling and PPO, each scored on what it
    never saw, in one report.

    Args:
      out: the folder; a demo that was interrupted goes on there.
      seed: of initialisation, data and sampling.
      train_tokens: to pretrain on; the recipe's number if 0.
      dialogues: to fine-tune on; 4,000 if 0.
      dry_run: print the recipe of pretraining and its memory, and touch nothing.
    """
    folder, began, sizes = Path(out), time.monotonic(), SIZES
    pretraining = pretraining_config(folder, seed, train_tokens, dry_run)
    if dry_run:
        pretrain.run(pretraining)
        return
    write_corpora(folder, seed, dialogues or DIALOGUES)
    pretrain.run(pretraining)
    bits = bits_per_byte(pretraining)
    for name, value in bits.items():
        say(f"{name:>12}  {value:.3f} bits per byte, held-out documents")
    fine_tuning = fine_tuning_config(folder, seed)
    sft.run(fine_tuning)
    played = {"pretrained": ask(pretraining.out, seed), "SFT": ask(fine_tuning.out, seed)}
    rlhf = rlhf_config(folder, fine_tuning.out, fine_tuning.mesh, seed, sizes)
    learned = learn_from_preferences(rlhf, sizes)
    distilled = distil(folder, fine_tuning.out, learned["safety"], fine_tuning.mesh, seed, sizes)
    aligned = {"SFT": played["SFT"], "SFT, distilled": ask(distilled, seed)}
    aligned |= {name: ask(learned[name], seed) for name in ("RS", "PPO")}
    page = folder / "report.md"
    write_page(
        page,
        "From raw text to answers that people prefer",
        [
            *pretraining_report(pretraining, bits, page),
            *sft_report(fine_tuning, played, page),
            *preferences_report(rlhf, aligned, page),
        ],
    )
    say(f"report: {page}; in all {format_duration(time.monotonic() - began)}")
    say(f"talk with it: llama-jax chat {learned['PPO']}")


def pretraining_config(folder: Path, seed: int, train_tokens: int, dry_run: bool) -> PretrainConfig:
    """The tiny recipe, on the Python corpus and the world's textbook."""
    recipe: PretrainConfig = load_recipe("tiny_end_to_end", PretrainConfig)
    sources = tuple(f"jsonl:{folder / name}" for name in (CORPUS, TEXTBOOK))
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sources=sources, weights=(0.65, 0.35)),
        train_tokens=train_tokens or recipe.train_tokens,
        sample_prompts=PROMPTS,
        mesh=mesh_for(recipe.rows),
        seed=seed,
        out=str(folder / "pretrain"),
        dry_run=dry_run,
    )


def fine_tuning_config(folder: Path, seed: int) -> SFTConfig:
    """The tiny recipe of fine-tuning, on the world's annotated dialogues."""
    recipe: SFTConfig = load_recipe("tiny_sft", SFTConfig)
    return dataclasses.replace(
        recipe,
        checkpoint=str(folder / "pretrain"),
        data=dataclasses.replace(recipe.data, sources=(str(folder / ANNOTATED),)),
        mesh=mesh_for(recipe.rows),
        seed=seed,
        out=str(folder / "sft"),
    )


def mesh_for(rows: int) -> str:
    """All devices, however many: as many as there is a row for share out the rows, the others split their lengths."""
    return f"fsdp={math.gcd(rows, jax.device_count())},context=-1"


def write_corpora(folder: Path, seed: int, dialogues: int) -> None:
    """Writes what the stages train on, unless it is there."""
    if not (folder / CORPUS).exists():
        say("collecting the language reference, the docstrings and the sources of this Python ...")
        written = write_python_corpus(folder / CORPUS)
        say(f"{written.documents} documents, {written.bytes / 1e6:.1f} MB")
    write_rows(folder / TEXTBOOK, ({"text": textbook(seed, number)} for number in range(PAGES)))
    write_rows(folder / ANNOTATED, (annotated(seed, number, preprompts=True) for number in range(dialogues)))


def bits_per_byte(config: PretrainConfig) -> dict[str, float]:
    """Of the held-out documents of the Python corpus: the newest checkpoint's, restored from disk, and the compressors'."""
    mesh = make_mesh(config.mesh)
    data = dataclasses.replace(config.data, sources=config.data.sources[:1], weights=())
    with jax.set_mesh(mesh):
        model, tokenizer = load_model(config.out, mesh)
        shape = {"rows": config.rows, "length": config.length}
        score = make_held_out_loss(data, tokenizer, mesh, config.compute, **shape)(model)
    text = "".join(held_out_documents(data, tokenizer)).encode()
    return {"llama_jax": score["eval/bits_per_byte"], **compressor_bits_per_byte(text)}


def ask(run_folder: str, seed: int) -> list[Answered]:
    """Plays held-out dialogues of the instruction world with a run's newest checkpoint."""
    say(f"asking {run_folder} the held-out questions of the instruction world ...")
    played = play(Llama.load(run_folder), dialogues=QUESTIONED, seed=seed)
    say("  ".join(f"{name} {value:.2f}" for name, value in scores(played).items()))
    return played


def pretraining_report(config: PretrainConfig, bits: dict[str, float], page: Path) -> list[str]:
    """The sections on pretraining."""
    return [
        "## Pretraining (paper 2.2)",
        table(("held-out documents", "bits per byte"), [(name, f"{value:.3f}") for name, value in bits.items()]),
        "The model's bits include the end of every document, and do not count the model itself.",
        training_section(Path(config.out), page),
    ]


def sft_report(config: SFTConfig, played: dict[str, list[Answered]], page: Path) -> list[str]:
    """The sections on fine-tuning: scores before and after, and the first answers."""
    by_model = {name: scores(answered) for name, answered in played.items()}
    plot_shares(by_model, page.parent / "scores.png")
    names = next(iter(by_model.values()))
    answers = [
        (before.question.prompt, as_cell(before.answer), as_cell(after.answer), after.grade)
        for before, after in zip(*played.values(), strict=True)
    ]
    return [
        "## Supervised fine-tuning (paper 3.1)",
        f"{len(answers)} held-out questions of the instruction world, answers sampled at temperature 1 and graded by its program. "
        "The annotators' own answers are of all grades, so a good student of theirs is no better than they are: "
        f"right {sum(SAFE_GRADES[2:]):.0%}, violations {ADVERSARIAL_GRADES[0]:.0%}.",
        "![Scores](scores.png)",
        table(
            ("share", *by_model),
            [(name.replace("_", " "), *(f"{s[name]:.2f}" for s in by_model.values())) for name in names],
        ),
        table(("question", *by_model, "grade"), answers[:20]),
        training_section(Path(config.out), page),
    ]


def preferences_report(config: RLHFConfig, played: dict[str, list[Answered]], page: Path) -> list[str]:
    """The sections on what preferences and preprompts add: true scores by model, beside what the reward models think."""
    by_model = {name: scores(answered) for name, answered in played.items()}
    plot_shares(
        {name: {one: s[one] for one in ALIGNED} for name, s in by_model.items()}, page.parent / "preferences.png"
    )
    judged = read_versions(config.out)[-1]["judged"]
    answers = [
        (first.question.prompt, *(as_cell(one.answer) for one in (first, *others)), first.grade, others[-1].grade)
        for first, *others in zip(*(played[name] for name in ("SFT", "RS", "PPO")), strict=True)
    ]
    out = Path(config.out).relative_to(page.parent)
    return [
        "## Preferences, preprompts and PPO (paper 3.2 and 4.2)",
        "Two reward models learned from annotators' comparisons; RS are the best of "
        f"{config.rejection.samples} answers to each question by their judgement, fine-tuned on; PPO went on from there. "
        "Distilled is the fine-tuned model taught by its own answers behind safety preprompts. The shares below are the "
        "world's program's, which judged nothing while anything was trained.",
        "![True scores by model](preferences.png)",
        table(
            ("share", *by_model),
            [(name.replace("_", " "), *(f"{s[name]:.2f}" for s in by_model.values())) for name in by_model["SFT"]],
        ),
        f"The reward models' own mean reward on {config.eval_prompts} held-out questions: {judged[0]['reward']:.3f} before, "
        f"{judged[-1]['reward']:.3f} after.",
        f"More on each: [the version]({out}/report.md), its [helpfulness]({out}/v1/helpfulness/report.md) and "
        f"[safety]({out}/v1/safety/report.md) models, [rejection sampling]({out}/v1/reject/report.md), "
        f"[PPO]({out}/v1/ppo/report.md), [distillation](distil/report.md).",
        table(("question", "SFT", "RS", "PPO", "grade before", "after"), answers[:20]),
    ]


def as_cell(answer: str) -> str:
    """The first line of an answer, as far as a table's cell has room."""
    line = answer.partition("\n")[0].replace("|", "\\|")
    return line[:60] + ("..." if line != answer or len(line) > 60 else "")
