"""Watching over the processes of a run: each tells the others that it lives and how far it is, and ends when one of them is gone.

A collective waits forever for a process that is lost or has failed, and a pod is paid for while it waits. So a process that
fails says so, and the others end with its exit code; one that falls silent is lost, and the others end with a code that gets
the run started again; one that gets no further is named, with the step that each has done. What they tell each other goes
through the key-value store of JAX's coordination service, which process 0 runs.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from llama_jax.errors import PREEMPTED

BEAT_EVERY = 2.0
"""Seconds between two signs of life."""
LAST_WORDS = 5 * BEAT_EVERY
"""Seconds that process 0 stays longer than the others: with it goes what they tell each other through, and then JAX aborts
them, whatever they were about to say.
"""
PREFIX = "llama_jax/watch/"


class Watch:
    """One process's part of it: a thread that beats, looks after the others, and ends this process if it must."""

    def __init__(
        self,
        client: Any,
        index: int,
        host: str,
        *,
        lost_after: float,
        hang_after: float,
        end: Callable[[int], None] = os._exit,
    ):
        """Nothing happens before `start`.

        Args:
          client: of the key-value store: `key_value_set` and `key_value_dir_get`.
          index: of this process.
          host: its name.
          lost_after: seconds of silence behind which another process is lost.
          hang_after: seconds without a further step behind which that is reported.
          end: ends this process at once, with an exit code; the main thread may wait in a collective.
        """
        self._client, self._index, self._host, self._end = client, index, host, end
        self._lost_after, self._hang_after = lost_after, hang_after
        self._step, self._moved, self._beats = 0, time.monotonic(), 0
        self._heard: dict[int, tuple[int, float]] = {}
        self._stopped, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def note(self, step: int) -> None:
        """Says which step this process has begun."""
        self._step, self._moved = step, time.monotonic()

    def close(self) -> None:
        """Says that this process is done, so that nobody takes its silence for a loss."""
        self._stopped.set()
        with contextlib.suppress(Exception):  # process 0 may be gone already, and this one is done
            self._put("done", {})

    def fail(self, code: int, message: str, *, foreseen: bool) -> None:
        """Ends this process with `code`, after the others could hear why.

        What nobody foresaw may be the loss of another process, which a collective reports as an error of its own: that one's
        silence or word is waited for first.
        """
        if not foreseen:
            time.sleep(self._lost_after + 4 * BEAT_EVERY)
        if self._leaving.is_set():  # the thread knows why, and ends this process
            threading.Event().wait()
        self._put("failed", {"code": code, "message": message.strip().splitlines()[-1][:300]})
        if self._index:
            time.sleep(2 * BEAT_EVERY)
        self._leave(code)

    def _put(self, what: str, value: dict[str, Any]) -> None:
        value = {"host": self._host, **value}
        self._client.key_value_set(f"{PREFIX}{what}/{self._index}", json.dumps(value), allow_overwrite=True)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_EVERY):
            try:
                self.beat(time.monotonic())
            except Exception as error:
                if not self._stopped.is_set():
                    first = str(error).splitlines()[0][:200]
                    self._say(f"process 0 cannot be reached any more ({first}); {_AGAIN}", PREEMPTED)

    def beat(self, now: float) -> None:
        """Gives one sign of life, and acts on what the others have said; `now` is in seconds of a clock that never goes back."""
        self._beats += 1
        self._put("beat", {"number": self._beats, "step": self._step})
        known: dict[str, dict[int, dict]] = {"beat": {}, "failed": {}, "done": {}}
        for key, value in self._client.key_value_dir_get(PREFIX):
            what, index = key.removeprefix(PREFIX).split("/")
            known[what][int(index)] = json.loads(value)
        for index, failed in known["failed"].items():
            if index != self._index:
                where = f"process {index} on {failed['host']} failed"
                self._say(f"{where}: {failed['message']}. This one ends with it", failed["code"])
                return
        for index, found in known["beat"].items():
            number, since = self._heard.get(index, (0, now))
            self._heard[index] = (number, since) if number == found["number"] else (found["number"], now)
            silent = now - self._heard[index][1]
            if silent > self._lost_after and index != self._index and index not in known["done"]:
                where = f"process {index} on {found['host']} is lost: not heard of for {silent:.0f} s, its last step was {found['step']}"
                self._say(f"{where}; {_AGAIN}", PREEMPTED)
                return
        if now - self._moved > self._hang_after:
            self._moved = now
            steps = ", ".join(f"process {i} on {one['host']} {one['step']}" for i, one in sorted(known["beat"].items()))
            self._say(f"no step for {self._hang_after:.0f} s; the last steps begun: {steps}")

    def _say(self, message: str, code: int | None = None) -> None:
        print(f"process {self._index} on {self._host}: {message}", file=sys.stderr, flush=True)
        if code is not None:
            self._leave(code)

    def _leave(self, code: int) -> None:
        self._leaving.set()
        if not self._index:
            time.sleep(LAST_WORDS)
        self._end(code)


_AGAIN = f"ending with {PREEMPTED}: start the run again, and it goes on from its newest checkpoint"
