"""Five versions of RLHF at toy scale (paper 3.2 and 3.4.1, Figure 11), with a program that knows the right answers beside.

Claim: each version is better than the one before, by its reward models and in truth. The paper's share of wins against
ChatGPT, by its own reward models, goes from 39% (helpfulness) and 22% (harmlessness) after fine-tuning to 78% and 76% of V5
with PPO; GPT-4 sees 13% and 10% become 67% and 61%.
Command: python -m experiments.rlhf_versions --checkpoint runs/demo/sft --out runs/rlhf_versions
Cost: an hour on two CPU cores. Measured: see docs/experiments.md.
Before each version the world's annotators choose, with their mistakes, between two answers of the newest model that were drawn
at different temperatures, as the paper's did every week. The program grades the versions; no model ever sees these grades.
At full scale `paper_7b` and `paper_70b` are the recipes: `llama-jax rlhf Llama-2-7b-sft --data asked.jsonl --preferences
week1.jsonl week2.jsonl ...`, whose defaults they are, for 70B with --reward.optimizer.peak-lr 5e-6 and --ppo.beta 0.005. The
paper ran it with 70B alone, and fine-tuned the smaller models on what 70B had answered: `llama-jax sft Llama-2-7b-sft --data
runs/rlhf/v4/reject/dialogues.jsonl --data.answers last`. Not measured.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import tyro

from experiments.reward_margin import toy as reward_toy
from experiments.tiny_sft import config as sft_toy
from llama_jax.cli import end_of
from llama_jax.data import instruction_world as world
from llama_jax.evaluation.instruction_world import LONGEST_ANSWER, play, scores
from llama_jax.evaluation.versions import write_versions_report
from llama_jax.generation.llama import Llama
from llama_jax.generation.replies import reply_to, seed_of
from llama_jax.stages import rlhf
from llama_jax.stages.ppo import CONSTANT
from llama_jax.stages.rlhf import Collected, RLHFConfig
from llama_jax.text.chat import Llama2Chat, Message
from llama_jax.training.run_folder import make_folder, write_whole

TEMPERATURES, BATCH = (0.7, 1.3), 50  # of the two answers that are compared

paper_7b = RLHFConfig()
paper_70b = replace(
    paper_7b,
    reward=replace(paper_7b.reward, optimizer=replace(paper_7b.reward.optimizer, peak_lr=5e-6)),
    ppo=replace(paper_7b.ppo, beta=0.005),
)
toy = replace(
    paper_7b,
    mixes=(0.8, 0.5),  # so that few pairs of a small collection go to waste
    reward=replace(reward_toy, safety_weight=1.0),
    rejection=replace(paper_7b.rejection, samples=8, max_new_tokens=LONGEST_ANSWER),
    sft=replace(sft_toy, optimizer=replace(sft_toy.optimizer, peak_lr=5e-4), out=paper_7b.sft.out),
    ppo=replace(
        paper_7b.ppo,
        iterations=30,
        batch=64,
        mini_batch=32,
        max_new_tokens=LONGEST_ANSWER,
        optimizer=replace(CONSTANT, peak_lr=3e-5),
        critic=replace(CONSTANT, peak_lr=1e-4),
        compute=sft_toy.compute,
        accept_warnings=True,  # a small collection leaves few pairs to test a reward model on
    ),
    eval_prompts=100,
)


def asked(version: int, count: int) -> Iterator[tuple[tuple[Message, ...], world.Question]]:
    """Dialogues of a version's own, with annotators' best answers before the last question; with that question."""
    for number in range(count):
        *before, last = world.draw_dialogue(1000 + version, number)
        random, messages, said = Random(f"{version}/{number}/before"), [], ""
        for question in before:
            question = world.after(question, said)
            said = world.write_answer(random, question, world.BEST_GRADE)
            messages += [Message("user", question.prompt), Message("assistant", said)]
        last = world.after(last, said)
        yield (*messages, Message("user", last.prompt)), last


def answers_of(llama: Llama, prompts: Sequence[tuple[Message, ...]], version: int, which: int) -> list[str]:
    """The model's answer to each prompt, at one of the temperatures."""
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        part = [*prompts[start : start + BATCH]]
        seeds = [seed_of(version, which, number) for number in range(start, start + BATCH)]
        filled = part + part[:1] * (BATCH - len(part))  # a batch of another size would be compiled anew
        settings = {"max_new_tokens": LONGEST_ANSWER, "temperature": TEMPERATURES[which], "top_p": 1.0}
        texts += [reply.text for reply in reply_to(llama, filled, Llama2Chat(), seeds=seeds, **settings)][: len(part)]
    return texts


