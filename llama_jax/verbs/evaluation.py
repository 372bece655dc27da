"""The verb that asks a model the paper's benchmarks: eval."""

import json
from collections.abc import Sequence
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.verbs.arguments import Json, call, config_with_flags, show_fields

TEXT = """Ask a model the paper's benchmarks, and set its scores beside the paper's.

The tasks are lm-eval's (pip install 'llama-jax[eval]') with the paper's shots and metrics; a benchmark may also come from a
file in its public form. Every answer is kept in the folder as it comes: an evaluation that was interrupted goes on when it is
started again with the same --out. Programs that the model writes are run with --run-code alone, contained.

Examples:
  llama-jax eval Llama-2-7b-hf --out runs/eval-7b --run-code
  llama-jax eval runs/mine --tasks piqa hellaswag gsm8k --limit 200
  llama-jax eval runs/mine --files piqa=piqa.jsonl mmlu=test.csv,dev.csv --shots 5
  llama-jax eval runs/mine-sft --suite chat --mesh auto
  llama-jax eval runs/mine-sft --suite safety --safety.toxigen toxigen/*.txt --safety.bold bold/*.json --safety.chat
  llama-jax eval --table 3
  llama-jax eval --table 20 --results runs/eval-7b"""


def eval(argv: Sequence[str]) -> None:
    """Takes a checkpoint and asks it a suite, or prints a table of the paper."""
    if any(word.partition("=")[0] == "--table" for word in argv):
        call(_table, "eval", argv)
        return
    from llama_jax.evaluation.eval_config import EvalConfig
    from llama_jax.evaluation.eval_run import run

    if argv and argv[0] in ("-h", "--help"):
        show_fields(EvalConfig, "eval CHECKPOINT", TEXT)
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first: llama-jax eval CHECKPOINT --suite table3 (llama-jax eval --help)")
    run(config_with_flags(EvalConfig(checkpoint=argv[0]), f"eval {argv[0]}", TEXT, argv[1:]))


def _table(*, table: int, results: str | None = None, json_: Json = False) -> None:
    """Print a table of the paper, with what an evaluation measured in a line below it.

    Examples:
      llama-jax eval --table 3
      llama-jax eval --table 20 --results runs/eval-7b

    Args:
      table: Its number in the paper.
      results: The folder of an evaluation.
      json_: Print it as JSON, the text of the table in one field.
    """
    from llama_jax.evaluation.benchmarks import SUITE
    from llama_jax.evaluation.eval_results import RESULTS
    from llama_jax.evaluation.paper_scores import Measure
    from llama_jax.evaluation.paper_tables import table_as_text

    measured, name = {}, "measured"
    if results is not None:
        path = Path(results) / RESULTS
        if not path.is_file():
            raise UserError(f"{results} holds no {RESULTS}; llama-jax eval CHECKPOINT --out {results} writes one")
        found = json.loads(path.read_text())
        name = found["checkpoint"]
        known = {one.name: one for one in SUITE}
        for row in found["tasks"]:
            if row["task"] in known:
                metric = row["metric"] if row["metric"].startswith("pass@") else known[row["task"]].metric
                measured[Measure(row["task"], row["shots"], metric)] = 100 * row["value"]
    text = table_as_text(table, measured or None, name)
    print(json.dumps({"table": table, "markdown": text}) if json_ else text)
