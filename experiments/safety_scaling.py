"""The share of safety data (paper 4.2.3, Figure 15): more of it makes a model safer, and not less helpful.

Claim: with the helpfulness data fixed, the safety of a fine-tuned base model rises with its share of the safety data, and
helpfulness stays. The paper's mean scores, by its reward models, read off the figure: safety from 0.58 without safety data
to 0.76 with all of it, helpfulness flat at 0.59 to 0.60. Here the instruction world's program grades the answers, and
counts false refusals, of which the paper saw more with more safety data.
Command: python -m experiments.safety_scaling --checkpoint runs/demo/pretrain --out runs/safety_scaling
Cost: six times two to four minutes on two CPU cores. Measured: see docs/experiments.md.
Our choice: who writes the helpfulness data obeys whatever is asked, but few ask for what is not safe; the safety data is a
ninth of it, as the paper's 0.1M dialogues to 0.9M. At full scale, of 7B and of 70B alike: `llama-jax sft Llama-2-7b-hf --data
helpful.jsonl safety.jsonl`, whose defaults are the paper's two epochs at 2e-5 in batches of 64. Not measured.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import tyro

from experiments.tiny_sft import config as parent
from llama_jax.cli import end_of
from llama_jax.data.instruction_world import BEST_GRADE, SAFE_GRADES, after, draw_dialogue, write_answer
from llama_jax.evaluation.instruction_world import Answered, play, scores
from llama_jax.evaluation.report import plot_shares, table
from llama_jax.generation.llama import Llama
from llama_jax.stages import sft

SHARES = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)  # of the safety data; the paper's
HELPFUL_TO_SAFETY = 9
KEPT_ADVERSARIAL = 0.1  # share of the adversarial questions that people ask who want help
SAFETY_GRADES = (0.0, 0.0, 0.3, 0.7)

toy = replace(
    parent,
    rows=2,
    data=replace(parent.data, held_out=0.0),
    loop=replace(parent.loop, log_every=50, eval_every=0),
)


def written(safety: bool) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Rows of dialogues without end: those for safety are about adversarial questions, the others nearly never."""
    number = 0
    while True:
        random = Random(f"{number}/{safety}")
        questions, number = draw_dialogue(1 + safety, number), number + 1
        if safety and not questions[-1].is_adversarial:
            continue
        messages, said = [], ""
        for question in questions:
            question = after(question, said)
            if not safety and question.is_adversarial and random.random() >= KEPT_ADVERSARIAL:
                continue
            chances = SAFE_GRADES if not question.is_adversarial else SAFETY_GRADES if safety else (1.0, 0.0, 0.0, 0.0)
            (grade,) = random.choices(range(BEST_GRADE + 1), chances)
            said = write_answer(random, question, grade)
            messages += [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": said}]
        if messages:
            yield {"messages": messages}


def write(path: Path, count: int, safety: bool) -> str:
    """Writes so many rows, and gives the file's name."""
    rows = written(safety)
    path.write_text("".join(json.dumps(next(rows)) + "\n" for _ in range(count)))
    return str(path)


def measured(played: list[Answered]) -> dict[str, float]:
    """Mean grades over the best one, of adversarial and of safe questions, and what was obeyed or refused."""
    safety, helpfulness = (
        scores([one for one in played if one.question.is_adversarial is adversarial])["score"]
        for adversarial in (True, False)
    )
    counted = scores(played)
    names = ("violations", "false_refusals", "borderline_refusals")
    return {"safety": safety, "helpfulness": helpfulness} | {name: counted[name] for name in names}


def main(checkpoint: str, out: str = "runs/safety_scaling", dialogues: int = 1000, asked: int = 1000) -> None:
    """Fine-tunes a base model with each share of the safety data, and prints how safe and how helpful it is.

    Args:
      checkpoint: the base model; one that has read the instruction world's textbook, as the demo's has.
      out: the folder of the runs; an interrupted experiment goes on there.
      dialogues: of helpfulness.
      asked: held-out dialogues that each model is asked.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    helpful = write(folder / "helpful.jsonl", dialogues, safety=False)
    lines, by_share = [], {}
    for share in SHARES:
        name, count = f"{share:.0%}", round(share * dialogues / HELPFUL_TO_SAFETY)
        sources = (helpful, write(folder / f"safety_{count}.jsonl", count, safety=True)) if count else (helpful,)
        own = replace(
            toy, checkpoint=checkpoint, data=replace(toy.data, sources=sources), out=f"{out}/{100 * share:.0f}"
        )
        sft.run(own)
        by_share[name] = measured(play(Llama.load(own.out), dialogues=asked))
        lines.append((name, count, *(f"{value:.3f}" for value in by_share[name].values())))
    plot_shares(by_share, folder / "safety_scaling.png")
    print(table(("safety data", "dialogues", *(name.replace("_", " ") for name in by_share["0%"])), lines))


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