def annotate(version: int, llama: Llama, *, count: int) -> Collected:
    """What annotators think of two answers of the newest model to each of a version's questions, where they differ."""
    prompts, questions = zip(*asked(version, count), strict=True)
    kinds: tuple[list[dict], list[dict]] = [], []
    both = zip(*(answers_of(llama, prompts, version, which) for which in range(2)), strict=True)
    for number, (prompt, last, texts) in enumerate(zip(prompts, questions, both, strict=True)):
        if texts[0] == texts[1] or not all(texts):
            continue
        rejected, chosen = sorted(texts, key=partial(world.grade, last))
        strength, random = world.grade(last, chosen) - world.grade(last, rejected), Random(f"{version}/{number}/choice")
        if random.random() < world.MISTAKES[strength]:
            rejected, chosen = chosen, rejected
        safe = {"chosen_safe": not world.violates(last, chosen), "rejected_safe": not world.violates(last, rejected)}
        row = {"messages": [message._asdict() for message in prompt], "strength": strength, **safe}
        kinds[last.is_adversarial].append(row | {"chosen": chosen, "rejected": rejected})
    return Collected(*kinds)


def write_rows(path: str, rows: list[dict]) -> tuple[str, ...]:
    """Writes rows, and gives the path as sources; none if there are no rows."""
    write_whole(Path(path), "".join(json.dumps(row) + "\n" for row in rows).encode())
    return (path,) if rows else ()


def main(
    checkpoint: str,
    out: str = "runs/rlhf_versions",
    versions: int = 5,
    prompts: int = 500,
    known: int = 2000,
    pairs: int = 1000,
    dialogues: int = 200,
) -> None:
    """Makes the versions, going on where an earlier run stopped, and prints their report.

    Args:
      checkpoint: the fine-tuned model to begin with.
      out: the folder.
      versions: how many.
      prompts: that rejection sampling and PPO ask, beside the held-out ones.
      known: pairs of annotators' own answers, which there are before the first version, as the paper had public ones.
      pairs: of answers that annotators look at before each version.
      dialogues: held-out ones of the world, that its program grades.
    """
    make_folder(Path(out))
    written = [world.annotated(1, number) for number in range(prompts + toy.eval_prompts)]
    questions = write_rows(f"{out}/questions.jsonl", [{n: row[n] for n in ("messages", "risk")} for row in written])
    kinds: tuple[list[dict], list[dict]] = [], []
    for number in range(known):
        kinds[world.draw_dialogue(0, number)[-1].is_adversarial].append(world.preference(0, number))
    helpful, safe = map(write_rows, (f"{out}/helpful.jsonl", f"{out}/safe.jsonl"), kinds)
    config = replace(toy, data=replace(toy.data, sources=questions), preferences=helpful, safety_preferences=safe)
    rlhf.run(
        replace(config, checkpoint=checkpoint, versions=versions, out=f"{out}/rlhf"),
        annotate=partial(annotate, count=pairs),
        evaluate=lambda llama: scores(play(llama, dialogues=dialogues)),
        report=write_versions_report,
    )
    print((Path(out) / "rlhf" / "report.md").read_text())


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
