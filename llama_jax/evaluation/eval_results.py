"""What an evaluation came to, as results.json and as a page, beside the paper's model of the nearest size."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.evaluation.benchmarks import Benchmark, group_average
from llama_jax.evaluation.eval_questions import Question
from llama_jax.evaluation.intervals import interval_of_mean
from llama_jax.evaluation.paper_scores import GROUPS, nearest_size, paper_average, paper_value
from llama_jax.evaluation.report import table

RESULTS, VERBALISED = "results.json", "verbalised.jsonl"


def rows_of(question: Question, tasks: Mapping[str, Any], found: Mapping[str, Mapping]) -> Iterator[dict[str, Any]]:
    """A row for each value that is reported of a question; of a group of tasks over all their questions.

    Args:
      question: of the suite.
      tasks: those of lm-eval that it is made of.
      found: what lm-eval gives for all.
    """
    first = next(iter(tasks))
    known = [key for key in found["results"][first] if "," in key and "_stderr" not in key]
    wanted = question.benchmark and question.benchmark.lm_eval_metric
    # A file of another shape has other metrics than lm-eval's task: the likelihood of a choice, or an exact match.
    keys = [wanted] if wanted in known else known[:1] if question.benchmark else known
    for key in keys:
        metric, _, kept = key.partition(",")
        asked = [(task, one) for name, task in tasks.items() for one in found["samples"][name] if one["filter"] == kept]
        of_filter = [one for _, one in asked]
        values = [one[metric] for one in of_filter]
        is_mean = all(isinstance(value, int | float | bool) for value in values)
        value = sum(map(float, values)) / len(values) if is_mean else found["results"][first][key]
        yield {
            "metric": metric,
            "n": len(of_filter),
            "value": value,
            "interval": interval_of_mean([float(value) for value in values]) if is_mean else None,
            "prompts": hashlib.sha256("".join(one["prompt_hash"] for one in of_filter).encode()).hexdigest()[:12],
            "samples": [_sample(task, one) for task, one in asked],
        }


def _sample(task: Any, one: Mapping[str, Any]) -> dict[str, Any]:
    """A question with its answer, for people to read; and as a text without the examples, for `llama-jax contamination`."""
    prompt = one["arguments"][0][0]
    answers = [list(given[0]) if isinstance(given[0], tuple) else given[0] for given in one["resps"]]
    scores = {name: one[name] for name in one["metrics"] if isinstance(one[name], int | float | bool)}
    choices = [pair[1] for pair in one["arguments"]] if isinstance(answers[0], list) else None
    question = task.doc_to_text(one["doc"])
    # Where the question is a place among beginnings, as in WinoGrande, these are what is read.
    beginnings = [pair[0] for pair in one["arguments"]] if not isinstance(question, str) else [question]
    text = "\n".join([*beginnings, *dict.fromkeys(part.strip() for part in choices or [str(one["target"])])])
    return {
        "prompt": prompt,
        "choices": choices,
        "answers": answers,
        "target": str(one["target"]),
        "text": text,
        **scores,
    }


def verbalised(rows: Sequence[Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping]]) -> Iterator[dict[str, Any]]:
    """Every question as `llama-jax contamination` reads it, with its score where that is from 0 to 1."""
    for row in {row["task"]: row for row in rows}.values():
        for number, one in enumerate(samples[row["task"]]):
            score = one.get(row["metric"])
            scored = {"score": float(score)} if score is not None and 0 <= score <= 1 else {}
            yield {"id": f"{row['task']}-{number}", "benchmark": row["task"], "text": one["text"]} | scored


def summary(checkpoint: str, n_params: int, rows: list[dict[str, Any]], truncated: int) -> dict[str, Any]:
    """What results.json holds: the rows with the paper's values beside them, and the groups that are whole."""
    size = nearest_size(n_params)
    scores = {}
    for row in rows:
        benchmark: Benchmark | None = row.pop("benchmark")
        metric = row["metric"] if row["metric"].startswith("pass@") else benchmark and benchmark.metric
        paper = paper_value(benchmark.name, size, row["shots"], metric) if benchmark else None
        is_share = row["interval"] is not None and 0 <= row["value"] <= 1
        row |= {
            "group": benchmark and benchmark.group,
            "paper": paper,
            "paper_model": f"Llama 2 {size}" if benchmark else None,
        }
        row["difference"] = 100 * row["value"] - paper if paper is not None and is_share else None
        row["differs"] = benchmark.differs if benchmark else ""
        if benchmark and metric == benchmark.metric:
            scores[benchmark.name] = 100 * row["value"]
    groups = []
    for group, title in GROUPS.items():
        if (value := group_average(group, scores)) is not None:
            paper = paper_average(group, size)
            groups.append({"group": title, "value": value, "paper": paper, "difference": value - paper})
    return {
        "checkpoint": checkpoint,
        "parameters": n_params,
        "paper_model": f"Llama 2 {size}",
        "tasks": rows,
        "groups": groups,
        "truncated": truncated,
    }


def sections(results: Mapping[str, Any]) -> list[str]:
    """The report: a table of tasks and one of groups, each beside the paper's."""
    size = results["paper_model"]
    header = ("task", "shots", "n", "metric", "value", "95%", f"{size}, paper", "difference", "prompts")
    parts = [table(header, map(_cells, results["tasks"]))]
    if results["groups"]:
        cells = [
            (one["group"], f"{one['value']:.1f}", f"{one['paper']:.1f}", f"{one['difference']:+.1f}")
            for one in results["groups"]
        ]
        parts.append(table(("group", "value", f"{size}, paper", "difference"), cells))
    if notes := [f"- {row['task']}: {row['differs']}." for row in results["tasks"] if row["differs"]]:
        parts.append("Where a task is known to differ from the paper's protocol:\n\n" + "\n".join(notes))
    cut = results["truncated"]
    parts.append(
        f"{results['parameters']:,} parameters; of the paper's models {size} is nearest in size. Shares are in percent, with "
        f"Wilson's intervals over the questions. {cut} prompts did not fit the context and lost their beginning. `prompts` is a "
        "hash of all prompts of a task: equal hashes were asked the same."
    )
    return parts


def _cells(row: Mapping[str, Any]) -> tuple:
    scale = 100 if row["interval"] is not None and 0 <= row["value"] <= 1 else 1
    interval = "" if row["interval"] is None else " to ".join(f"{scale * end:.1f}" for end in row["interval"])
    paper = "" if row["paper"] is None else f"{row['paper']:g}"
    difference = "" if row["difference"] is None else f"{row['difference']:+.1f}"
    shots = "" if row["shots"] is None else row["shots"]
    value = f"{scale * row['value']:.1f}" if scale == 100 else f"{row['value']:.4g}"
    return row["task"], shots, row["n"], row["metric"], value, interval, paper, difference, row["prompts"]
