"""Versions of a chat model by their answers to held-out prompts, as the paper chose among its models (3.4.1, Figure 11).

The newest reward models judge the answers of all versions, as the scores of two reward models do not compare.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.prompt_order import Prompt
from llama_jax.generation.answer_scores import Score, score_answers
from llama_jax.generation.llama import Llama
from llama_jax.generation.parts import complete, make_parts, parts_of, remove_parts
from llama_jax.generation.replies import Reply, reply_to, seed_of
from llama_jax.text.chat import Dialogue, Message, Template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.advantages import chosen_reward

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Judges:
    """Two reward models that judge together by the paper's piecewise rule (3.2.3), or one alone; a `Score`."""

    helpfulness: Score
    safety: Score | None
    categories: Mapping[Dialogue, str]
    """The risk category of each prompt; empty where it is not adversarial."""
    threshold: float
    """The safety model's probability below which it judges, whatever was asked."""

    def __call__(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """The score of each last answer (B,), before the sigmoid."""
        helpfulness_B = np.asarray(self.helpfulness(dialogues), np.float64)
        safety_B = None if self.safety is None else np.asarray(self.safety(dialogues), np.float64)
        adversarial_B = np.array([bool(self.categories[dialogue[:-1]]) for dialogue in dialogues])
        return self.combined(helpfulness_B, safety_B, adversarial_B)

    def combined(self, helpfulness_B: np.ndarray, safety_B: np.ndarray | None, adversarial_B: np.ndarray) -> np.ndarray:
        """The score (B,) of the model whose word it is, before the sigmoid as are theirs."""
        if safety_B is None:
            return helpfulness_B
        _, by_safety_B = chosen_reward(sigmoid(safety_B), sigmoid(helpfulness_B), adversarial_B, self.threshold)
        return np.where(by_safety_B, safety_B, helpfulness_B)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), in x's dtype; 0 at -inf."""
    return np.exp(-np.logaddexp(0, -x))


def answer_held_out(
    load: Callable[[], Llama],
    prompts: Sequence[Prompt],
    template: Template,
    folder: Path,
    *,
    max_new_tokens: int,
    temperature: float,
    batch: int,
    seed: int,
) -> None:
    """Writes an answer to each prompt into the folder's answers.jsonl, going on where it stopped.

    Args:
      load: gives the model; called if an answer is missing.
      prompts: all of which leave room for an answer.
      template: the chat format.
      folder: what is done is saved there, part by part.
      max_new_tokens: of an answer.
      temperature: divides the logits; 0 takes the likeliest token.
      batch: answers that are drawn side by side.
      seed: that of each prompt is made of it.

    Raises:
      Preempted: told to stop; the parts that are whole are saved.
    """
    parts = parts_of(len(prompts), 1, batch)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}

    def make_missing(missing: list[range]) -> None:
        (folder / "samples").mkdir(exist_ok=True)
        llama = load()

        def make(part: range) -> list[dict[str, Any]]:
            asked, seeds = [prompts[number] for number in part], [seed_of(seed, number) for number in part]
            replies = reply_to(llama, [prompt.dialogue for prompt in asked], template, seeds=seeds, **settings)
            return [row_of(prompt, reply, llama.tokenizer) for prompt, reply in zip(asked, replies, strict=True)]

        make_parts(folder, missing, len(prompts), make, len)

    complete(folder, parts, ANSWERS, make_missing)
    if (folder / "samples").exists():
        remove_parts(folder, parts)
        (folder / "samples").rmdir()


def row_of(prompt: Prompt, reply: Reply, tokenizer: Tokenizer) -> dict[str, Any]:
    """An answer as it is saved."""
    return {
        "prompt": [message._asdict() for message in prompt.dialogue],
        "risk": prompt.category,
        "text": reply.text,
        "ended": reply.ended,
        "tokens": len(tokenizer.encode(reply.text, bos=False)),
    }


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The rows that `answer_held_out` wrote."""
    return [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").split("\n") if line]


def compare(judges: Judges, versions: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float | None]]:
    """What judges make of the answers of each version, oldest first, to the same prompts.

    Args:
      judges: the newest.
      versions: the rows of each, as `read_answers` gives them.

    Returns:
      of each version:
        helpfulness: its mean probability over prompts that are not adversarial; over all, if there is no safety model.
        safety: its mean probability over adversarial prompts, or over all if there are none; None without a safety model.
        reward: the mean probability that the piecewise rule gives, over all prompts.
        wins: share of prompts whose answer has a higher reward than the version before gave, ties apart; None for the first
          version, and if all are ties. wins_over_first, likewise.
        tokens: mean length of an answer.
        cut: share of answers that the limit ended.
    """
    rewards, numbers = [], []
    for rows in versions:
        helpfulness_B, safety_B = (_judged(score, rows) for score in (judges.helpfulness, judges.safety))
        adversarial_B = np.array([bool(row["risk"]) for row in rows])
        rewards.append(judges.combined(helpfulness_B, safety_B, adversarial_B))
        numbers.append(
            {
                "helpfulness": _mean(helpfulness_B, ~adversarial_B if judges.safety else np.full(len(rows), True)),
                "safety": None if safety_B is None else _mean(safety_B, adversarial_B),
                "reward": float(sigmoid(rewards[-1]).mean()),
                "wins": wins(rewards[-1], rewards[-2]) if len(rewards) > 1 else None,
                "wins_over_first": wins(rewards[-1], rewards[0]) if len(rewards) > 1 else None,
                "tokens": float(np.mean([row["tokens"] for row in rows])),
                "cut": float(np.mean([row["ended"] == "too long" for row in rows])),
            }
        )
    return numbers


def _judged(score: Score | None, rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """The score of each answer, before the sigmoid; -inf where there is nothing to judge. None without a judge."""
    if score is None:
        return None
    prompts = (tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]) for row in rows)
    answers = [(prompt, row["text"]) for prompt, row in zip(prompts, rows, strict=True)]
    return np.array([-np.inf if value is None else value for value in score_answers(score, answers)])


def _mean(scores_B: np.ndarray, mask_B: np.ndarray) -> float:
    """The mean probability of those that the mask keeps; of all, if it keeps none."""
    return float(sigmoid(scores_B[mask_B] if mask_B.any() else scores_B).mean())


def wins(reward_B: np.ndarray, other_B: np.ndarray) -> float | None:
    """Share of prompts with a higher reward than the other's, ties apart; None if all are ties."""
    more, less = int((reward_B > other_B).sum()), int((reward_B < other_B).sum())
    return more / (more + less) if more + less else None
