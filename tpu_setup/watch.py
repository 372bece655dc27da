"""Staying with a run until it ends: a slice that is taken away is asked for again, and the run goes on there."""

import time
from collections.abc import Callable

from llama_jax.errors import UserError
from tpu_setup import hosts, provision
from tpu_setup.gke import Gke
from tpu_setup.hosts import Reachable, Run
from tpu_setup.provision import Cloud
from tpu_setup.shell import Shell

UNREACHABLE_LOOKS = 10
"""So many looks in a row may fail while the cloud says that the slice is there: one that is going away answers late."""


def watch(
    cloud: Cloud,
    back: Reachable,
    shell: Shell,
    run: Run,
    count: int,
    bootstrap: Callable[[], None],
    *,
    poll: float,
    timeout: float,
) -> int:
    """Keeps a run going over lost slices and hosts that begin anew; returns the run's own exit code."""
    found, fresh, failures, shown = None, False, 0, ""
    while True:
        if provision.look(cloud, shell, poll).kind != "ready":
            provision.wait(cloud, shell, run.name, poll=poll, timeout=timeout, expected=True)
            found, fresh = None, True
        try:
            if fresh and found is None:
                bootstrap()
            found = found or hosts.start(shell, back, run, count)
            looks = hosts.progress(shell, back, run.name, found)
            failures = 0
        except UserError as error:
            failures += 1
            # What fails on the slice as it was found is the user's to put right; later it may be going away.
            if failures > UNREACHABLE_LOOKS or (found is None and not fresh):
                raise
            shell.say(f"{error}\nlooking again ({failures} of {UNREACHABLE_LOOKS})")
            time.sleep(poll)
            continue
        what, code = hosts.verdict(shell, found, looks)
        line = f"{run.name}: {what}, {max(look.restarts for look in looks)} restarts | {looks[0].line}"
        if line != shown:
            shell.say(line)
            shown = line
        if what == "ended":
            if code:
                _stop(shell, back, run.name)
            return code
        if what == "lost":
            shell.say("a host began anew: stopping the run on the others, and starting all again")
            _stop(shell, back, run.name)
            found = None
            continue
        time.sleep(poll)


def _stop(shell: Shell, back: Reachable, name: str) -> None:
    """Ends the run where it is still on: without the other hosts it cannot save, so it is not waited for long."""
    try:
        hosts.stop(shell, back, name, grace=30)
    except UserError as error:
        shell.say(str(error))


def watch_jobset(cloud: Cloud, back: Gke, shell: Shell, name: str, *, poll: float, timeout: float) -> int:
    """Follows a JobSet, which restarts by itself, and sees to its node pools; returns the run's own exit code."""
    shown = []
    while True:
        state, lines, code = back.progress(name)
        if lines != shown:
            shell.say("\n".join(lines))
            shown = lines
        if state:
            return code
        if provision.look(cloud, shell, poll).kind != "ready":
            provision.wait(cloud, shell, name, poll=poll, timeout=timeout, expected=True)
        time.sleep(poll)
