"""The training loop: data, step, log, evaluate, save, in that order, the same for every stage."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.data.packing import Batch, Cursor
from llama_jax.errors import Diverged, Preempted
from llama_jax.parallel import distributed
from llama_jax.training.batches import to_devices
from llama_jax.training.metrics import (
    MetricsLog,
    device_memory,
    format_count,
    format_duration,
    model_flops_utilisation,
    say,
)
from llama_jax.training.preemption import StopSignal
from llama_jax.training.step import StepMetrics, TrainState

# Our choice: a single bad batch is survivable, three in a row mean the weights or the recipe are at fault.
MAX_SKIPPED_IN_ROW = 3


@dataclass(frozen=True)
class LoopConfig:
    """How often a run logs, evaluates and saves. Counted in steps."""

    log_every: int = 10
    """Steps between two log lines, and after the last step. 0: only steps that were skipped."""
    eval_every: int = 1000
    """Steps between two evaluations on the held-out documents, and after the last step. 0: never."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step always saves. 0: only the last."""
    keep_last: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep the checkpoints of steps divisible by this. 0: none beyond keep_last."""
    profile_steps: int = 0
    """Trace so many steps with the JAX profiler, from the fifth step on, into the run's profile/. 0: none."""
    lost_after: int = 60
    """Of several processes: seconds of silence behind which one is lost, and the others end with 42 to be started again."""
    hang_after: int = 600
    """Of several processes: seconds without a further step behind which every host's last one is reported."""


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    batches: Iterator[tuple[Batch, Cursor]],
    *,
    model: LlamaConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    total_steps: int,
    loop: LoopConfig,
    schedule: Callable[[int], float],
    folder: Path,
    save: Callable[[TrainState, Cursor], None],
    evaluate: Callable[[TrainState], dict[str, float]],
    evaluate_first: bool = False,
) -> TrainState:
    """Trains until `total_steps`, from wherever `state` stands.

    Metrics are read one step late, so that the device never waits for the log.

    Args:
      state: what to begin with; donated.
      train_step: from `make_train_step`; what its objective reports beside the loss are sums by name, which are logged.
      batches: this process's rows of the batches that come after `state.step`, and the cursor behind each.
      model: the architecture, for FLOPs.
      rows: sequences of the global batch.
      length: tokens of a sequence.
      mesh: where the batches go.
      total_steps: step at which training is done.
      loop: how often to do what.
      schedule: learning rate of a step, for the log.
      folder: the run's folder, for the logs.
      save: starts a checkpoint.
      evaluate: scores of a state, under their log names.
      evaluate_first: also before the first step, where `loop` asks for evaluations at all.

    Raises:
      Diverged: three steps in a row were not finite.
      Preempted: told to stop; the state has been handed to `save`.
    """
    start = int(state.step)
    log = MetricsLog(folder, start or -1)  # a run that begins again has logged nothing, step 0 included
    clock = Clock(model, rows * length, length, start, total_steps)
    pending: tuple[int, StepMetrics] | None = None

    def report() -> None:
        if pending is not None:
            record(log, clock, loop, schedule, *pending)

    def score(done: int) -> None:
        if scored := evaluate(state):
            log.write(done, scored)
            say(f"step {done} " + " ".join(f"{name} {value:.4f}" for name, value in scored.items()))
        clock.restart(done)

    try:
        with StopSignal() as stop:
            if evaluate_first and loop.eval_every and not start:
                score(0)
            for step in range(start, total_steps):
                profile(loop, folder, step - start)
                distributed.note_step(step + 1)
                asked = time.monotonic()
                local, cursor = next(batches)
                clock.waited += time.monotonic() - asked
                state, metrics = train_step(state, to_devices(mesh, local, rows))
                report()
                pending = (step + 1, metrics)
                done = step + 1
                if due(loop.eval_every, done, total_steps):
                    report()
                    pending = None
                    score(done)
                stopped_by = stop.received(done)
                if stopped_by or done == total_steps or due(loop.save_every, done, total_steps):
                    report()
                    pending = None
                    save(state, cursor)
                if stopped_by and done < total_steps:
                    raise Preempted(
                        f"{stopped_by} received: step {done} is saved; start the same command again to go on"
                    )
            report()
    finally:
        log.close()
    return state


