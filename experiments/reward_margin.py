"""Reward models without a margin, with a small and with a large one (paper 3.2.2, Tables 8, 27 and 28), at toy scale.

Claim: accuracy grows with the strength of a preference, and margins help most where the strength is greatest.
The paper's, in percent (significantly, better, slightly, unsure; all): none 79.1 66.9 59.8 54.5; 62.5, small 80.4 67.3 60.4
55.0; 63.0, large 80.7 67.5 60.5 54.3; 62.9.
Command: python -m experiments.reward_margin --checkpoint runs/demo/sft --out runs/reward_margin
Cost: three times two to three minutes on two CPU cores. Measured: see docs/experiments.md.
At full scale the recipes below are the paper's two models, of 7B: `llama-jax reward experiments/reward_margin.py --checkpoint
Llama-2-7b-chat-hf` with --data.sources and the mixes' --data.weights; of 70B with --optimizer.peak-lr 5e-6. Not measured.
"""

import json
from dataclasses import replace
from pathlib import Path

import tyro

from llama_jax.cli import end_of
from llama_jax.config import Compute
from llama_jax.data.instruction_world import preference
from llama_jax.data.pairs import PreferenceConfig
from llama_jax.evaluation.rewards import accuracy_table, read_scores, write_reward_report
from llama_jax.stages import reward
from llama_jax.stages.reward import RewardConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig
from llama_jax.training.preference_loss import LARGE_MARGINS, NO_MARGINS, SMALL_MARGINS

MARGINS = {"none": NO_MARGINS, "small": SMALL_MARGINS, "large": LARGE_MARGINS}
# Half Meta's helpfulness pairs, half Meta's safety and open pairs alike; and nine tenths safety and Anthropic's harmless
# pairs, one tenth helpfulness, with the loss on safety labels beside the other.
config = helpfulness = RewardConfig(data=PreferenceConfig(weights=(50, 50)))
safety = RewardConfig(data=PreferenceConfig(weights=(90, 10)), safety_weight=1.0)
toy = RewardConfig(
    data=PreferenceConfig(held_out=0.05),
    pairs=16,
    optimizer=OptimizerConfig(peak_lr=5e-4, warmup_steps=0),
    compute=Compute(dtype="float32", remat="none"),
    loop=LoopConfig(log_every=50, eval_every=100, save_every=100),
)


def main(checkpoint: str, out: str = "runs/reward_margin", pairs: int = 2000, tests: int = 1000) -> None:
    """Trains one model with each margin on pairs of the instruction world, and prints their accuracy on unseen questions.

    Args:
      checkpoint: the chat model to begin with.
      out: the folder of the three runs; an interrupted experiment goes on there.
      pairs: to train on.
      tests: pairs of held-out questions.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("pairs", pairs, False), ("tests", tests, True)):
        rows = (preference(0, number, held_out=held_out) for number in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"sources": (f"{out}/pairs.jsonl",), "tests": (f"{out}/tests.jsonl",)}
    lines = []
    for name, margins in MARGINS.items():
        own = replace(
            toy, checkpoint=checkpoint, data=replace(toy.data, **sources), margins=margins, out=f"{out}/{name}"
        )
        reward.run(own)
        write_reward_report(own.out)
        ((_, *accuracies, _),) = accuracy_table(row for row in read_scores(own.out) if row["set"] == "test")
        lines.append(f"| {name} | {' | '.join(accuracies)} |")
    print("| margin | significantly | better | slightly | negligibly | all |")
    print("|---|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
