"""Being told to stop: spot machines and job managers send SIGTERM, people press Ctrl-C; both save first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from llama_jax.errors import Preempted


class StopSignal:
    """Notes SIGTERM and the first Ctrl-C while it is entered, for the loop to act on between two steps."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        # With several processes JAX's own notifier holds SIGTERM and agrees on a step with the other hosts.
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as behind nohup: who ignores it, wants it ignored
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        signal.signal(number, self._previous[number])  # a second one ends the process at once

    def received(self, step: int) -> str | None:
        """The signal on which every process has to stop after this step, or None.

        Args:
          step: number of the step just dispatched; the same on every process when they call this.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                return "SIGTERM"
            return None
        return self._received


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While it is entered, SIGTERM raises Preempted right where it comes, other than in a `StopSignal`.

    For a program of several resumable parts: between their loops nothing is lost, and loading a model takes long.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Preempted(f"{signal.Signals(number).name} received; start it again to go on")

    # As above: with several processes the signal is JAX's, and who ignores it, wants it ignored.
    if jax.process_count() > 1 or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
