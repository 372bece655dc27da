"""The demo's second half: what preferences and preprompts add to the fine-tuned model (paper 3.2 and 4.2).

The world's annotators compare answers, their own and the model's; its program grades what comes of it, and never judges while
anything is trained.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_jax.data.instruction_world import PREPROMPTS, annotated, draw_dialogue, opened, preference
from llama_jax.data.prompts import PromptsConfig
from llama_jax.evaluation.distillation import write_distillation_report
from llama_jax.evaluation.instruction_world import LONGEST_ANSWER, compare_answers
from llama_jax.evaluation.versions import write_versions_report
from llama_jax.generation.llama import Llama
from llama_jax.recipes import load_recipe
from llama_jax.stages import distillation, rlhf, sft
from llama_jax.stages.distillation import DistillationConfig
from llama_jax.stages.rlhf import Collected
from llama_jax.stages.rlhf_config import RLHFConfig
from llama_jax.stages.rlhf_version import plan
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.run_folder import write_rows

LONGEST_DIALOGUE = 3  # messages: two questions and the answer between; longer ones cost a laptop too much time


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults take five minutes on two cores."""

    pairs: int = 3000
    """Comparisons of annotators' own answers."""
    compared: int = 1500
    """Dialogues to which two answers of the fine-tuned model are compared."""
    questions: int = 900
    """Asked in rejection sampling and PPO."""
    adversarial: int = 300
    """Asked to be distilled."""
    held_out: int = 60
    """Of these to compare models by, and again to end PPO by."""
    samples: int = 2
    """Answers of rejection sampling to each."""
    iterations: int = 24
    """Of PPO."""


def distil(folder: Path, checkpoint: str, judge: str, mesh: str, seed: int, sizes: Sizes) -> str:
    """Fine-tunes a model on its own answers behind safety preprompts, where the safety model prefers them (paper 4.2.4), with
    annotators' answers to safe questions beside these; gives the run's folder.
    """
    asked, safe, preprompts = (folder / f"{name}.jsonl" for name in ("adversarial", "safe", "preprompts"))
    write_rows(asked, (row for row in questions(seed + 3, sizes.adversarial * 5) if row["risk"]))
    write_rows(safe, (row for number in range(sizes.adversarial * 4) if not (row := annotated(seed, number))["risk"]))
    preprompts.write_text(json.dumps(PREPROMPTS))
    config = DistillationConfig(
        checkpoint=checkpoint,
        data=PromptsConfig(sources=(str(asked),)),
        reward=judge,
        preprompts=str(preprompts),
        max_new_tokens=LONGEST_ANSWER,
        seed=seed,
        out=str(folder / "distil"),
    )
    distillation.run(config)
    write_distillation_report(config.out)
    recipe: SFTConfig = load_recipe("tiny_rlhf", RLHFConfig).sft
    sources = (f"{config.out}/{distillation.DIALOGUES}", str(safe))
    data = dataclasses.replace(recipe.data, sources=sources, weights=(0.3, 0.7), answers="last")
    out = str(folder / "distilled")
    sft.run(dataclasses.replace(recipe, checkpoint=checkpoint, data=data, epochs=1, mesh=mesh, seed=seed, out=out))
    return out


def rlhf_config(folder: Path, checkpoint: str, mesh: str, seed: int, sizes: Sizes) -> RLHFConfig:
    """The tiny recipe, on questions of the world."""
    asked = folder / "questions.jsonl"
    recipe: RLHFConfig = load_recipe("tiny_rlhf", RLHFConfig)
    return dataclasses.replace(
        recipe,
        checkpoint=checkpoint,
        data=PromptsConfig(sources=(str(asked),)),
        sft=dataclasses.replace(recipe.sft, mesh=mesh),
        rejection=dataclasses.replace(recipe.rejection, samples=sizes.samples),
        ppo=dataclasses.replace(
            recipe.ppo,
            iterations=sizes.iterations,
            critic_warmup=sizes.iterations // 4,  # the recipe's share
            eval_prompts=sizes.held_out,
        ),
        eval_prompts=sizes.held_out,
        seed=seed,
        out=str(folder / "rlhf"),
    )


def learn_from_preferences(config: RLHFConfig, sizes: Sizes) -> dict[str, str]:
    """Runs a version of RLHF; gives the folders of what comes of it: of its reward models, and of its models in order."""
    (asked,) = config.data.sources
    write_rows(Path(asked), questions(config.seed + 2, sizes.questions))
    rlhf.run(
        config, annotate=lambda _, llama: annotators_compare(llama, config.seed, sizes), report=write_versions_report
    )
    version = plan(config, 1)
    return {"safety": version.safety.out, "RS": version.sft.out, "PPO": version.model}


def annotators_compare(llama: Llama, seed: int, sizes: Sizes) -> Collected:
    """What annotators prefer of their own answers and of the model's, apart for questions that are adversarial."""
    kinds: tuple[list[dict], list[dict]] = [], []
    own = ((preference(seed, number), draw_dialogue(seed, number)[-1].is_adversarial) for number in range(sizes.pairs))
    for row, is_adversarial in (*own, *compare_answers(llama, seed=seed + 1, count=sizes.compared)):
        if len(row["messages"]) <= LONGEST_DIALOGUE:
            kinds[is_adversarial].append(row)
    return Collected(*kinds)


def questions(seed: int, count: int) -> Iterator[dict[str, object]]:
    """The last questions of so many short dialogues, with what was said before and their risk categories."""
    for number in range(count):
        messages, last = opened(seed, number)
        if len(messages) <= LONGEST_DIALOGUE:
            yield {"messages": messages, "risk": last.skill if last.is_adversarial else ""}
