"""The tiny model learns to talk, from dialogues of all qualities (paper 3.1: fine-tuning before any preference).

Claim: in two minutes on two CPU cores, a model that continues text comes to answer held-out questions of the instruction
world (llama_jax/data/instruction_world.py); as often as its annotators it is bare, wrong or unsafe, which is left to RLHF.
Command: llama-jax demo, or llama-jax sft experiments/tiny_sft.py --checkpoint runs/tiny --data mine.jsonl
"""

from llama_jax.config import Compute
from llama_jax.data.examples import DialogueConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig

config = SFTConfig(
    data=DialogueConfig(held_out=0.02),
    rows=4,
    optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0),
    compute=Compute(dtype="float32", remat="none", loss_chunk=64),
    loop=LoopConfig(log_every=20, eval_every=200, save_every=200),
    out="runs/tiny-sft",
)