def due(every: int, done: int, total: int) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now; never if `every` is 0."""
    return bool(every) and (done % every == 0 or done == total)


def profile(loop: LoopConfig, folder: Path, steps_done: int) -> None:
    """Starts and ends the profiler's trace around the steps that `profile_steps` asks for; the first four compile and
    warm up.
    """
    if loop.profile_steps and steps_done == 4:
        jax.profiler.start_trace(str(folder / "profile"))
    if loop.profile_steps and steps_done == 4 + loop.profile_steps:
        jax.profiler.stop_trace()
        say(f"profile of {loop.profile_steps} steps in {folder / 'profile'}; see it: tensorboard --logdir {folder}")


def record(
    log: MetricsLog, clock: "Clock", loop: LoopConfig, schedule: Callable[[int], float], done: int, metrics: StepMetrics
) -> None:
    """Waits for one step's metrics, logs them, and ends the run where it has diverged.

    Raises:
      Diverged: three steps in a row were not finite.
    """
    m = jax.tree.map(lambda value: np.asarray(value).item(), metrics._replace(extras=()))
    if m.skipped_in_row >= MAX_SKIPPED_IN_ROW:
        raise Diverged(
            f"loss or gradient was not finite in {m.skipped_in_row} steps in a row, up to step {done}. "
            "Lower --optimizer.peak-lr or look at the data, then start the same command again from the last checkpoint"
        )
    if not (due(loop.log_every, done, clock.total) or m.skipped_in_row):
        return
    speed = clock.lap(done)
    lr = float(schedule(done - 1 - m.skipped))  # a skipped step does not advance the schedule
    extras = {f"train/{name}": np.sum(parts).item() for name, parts in dict(metrics.extras).items()}
    values = {
        "train/loss": m.loss,
        "train/accuracy": m.accuracy,
        "train/lr": lr,
        "train/grad_norm": m.grad_norm,
        "train/targets": m.targets,
        "train/skipped": m.skipped,
        "train/tokens_per_s": speed.tokens_per_s,
        "train/data_wait": speed.data_wait,
        **({} if speed.mfu is None else {"train/mfu": speed.mfu}),
        **extras,
    }
    log.write(done, {name: value for name, value in values.items() if math.isfinite(value)})
    line = f"step {done}/{clock.total} {done / clock.total:.1%} loss {m.loss:.3f} lr {lr:.1e} gnorm {m.grad_norm:.2f}"
    line += f" {format_count(speed.tokens_per_s)} tok/s"
    line += "" if speed.mfu is None else f" MFU {speed.mfu:.0%}"
    memory = device_memory()
    line += "" if memory is None else f" HBM {memory[0]:.1f}/{memory[1]:.1f}"
    line += f" data-wait {speed.data_wait:.1%} eta {format_duration(speed.eta)}"
    say(line + (f" SKIPPED {m.skipped} steps so far, not finite" if m.skipped_in_row else ""))


@dataclass(frozen=True)
class Speed:
    """How fast a log interval was; MFU as a share of peak, none where the peak is unknown; `eta` in seconds."""

    tokens_per_s: float
    data_wait: float
    mfu: float | None
    eta: float


@dataclass
class Clock:
    """Times log intervals; evaluation and what precedes the first interval do not count."""

    model: LlamaConfig
    tokens_per_step: int
    length: int
    last_step: int
    total: int
    last_time: float = dataclasses.field(default_factory=time.monotonic)
    waited: float = 0.0
    """Seconds of this interval in which the loop waited for data."""
    steps_timed: int = 0
    seconds_timed: float = 0.0

    def restart(self, step: int) -> None:
        """Begins an interval anew at this step."""
        self.last_time, self.last_step, self.waited = time.monotonic(), step, 0.0

    def lap(self, step: int) -> Speed:
        """Ends an interval at this step."""
        steps, seconds = max(step - self.last_step, 1), max(time.monotonic() - self.last_time, 1e-9)
        self.steps_timed, self.seconds_timed = self.steps_timed + steps, self.seconds_timed + seconds
        tokens_per_s = steps * self.tokens_per_step / seconds
        speed = Speed(
            tokens_per_s,
            min(self.waited / seconds, 1.0),
            model_flops_utilisation(self.model, self.length, tokens_per_s),
            (self.total - step) * self.seconds_timed / self.steps_timed,
        )
        self.restart(step)
        return speed
