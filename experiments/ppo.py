"""PPO against a reward model, held back by different KL weights (paper 3.2.3), with a program that knows the truth beside.

Claim: without enough of a KL penalty the reward goes on rising while the true score falls; with it both rise a little.
Command: python -m experiments.ppo --checkpoint runs/demo/rlhf/v1/sft --reward runs/demo/rlhf/v1/helpfulness
Cost: about two minutes on two CPU cores for each weight. Measured: see docs/experiments.md.
At full scale the recipes are the paper's: `llama-jax ppo experiments/ppo.py --checkpoint runs/v4-sft --data.sources asked.jsonl
--helpfulness runs/helpful --safety runs/safe` for 7B and 13B, with --beta 0.005 for 34B and 70B. Not measured.
"""

import dataclasses
from pathlib import Path

import tyro

from experiments.tiny_rlhf import config as tiny
from llama_jax.cli import end_of
from llama_jax.data.prompts import PromptsConfig
from llama_jax.demo_rlhf import questions
from llama_jax.evaluation.instruction_world import play, scores
from llama_jax.evaluation.ppo import write_ppo_report
from llama_jax.evaluation.report import table
from llama_jax.generation.llama import Llama
from llama_jax.stages import ppo
from llama_jax.stages.ppo import PPOConfig
from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import make_folder, write_rows

config = PPOConfig()  # the paper's, whose numbers are the defaults


def main(
    checkpoint: str,
    reward: str,
    out: str = "runs/ppo_beta",
    betas: tuple[float, ...] = (0.0, 0.1, 1.0),
    iterations: int = 30,
    asked: int = 900,
    dialogues: int = 300,
) -> None:
    """Trains once with each KL weight on questions of the instruction world, and prints what became of the model.

    Args:
      checkpoint: the chat model to begin with.
      reward: the reward model that judges.
      out: the folder of the runs; an interrupted experiment goes on there.
      betas: the weights.
      iterations: of each run.
      asked: dialogues that the questions are from.
      dialogues: held-out ones of the world, that its program grades.
    """
    make_folder(Path(out))
    path = Path(out) / "questions.jsonl"
    write_rows(path, questions(2, asked))

    def row(name: str, model: str, reward: str, kl: str) -> tuple[str, ...]:
        truth = scores(play(Llama.load(model), dialogues=dialogues, seed=7))
        return name, reward, kl, *(f"{truth[one]:.3f}" for one in ("score", "right", "violations", "false_refusals"))

    rows = [row("before", checkpoint, "", "")]
    for beta in betas:
        own = {"checkpoint": checkpoint, "helpfulness": reward, "beta": beta, "out": f"{out}/{beta:g}", "patience": 0}
        data = PromptsConfig(sources=(str(path),))
        ppo.run(dataclasses.replace(tiny.ppo, data=data, iterations=iterations, **own))
        write_ppo_report(own["out"])
        last = [one for one in read_metrics(Path(own["out"])) if "reward/mean" in one][-1]
        rows.append(row(f"{beta:g}", own["out"], f"{last['reward/mean']:.3f}", f"{last['kl/sequence']:.2f}"))
    print(table(("KL weight", "reward", "KL, nats", "true score", "right", "violations", "false refusals"), rows))


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
