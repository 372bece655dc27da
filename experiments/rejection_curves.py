"""What the best of N answers is worth, by N and by temperature, before and after RLHF (paper 3.2.3, Figures 7 and 8).

Claim: the best of N answers scores higher the more there are, while their median stays; and after RLHF more answers want a
higher temperature. The paper's, read off the figures: from 1 to 100 answers the maximum rises from 0.56 to 0.66 and the median
stays at 0.54; after RLHF 1.2 to 1.3 is the best temperature for 10 to 100 answers, and it moves with every version.
Command: python -m experiments.rejection_curves --checkpoints runs/demo/sft runs/rlhf/v1/sft --reward runs/rm
Cost: 20,000 short answers a checkpoint, ten minutes on two CPU cores. Measured: see docs/experiments.md.
All N come from one pool of answers, by the unbiased estimator (llama_jax/evaluation/best_of_n.py). Scores are the reward
model's probabilities, as in the figures; an answer that says nothing is worth 0.
At full scale, of 7B and of 70B alike: --checkpoints Llama-2-7b-sft Llama-2-7b-chat-hf --data asked.jsonl --temperatures 0.6 0.7
0.8 0.9 1 1.1 1.2 1.3 1.4 1.5 --max-new-tokens 512. Not measured.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import tyro

from llama_jax.cli import end_of
from llama_jax.data import instruction_world as world
from llama_jax.data.prompts import PromptsConfig
from llama_jax.data.samples import is_scored, read_samples
from llama_jax.evaluation.best_of_n import Curves, best_of_n, curves_table, pools_by_temperature
from llama_jax.evaluation.instruction_world import LONGEST_ANSWER
from llama_jax.evaluation.report import table
from llama_jax.generation.held_out_answers import sigmoid
from llama_jax.stages import rejection
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.training.run_folder import make_folder, write_whole

Paths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHECKPOINT")]


def write_questions(path: Path, count: int) -> None:
    """Writes held-out dialogues of the instruction world, with best answers before the last question."""
    rows = []
    for number in range(count):
        random, messages, said = Random(f"{number}/curves"), [], ""
        for question in world.draw_dialogue(0, number, held_out=True):
            question = world.after(question, said)
            said = world.write_answer(random, question, world.BEST_GRADE)
            messages += [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": said}]
        rows.append(json.dumps({"messages": messages[:-1]}) + "\n")
    write_whole(path, "".join(rows).encode())


def curves_of(folder: Path) -> dict[float, Curves]:
    """The curves of each temperature, from the samples of a run of rejection sampling."""
    return {
        temperature: best_of_n(
            sigmoid(np.array([[one["score"] if is_scored(one) else -np.inf for one in samples] for samples in pool]))
        )
        for temperature, pool in pools_by_temperature(read_samples(folder)).items()
    }


def sizes_of(samples: int) -> list[int]:
    """The N whose best temperatures are looked for: 1, 10, 100 and whatever the largest is."""
    return sorted({n for n in (1, 10, 100) if n <= samples} | {samples})


def temperature_table(by_model: dict[str, dict[float, Curves]], sizes: Sequence[int]) -> str:
    """For each model and N the expected maximum at each temperature, and the temperature at which it is highest."""
    temperatures = list(next(iter(by_model.values())))
    rows = []
    for name, curves in by_model.items():
        for n in sizes:
            values = [curves[temperature].maximum[n - 1] for temperature in temperatures]
            rows.append((name, n, *(f"{value:.3f}" for value in values), temperatures[int(np.argmax(values))]))
    return table(("model", "N", *(f"T {temperature:g}" for temperature in temperatures), "best T"), rows)


def plot(by_model: dict[str, dict[float, Curves]], shown: float, sizes: Sequence[int], path: Path) -> None:
    """Draws both figures into a PNG: against N at one temperature, and against the temperature for some N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, curves) in enumerate(by_model.items()):
        numbers, color = np.arange(1, len(curves[shown].maximum) + 1), f"C{number}"
        left.plot(numbers, curves[shown].maximum, color=color, label=f"max, {name}")
        left.plot(numbers, curves[shown].median, "--", color=color, label=f"median, {name}")
        for n, style in zip(sizes, (":", "-", "--", "-."), strict=False):
            values = [one.maximum[n - 1] for one in curves.values()]
            right.plot(list(curves), values, style, marker="o", markersize=3, color=color, label=f"best of {n}, {name}")
    left.set(xlabel="samples N", ylabel="reward", title=f"temperature {shown:g}")
    right.set(xlabel="temperature", ylabel="reward")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def main(
    checkpoints: Paths,
    reward: str,
    out: Path = Path("runs/rejection_curves"),
    data: str = "",
    prompts: int = 40,
    samples: int = 100,
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2, 1.4),
    max_new_tokens: int = LONGEST_ANSWER,
    batch: int = 100,
) -> None:
    """Samples, scores, prints both tables and draws them; an interrupted experiment goes on in its folder.

    Args:
      checkpoints: the models: after fine-tuning, and after RLHF.
      reward: the reward model that judges them all.
      out: the folder of their samples and of rejection_curves.png.
      data: dialogues, the last questions of which are asked; held-out ones of the instruction world if empty.
      prompts: how many of these.
      samples: answers to each at each temperature.
      temperatures: at which to draw; the curves against N are those of the one nearest to 1.
      max_new_tokens: of an answer.
      batch: answers that are drawn side by side.
    """
    make_folder(out)
    if not data:
        write_questions(out / "questions.jsonl", prompts)
    by_model = {}
    for number, checkpoint in enumerate(checkpoints):
        folder = out / f"{number}"
        config = RejectionConfig(
            checkpoint=checkpoint,
            data=PromptsConfig(sources=(data or str(out / "questions.jsonl"),)),
            reward=reward,
            samples=samples,
            temperatures=temperatures,
            max_new_tokens=max_new_tokens,
            batch=batch,
            out=str(folder),
        )
        rejection.run(config)
        by_model[checkpoint] = curves_of(folder)
    shown = min(temperatures, key=lambda temperature: abs(temperature - 1))
    plot(by_model, shown, sizes_of(samples), out / "rejection_curves.png")
    print(curves_table({name: curves[shown] for name, curves in by_model.items()}))
    print(f"\n{temperature_table(by_model, sizes_of(samples))}")


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
