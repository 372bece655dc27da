"""What a run says of itself: metrics.jsonl and TensorBoard for programs, one line a log interval for people."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.planning import hardware


class MetricsLog:
    """Appends to a run's metrics.jsonl and tensorboard/; only process 0 writes."""

    def __init__(self, folder: Path, step: int):
        """Opens the logs of a run that is at `step`: what a killed process logged beyond it is taken back."""
        self._file = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            rewritten = path.with_suffix(".jsonl.tmp")
            rewritten.write_text("".join(kept))
            rewritten.replace(path)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs values under their names, such as `train/loss`."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a last line that a killed process did not finish is left out.

    Raises:
      UserError: another line is no record.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if _step_of(line) == float("inf") and number < len(lines):
            raise UserError(
                f"{path}:{number} is no record of a step ({line[:60]!r}); delete the line, and the rest is read"
            )
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def improvement(folder: Path, name: str, title: str) -> str:
    """What an evaluation gave at first and at last, as a run's metrics have it; nothing if they do not."""
    if jax.process_index() != 0:
        return ""  # the one process that wrote them reads them, and speaks
    values = [record[name] for record in read_metrics(folder) if name in record]
    return f"; {title} {values[0]:.3f} before, {values[-1]:.3f} after" if len(values) > 1 else ""


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a killed process did not finish
        return float("inf")


def say(text: str) -> None:
    """Prints a line for people, on stderr, from process 0 alone."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def train_flops_per_token(model: LlamaConfig, length: int) -> float:
    """Model FLOPs of training on one token: forward and twice that backward, causal attention counted, recomputation
    not.
    """
    return 3 * forward_flops_per_token(model, length)


def forward_flops_per_token(model: LlamaConfig, length: int) -> float:
    """Model FLOPs of reading one token, which attends to the mean (length + 1) / 2 others, itself among them."""
    return model.matmul_flops_per_token() + model.causal_attention_flops_per_token(length)


def model_flops_utilisation(model: LlamaConfig, length: int, tokens_per_s: float) -> float | None:
    """Share of the devices' peak bf16 rate that went into model FLOPs; None where the peak is not known (CPU)."""
    chip = hardware.detect(jax.devices()[0])
    if chip is None:
        return None
    return tokens_per_s * train_flops_per_token(model, length) / (chip.device_peak_bf16_flops * jax.device_count())


def device_memory() -> tuple[float, float] | None:
    """Gigabytes in use and available on the first local device; None where the platform does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_in_use"] / 1e9, stats["bytes_limit"] / 1e9


def format_count(n: float) -> str:
    """A count with three digits: 41.2k, 6.74B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def format_duration(seconds: float) -> str:
    """A duration with its two largest units: 3h12, 4m05, 12s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{h}h{m:02}"
    return f"{m}m{s:02}" if minutes else f"{s}s"
