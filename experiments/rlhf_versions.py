"""Five versions of RLHF at toy scale (paper 3.2 and 3.4.1, Figure 11), with a program that knows the right answers beside.

Claim: each version is better than the one before, by its reward models and in truth. The paper's share of wins against
ChatGPT, by its own reward models, goes from 39% (helpfulness) and 22% (harmlessness) after fine-tuning to 78% and 76% of V5
with PPO; GPT-4 sees 13% and 10% become 67% and 61%.
Command: python -m experiments.rlhf_versions --checkpoint runs/demo/sft --out runs/rlhf_versions
Cost: twenty minutes on two CPU cores. Measured: true of the reward models, not of the truth; see
docs/experiments.md.
Before each version the world's annotators choose, with their mistakes, between two answers of the newest model that were drawn
at different temperatures, as the paper's did every week. The program grades the versions; no model ever sees these grades.
At full scale `paper_7b` and `paper_70b` are the recipes: `llama-jax rlhf Llama-2-7b-sft --data asked.jsonl --preferences
week1.jsonl week2.jsonl ...`, whose defaults they are, for 70B with --reward.optimizer.peak-lr 5e-6 and --ppo.beta 0.005. The
paper ran it with 70B alone, and fine-tuned the smaller models on what 70B had answered: `llama-jax sft Llama-2-7b-sft --data
runs/rlhf/v4/reject/dialogues.jsonl --data.answers last`. Not measured.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import tyro

from experiments.tiny_rlhf import config as tiny
from llama_jax.cli import end_of
from llama_jax.data import instruction_world as world
from llama_jax.evaluation.instruction_world import compare_answers, play, scores
from llama_jax.evaluation.versions import write_versions_report
from llama_jax.generation.llama import Llama
from llama_jax.stages import rlhf
from llama_jax.stages.rlhf import Collected
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.training.run_folder import make_folder, write_rows

paper_7b = RLHFConfig()
paper_70b = replace(
    paper_7b,
    reward=replace(paper_7b.reward, optimizer=replace(paper_7b.reward.optimizer, peak_lr=5e-6)),
    ppo=replace(paper_7b.ppo, beta=0.005),
)
toy = replace(tiny, versions=5, ppo_from=5, eval_prompts=100)


def annotate(version: int, llama: Llama, *, count: int) -> Collected:
    """What annotators think of two answers of the newest model to each of a version's own questions, where they differ."""
    kinds: tuple[list[dict], list[dict]] = [], []
    for row, is_adversarial in compare_answers(llama, seed=1000 + version, count=count):
        kinds[is_adversarial].append(row)
    return Collected(*kinds)


def main(
    checkpoint: str,
    out: str = "runs/rlhf_versions",
    versions: int = 5,
    prompts: int = 250,
    known: int = 2000,
    pairs: int = 400,
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
    paths = [Path(out) / f"{name}.jsonl" for name in ("questions", "helpful", "safe")]
    written = (world.annotated(1, number) for number in range(prompts + toy.eval_prompts))
    write_rows(paths[0], ({name: row[name] for name in ("messages", "risk")} for row in written))
    kinds: tuple[list[dict], list[dict]] = [], []
    for number in range(known):
        kinds[world.draw_dialogue(0, number)[-1].is_adversarial].append(world.preference(0, number))
    for path, rows in zip(paths[1:], kinds, strict=True):
        write_rows(path, rows)
    # Without rows a file is no source.
    helpful, safe = ((str(path),) if rows else () for path, rows in zip(paths[1:], kinds, strict=True))
    data = replace(toy.data, sources=(str(paths[0]),))
    config = replace(toy, data=data, preferences=helpful, safety_preferences=safe)
    rlhf.run(
        replace(config, checkpoint=checkpoint, versions=versions, out=f"{out}/rlhf"),
        annotate=partial(annotate, count=pairs),
        evaluate=lambda llama: scores(play(llama, dialogues=dialogues)),
        report=write_versions_report,
    )
    print((Path(out) / "rlhf" / "report.md").read_text())


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
