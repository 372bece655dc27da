"""The settings of PPO: the paper's, and where it is silent, ours (see `llama_jax.stages.ppo`)."""

import math
from dataclasses import field, replace
from typing import Literal

from llama_jax.data.prompts import PromptsConfig, check_sources
from llama_jax.errors import UserError
from llama_jax.training.advantages import THRESHOLD
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig
from llama_jax.training.run_config import HOW_IT_COMPUTES, TuningConfig, check_bits, check_counts, run_dataclass

CONSTANT = OptimizerConfig(peak_lr=1e-6, warmup_steps=0, final_lr_ratio=1.0)


@run_dataclass
class PPOConfig(TuningConfig):
    """One run of PPO."""

    checkpoint: str = ""
    """The chat model to begin with, which is also the reference; of any form."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    """The prompts; a row's `risk` marks it as adversarial."""
    helpfulness: str = ""
    """The reward model of helpful answers: a run of llama-jax reward."""
    safety: str = ""
    """The reward model of safe answers, likewise; with one of the two alone, it judges everything."""
    function: str = ""
    """FILE.py:NAME, a function of dialogues that returns a number for each last answer, in place of reward models."""
    threshold: float = THRESHOLD
    """The safety model's probability below which it judges, whatever was asked."""
    accept_warnings: bool = False
    """Use reward models in spite of what their held-out scores say against them."""
    beta: float = 0.01
    """Weight of the KL divergence from the reference: 0.01 for 7B and 13B, 0.005 for 34B and 70B."""
    gamma: float = 1.0
    """Discount of each token."""
    lam: float = 0.95
    """Of generalised advantage estimation."""
    iterations: int = 400
    """Batches of answers, at most."""
    batch: int = 512
    """Answers of an iteration."""
    mini_batch: int = 64
    """Answers of a gradient step; each answer is in one."""
    clip: float = 0.2
    """How far a token's probability ratio may leave 1 before it is no longer rewarded."""
    temperature: float = 1.0
    """Divides the logits, where answers are drawn and wherever their probabilities are computed."""
    max_new_tokens: int = 512
    """Of an answer."""
    cut_penalty: float = 0.0
    """Taken from the whitened reward of an answer that max_new_tokens cut."""
    optimizer: OptimizerConfig = CONSTANT
    """The policy's: AdamW at a constant learning rate, where final_lr_ratio is 1."""
    critic: OptimizerConfig = CONSTANT
    """The critic's."""
    critic_warmup: int = 0
    """First iterations that train the critic alone; one that foresees nothing yet makes the first steps of a policy noise."""
    train: Literal["all", "lora"] = "all"
    """What is trained: every weight, or low-rank adapters beside one frozen backbone that all four models may share."""
    int8: bool = False
    """Keep the frozen backbone in 8 bits."""
    nf4: bool = False
    """Keep the frozen backbone in 4 bits, as QLoRA does."""
    eval_prompts: int = 64
    """Prompts that are held out, to stop by and to show answers to."""
    patience: int = 5
    """Stop after so many evaluations without a better mean reward on them; 0: never."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=1, eval_every=10, save_every=10))
    """How often to log, evaluate and save; counted in iterations."""
    rows: int = 64
    """Answers that are drawn side by side; a finished one makes room for the next. Memory and speed, not the result."""
    micro_batches: int = 0
    """Parts a mini-batch is split into, one after the other; the result is the same. Answers share rows, and parts that they
    leave empty cost nothing. 0: up to 8, as many as leave each device a row."""
    seed: int = 0
    """Of the order of prompts, of answers, heads and adapters."""
    out: str = "runs/ppo"
    """The run's folder; where held-out prompts gained most is its best/."""
    dry_run: bool = False
    """Print what was found, the mesh and the memory, and touch nothing."""


# What may differ between a run and its continuation. Models and prompts are compared by what they turned out to be.
FREE_TO_CHANGE = (
    *HOW_IT_COMPUTES,
    *("loop", "micro_batches", "rows", "patience"),
    *("iterations", "accept_warnings", "checkpoint", "data.sources", "helpfulness", "safety", "function"),
    *("mesh", "out", "resume", "dry_run", "json"),
)


def check(config: PPOConfig, has_score: bool) -> None:
    """Raises UserError for settings that cannot be."""
    if not config.checkpoint:
        raise UserError("name the model to begin with: llama-jax ppo CHECKPOINT --data FILE.jsonl --helpfulness RUN")
    check_sources(config.data)
    if has_score == bool(config.helpfulness or config.safety):
        raise UserError(
            "both a function and reward models were given; one of them judges"
            if has_score
            else "nothing judges: name a run of llama-jax reward with --helpfulness, --safety or both, or a Python "
            "function with --function FILE.py:NAME"
        )
    check_bits(config)
    check_counts(config, "iterations", "batch", "mini_batch", "max_new_tokens", "rows")
    if config.batch % config.mini_batch:
        fitting = [n for n in range(1, config.batch + 1) if config.batch % n == 0]
        raise UserError(
            f"--mini-batch {config.mini_batch} does not divide --batch {config.batch}; it may be one of {fitting}"
        )
    if config.micro_batches < 0 or (config.micro_batches and config.mini_batch % config.micro_batches):
        raise UserError(f"--micro-batches {config.micro_batches} does not divide --mini-batch {config.mini_batch}")
    ranges = {
        "temperature": (config.temperature, 0 < config.temperature < math.inf, "above 0"),
        "clip": (config.clip, 0 < config.clip < 1, "between 0 and 1"),
        "beta": (config.beta, 0 <= config.beta < math.inf, "0 or more"),
        "gamma": (config.gamma, 0 <= config.gamma <= 1, "from 0 to 1"),
        "lam": (config.lam, 0 <= config.lam <= 1, "from 0 to 1"),
        "threshold": (config.threshold, 0 <= config.threshold <= 1, "from 0 to 1"),
        "cut-penalty": (config.cut_penalty, 0 <= config.cut_penalty < math.inf, "0 or more"),
        "critic-warmup": (
            config.critic_warmup,
            0 <= config.critic_warmup < config.iterations,
            "0 or more, below --iterations",
        ),
    }
    for name, (value, is_right, expected) in ranges.items():
        if not is_right:
            raise UserError(f"--{name} is {value}; it must be {expected}")


def with_micro_batches(config: PPOConfig, ways: int) -> PPOConfig:
    """The recipe with its micro-batches counted, for rows that are split in so many `ways` over the devices."""
    fitting = [n for n in range(1, 9) if config.mini_batch % (n * ways) == 0]
    return replace(config, micro_batches=config.micro_batches or max(fitting, default=1))
