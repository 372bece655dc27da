"""Wins, ties and losses of one model against another (paper 3.4.2), whoever judged: people or a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.evaluation.intervals import wilson
from llama_jax.evaluation.report import table


@dataclass(frozen=True)
class Result:
    """What a comparison of two models' answers to one prompt came to."""

    prompt: str
    """Its id."""
    first: str
    """The model that comes first in the order of the files, wherever its answer stood."""
    second: str
    score: int
    """1 if the first model's answer is better, 0 for a tie, -1 if the second's is."""
    turns: int
    """How many messages of the user the prompt has."""
    category: str = ""


def share(count: int, of: int) -> dict[str, Any]:
    """A share with its interval, as JSON; None for the share of none."""
    low, high = wilson(count, of)
    return {"count": count, "of": of, "share": count / of if of else None, "low": low, "high": high}


def rates(results: Sequence[Result]) -> dict[str, Any]:
    """How often the first model wins, ties and loses, as JSON."""
    scores = [result.score for result in results]
    names = {"win": 1, "tie": 0, "loss": -1}
    return {"n": len(scores)} | {name: share(scores.count(score), len(scores)) for name, score in names.items()}


def win_rates(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each pair of models its rates over all prompts, by category and by number of turns, as JSON."""
    pairs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        pairs.setdefault((result.first, result.second), []).append(result)
    return [
        {"first": first, "second": second, "all": rates(own)}
        | {
            f"by_{name}": {str(value): rates(some) for value, some in grouped(own, name).items()}
            for name in ("category", "turns")
        }
        for (first, second), own in pairs.items()
    ]


def grouped(rows: Sequence[Any], name: str) -> dict[Any, list[Any]]:
    """Rows by one of their attributes, in its order; nothing if all have the same."""
    values = sorted({getattr(row, name) for row in rows})
    return {value: [row for row in rows if getattr(row, name) == value] for value in values} if len(values) > 1 else {}


def rates_table(pairs: Sequence[dict[str, Any]]) -> str:
    """The rates of pairs of models, as `win_rates` gives them, in Markdown."""
    rows = []
    for pair in pairs:
        name = f"{pair['first']} against {pair['second']}"
        groups = {"all": pair["all"], **pair["by_category"]}
        groups |= {f"turns: {turns}": own for turns, own in pair["by_turns"].items()}
        rows += [
            (name, group, own["n"], *(percent(own[kind]) for kind in ("win", "tie", "loss")))
            for group, own in groups.items()
        ]
    return table(("", "prompts", "n", "win %", "tie %", "loss %"), rows)


def percent(one: dict[str, Any]) -> str:
    """A share with its interval in percent, for people."""
    return (
        "-" if one["share"] is None else f"{one['share']:.1%} ({one['low']:.1%} to {one['high']:.1%})".replace("%", "")
    )
