"""The settings of RLHF in versions: the paper's, and where it is silent, ours (see `llama_jax.stages.rlhf`)."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from llama_jax.data.prompts import PromptsConfig, check_sources
from llama_jax.errors import UserError
from llama_jax.stages.ppo_config import PPOConfig
from llama_jax.stages.rejection import RejectionConfig
from llama_jax.stages.reward import RewardConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.run_config import check_counts


@dataclass(frozen=True)
class RLHFConfig:
    """Some versions of RLHF, one from another."""

    checkpoint: str = ""
    """The fine-tuned chat model to begin with, of any form."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    """The prompts, of which some are held out; a row's category marks it as adversarial."""
    preferences: tuple[str, ...] = ()
    """Pairs for the helpfulness model, a source for each version: V2 has the first two. Behind the last there are no more."""
    safety_preferences: tuple[str, ...] = ()
    """Pairs for the safety model, likewise; without any, the helpfulness model judges everything."""
    mixes: tuple[float, float] = (0.5, 0.9)
    """Share of its own pairs in the training of the helpfulness model and of the safety model, the rest is the other's; an
    epoch ends where either would have to repeat itself.
    """
    versions: int = 5
    """How many; may be raised later."""
    ppo_from: int = 5
    """The first version with PPO on top."""
    pool_from: int = 4
    """The first version in which the samples of all earlier ones compete too."""
    start: Literal["checkpoint", "previous"] = "checkpoint"
    """What fine-tuning begins with: `checkpoint` in every version, or the version before."""
    # Our choice: the auxiliary loss has the weight of the ranking loss.
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(safety_weight=1.0))
    """How reward models are trained; the loss on safety labels is the safety model's alone."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    """How answers are drawn, those to held-out prompts too."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """How the best answers are trained on."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO, of which the threshold of the piecewise rule holds in all versions."""
    eval_prompts: int = 500
    """Prompts that are held out, to score every version by."""
    eval_temperature: float = 1.0
    """Divides the logits where these are answered; 0 takes the likeliest token."""
    plain: bool = False
    """Prompt and answer as plain text, instead of Llama 2's chat format."""
    seed: int = 0
    """Of everything that is drawn."""
    out: str = "runs/rlhf"
    """The folder of all versions: v1, v2, ..."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with what the folder holds: if it holds something; never (refuses such a folder); or fail without it."""
    dry_run: bool = False
    """Print the plan of all versions, and touch nothing."""


# What a version gives its stages itself; in the recipe of a stage it must stay as it is.
_GIVEN = ("checkpoint", "plain", "seed", "out", "resume", "dry_run")
GIVEN = {
    "reward": (*_GIVEN, "json", "data.sources", "data.weights"),
    "rejection": (*_GIVEN, "data", "reward", "pool"),
    "sft": (*_GIVEN, "json", "data.sources", "data.weights", "data.answers"),
    "ppo": (*_GIVEN, "json", "data", "helpfulness", "safety", "function"),
}
# Prompts are compared by what they turned out to be, and everything that a version depends on in its own recipe.
FREE_TO_CHANGE = (
    *("data", "preferences", "safety_preferences", "mixes", "versions", "ppo_from", "pool_from", "start"),
    *("reward", "rejection", "sft", "ppo", "out", "resume", "dry_run"),
)


def check(config: RLHFConfig, has_annotate: bool) -> None:
    """Raises UserError for settings that cannot be; `check_stages` does so for those of the stages."""
    if not config.checkpoint:
        raise UserError(
            "name the model to begin with: llama-jax rlhf CHECKPOINT --data FILE.jsonl --preferences PAIRS.jsonl"
        )
    check_sources(config.data)
    if not config.preferences and not has_annotate:
        raise UserError(
            "No preferences. Set --preferences to a .jsonl file of pairs for each version, hf:NAME or tfds:NAME."
        )
    check_counts(config, "versions", "ppo_from", "pool_from", "eval_prompts")
    if not all(0 < share < 1 for share in config.mixes):
        raise UserError(f"--mixes is {config.mixes}; expected two shares between 0 and 1, such as 0.5 0.9")
    if not 0 <= config.eval_temperature < float("inf"):
        raise UserError(f"--eval-temperature is {config.eval_temperature}; it must be 0 or more")
    for stage, names in GIVEN.items():
        for name in names:
            value_of = attrgetter(f"{stage}.{name}")
            if value_of(config) != value_of(RLHFConfig()):
                raise UserError(
                    f"--{stage}.{name.replace('_', '-')} is given by each version to its stages; leave it out (what it can "
                    "be told stands without a stage's name in llama-jax rlhf --help)"
                )
