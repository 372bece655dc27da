"""What a set of preferences is like, as the paper's Table 6 tells it, and how far its annotators agree (3.2.1)."""

from typing import Any

import numpy as np

from llama_jax.data.pairs import UNKNOWN, LoadedPairs, Pairs
from llama_jax.data.preferences import Strength
from llama_jax.text.chat import Encoded, shown
from llama_jax.text.tokenizer import Tokenizer


def described(loaded: LoadedPairs) -> dict[str, dict[str, float]]:
    """Statistics and agreement of each source's pairs to train on."""
    return {
        found.source: statistics(loaded.train, numbers) | agreement(loaded.train, numbers)
        for number, found in enumerate(loaded.found[: len(loaded.train.sizes)])
        if len(numbers := np.flatnonzero(loaded.train.source == number))
    }


def pairs_as_json(loaded: LoadedPairs, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a dry run shows of pairs: the statistics of each source, and the first pair."""
    return {"data": described(loaded), "pair": shown_pair(loaded.train, tokenizer)}


def pairs_as_text(loaded: LoadedPairs, tokenizer: Tokenizer) -> str:
    """`pairs_as_json` for people."""
    tables = (
        f"--- {source}: " + ", ".join(f"{name} {value:.4g}" for name, value in table.items())
        for source, table in described(loaded).items()
    )
    chosen, rejected = shown_pair(loaded.train, tokenizer)
    return "\n".join([*tables, f"--- chosen\n{chosen}\n--- rejected\n{rejected}"])


def shown_pair(pairs: Pairs, tokenizer: Tokenizer) -> list[str]:
    """Both dialogues of the first pair as text, the chosen one first, their last answers between arrows."""
    return [
        shown(tokenizer, Encoded(ids.tolist(), [False] * (len(ids) - answer) + [True] * answer), ("\u00bb", "\u00ab"))
        for ids, answer in zip(pairs[0], pairs.answers[0].tolist(), strict=True)
    ]


def statistics(pairs: Pairs, numbers: np.ndarray) -> dict[str, float]:
    """What the paper's Table 6 says of a data set, of the pairs of these numbers: comparisons, and means of questions in a
    dialogue, of tokens in an example (dialogue and one answer), in a question and in a judged answer.

    The paper's prompt is one question: 31.4 tokens where 3.9 turns have 798.5 in all.
    """
    answers, lengths = pairs.answers[numbers], pairs.lengths[numbers]
    return {
        "comparisons": len(numbers),
        "turns per dialogue": float(pairs.turns[numbers].mean()),
        "tokens per example": float(lengths.mean()),
        "tokens in prompt": float((pairs.questions[numbers] / pairs.turns[numbers]).mean()),
        "tokens in response": float(answers.mean()),
    }


def agreement(pairs: Pairs, numbers: np.ndarray) -> dict[str, float]:
    """How much annotators see between two answers, of the pairs of these numbers: the share of each strength, and of each
    safety label, among the pairs that have one.
    """
    strength, safe = pairs.strength[numbers], pairs.safe[numbers]
    known, labelled = strength[strength != UNKNOWN], safe[(safe != UNKNOWN).all(1)]
    shares = {level.name.lower(): float((known == level).mean()) for level in reversed(Strength) if len(known)}
    labels = {"chosen safe": (1, 0), "both safe": (1, 1), "both unsafe": (0, 0)}
    return shares | {name: float((labelled == label).all(1).mean()) for name, label in labels.items() if len(labelled)}
