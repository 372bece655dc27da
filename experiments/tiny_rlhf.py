"""One version of RLHF on the tiny model: two reward models, rejection sampling, PPO on top (paper 3.2).

Claim: in five minutes on two CPU cores the fine-tuned model of the demo becomes better in truth, not by its reward models
alone: more right answers in whole sentences, hardly a violation.
Command: llama-jax demo, or llama-jax rlhf experiments/tiny_rlhf.py --checkpoint runs/demo/sft --data asked.jsonl
--preferences pairs.jsonl
Cost and measured scores: see docs/experiments.md.
"""

from dataclasses import replace

from llama_jax.config import Compute
from llama_jax.data.pairs import PreferenceConfig
from llama_jax.stages.ppo_config import CONSTANT, PPOConfig
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig

compute = Compute(dtype="float32", remat="none", loss_chunk=64)
config = RLHFConfig(
    versions=1,
    ppo_from=1,
    mixes=(0.8, 0.5),  # of a small collection as much as can be
    reward=RewardConfig(
        data=PreferenceConfig(held_out=0.05),
        pairs=16,
        safety_weight=1.0,
        optimizer=OptimizerConfig(peak_lr=5e-4, warmup_steps=0),
        compute=compute,
        loop=LoopConfig(log_every=50, eval_every=100, save_every=100),
    ),
    rejection=RejectionConfig(samples=8, max_new_tokens=40),
    sft=SFTConfig(
        rows=4,
        optimizer=OptimizerConfig(peak_lr=5e-4, warmup_steps=0),
        compute=compute,
        loop=LoopConfig(log_every=50, eval_every=0, save_every=200),
    ),
    ppo=PPOConfig(
        iterations=24,
        batch=64,
        mini_batch=16,
        critic_warmup=6,
        max_new_tokens=40,
        beta=0.1,  # a small reward model is soon fooled
        optimizer=replace(CONSTANT, peak_lr=1e-4),
        critic=replace(CONSTANT, peak_lr=1e-3),
        eval_prompts=60,
        accept_warnings=True,  # few pairs are left to test the reward models on
        compute=compute,
        loop=LoopConfig(log_every=5, eval_every=5, save_every=10),
    ),
    eval_prompts=60,
    out="runs/tiny-rlhf",
)
