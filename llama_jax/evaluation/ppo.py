"""The page on a run of PPO (paper 3.2.3): its curves, its first and last numbers, and how the held-out prompts fared."""

from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.evaluation.report import PPO_PANELS, plot_curves, table, write_page
from llama_jax.training.metrics import read_metrics


def write_ppo_report(folder: str | Path) -> Path:
    """Writes report.md with its plot into the folder of a run of PPO, from its metrics there.

    Raises:
      UserError: the run has logged no iteration.
    """
    folder = Path(folder)
    records = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    iterations = [record for record in records if "reward/mean" in record]
    if not iterations:
        raise UserError(f"{folder} has no iteration to report; expected the folder of a run of llama-jax ppo")
    plot_curves({folder.name: records}, folder / "ppo.png", PPO_PANELS, "iteration")
    names = [name for name in iterations[-1] if name != "step" and not name.endswith("skipped")]
    first, last = iterations[0], iterations[-1]
    held_out = [record for record in records if "eval/reward" in record]
    shown = [(one["step"], *(f"{one[f'eval/{name}']:.4g}" for name in ("reward", "length", "cut"))) for one in held_out]
    sections = [
        f"{last['step']} iterations; reward {first['reward/mean']:.4g} in the first and {last['reward/mean']:.4g} in the last, "
        f"{last['kl/sequence']:.3g} nats an answer from the reference; {last['time/generate']:.0%} of the time drawing answers.",
        "![Curves of the run](ppo.png)",
        table(("", "first iteration", "last"), [(name, _shown(first, name), _shown(last, name)) for name in names]),
    ]
    if held_out:
        sections += ["## Held-out prompts", table(("iteration", "reward", "length", "cut"), shown)]
    return write_page(folder / "report.md", f"PPO {folder.name}", sections)


def _shown(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.4g}" if name in record else ""
