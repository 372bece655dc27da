"""Asking for a slice, waiting for it, taking it again when it is taken away, giving it back: the same for every cloud.

What is there is asked of the cloud each time; nothing about a slice is kept on the user's machine.
"""

import time
from dataclasses import dataclass
from typing import Literal, Protocol

from llama_jax.errors import UserError
from tpu_setup.shell import CAPACITY, EXISTS, MISSING, PERMANENT, UNKNOWN, Refused, Shell, meaning


@dataclass(frozen=True)
class State:
    """What a slice is at one moment, whichever cloud says so."""

    kind: Literal["absent", "queued", "starting", "ready", "lost", "deleting"]
    detail: str = ""
    """The cloud's own word for it, with its reason."""
    spot: bool = False
    rest: bool = False
    """Whether a part of it is there although the whole is not."""

    @property
    def paid(self) -> bool:
        """Whether it costs money as long as it stays like this."""
        return self.rest or self.kind in ("starting", "ready")


ABSENT, READY = State("absent"), State("ready", "as assumed")


class Cloud(Protocol):
    """A way to rent a slice."""

    def state(self, assumed: State) -> State:
        """What is there now; `assumed` with --dry-run."""

    def create(self) -> None:
        """Asks for the slice."""

    def delete(self) -> None:
        """Gives everything of it back, and passes over what is gone."""

    def since(self) -> str:
        """When what is there now came, as the cloud writes it; "" where it does not say."""


def create(cloud: Cloud, shell: Shell, name: str) -> None:
    """Asks for a slice unless it is there; one that was lost is deleted first."""
    state = cloud.state(assumed=ABSENT)
    if state.kind in ("lost", "deleting"):
        shell.say(f"{name} is {state.detail}: deleting what is left of it, then asking again")
        cloud.delete()
    elif state.kind != "absent":
        return shell.say(f"{name} exists already ({state.detail}); nothing to do")
    cloud.create()
    shell.say(f"{name} is asked for; wait follows it until it is there")


def wait(cloud: Cloud, shell: Shell, name: str, *, poll: float, timeout: float, expected: bool = False) -> None:
    """Follows a slice until it is ready; one on spot that is lost is deleted and asked for again.

    Args:
      poll: seconds between two looks.
      timeout: seconds after which it gives up; the request stands.
      expected: whether to ask for the slice where it is absent, instead of refusing.
    """
    begin, shown, again = time.monotonic(), None, expected
    while True:
        state = look(cloud, shell, poll)
        minutes = (time.monotonic() - begin) / 60
        if (state.kind, state.detail) != shown:
            shell.say(f"{name}: {state.detail or state.kind} after {minutes:.1f} min")
            shown = (state.kind, state.detail)
        if state.kind == "ready":
            return
        if state.kind == "absent" and not again:
            raise UserError(f"{name} does not exist; create asks for it")
        if time.monotonic() - begin > timeout:
            raise UserError(
                f"{name} is not there after {minutes:.0f} min ({state.detail or state.kind}); the request stands: wait again, "
                "with a longer --timeout, or delete it"
            )
        if state.kind in ("lost", "absent"):
            kind, remedy = meaning(state.detail)
            if state.kind == "lost" and kind == PERMANENT:
                raise UserError(f"{name} is {state.detail}; {remedy}")
            if state.kind == "lost" and not state.spot:
                raise UserError(
                    f"{name} is {state.detail}; it is not on spot, and not asked for again: create does that"
                )
            again = True
            _ask_again(cloud, shell, name, state)
        time.sleep(poll)


def look(cloud: Cloud, shell: Shell, poll: float, tries: int = 10) -> State:
    """What is there, over failures that mean nothing: a network that is away for minutes must not end hours of waiting."""
    for _ in range(tries - 1):
        try:
            return cloud.state(assumed=READY)
        except Refused as refused:
            if refused.kind != UNKNOWN:
                raise
            shell.say(f"{refused.said.splitlines()[-1] if refused.said else refused}; looking again")
            time.sleep(poll)
    return cloud.state(assumed=READY)


def delete(cloud: Cloud, shell: Shell, name: str) -> None:
    """Gives a slice back, and looks whether it is gone."""
    state = cloud.state(assumed=READY)
    if state.kind == "absent" and not state.rest:
        return shell.say(f"{name} is gone already; nothing of it is paid for")
    cloud.delete()
    state = cloud.state(assumed=ABSENT)
    if state.kind not in ("absent", "deleting"):
        raise UserError(
            f"{name} is still there ({state.detail}), and may be paid for; delete it again, or in the console"
        )
    shell.say(f"{name} is {'gone' if state.kind == 'absent' else 'being deleted'}; nothing of it is paid for any more")


def _ask_again(cloud: Cloud, shell: Shell, name: str, state: State) -> None:
    """Deletes a lost slice and asks for a new one; no capacity is no end, for the next look asks again."""
    if state.kind == "lost":
        shell.say(f"{name} is lost ({state.detail}): deleting what is left of it, then asking again")
        cloud.delete()
    try:
        cloud.create()
    except Refused as refused:
        if refused.kind not in (CAPACITY, EXISTS):
            raise
        shell.say(f"{name}: {refused.said.splitlines()[-1]}")


def reminder(state: State | None, name: str, size: str) -> str | None:
    """What a user who leaves must know about money; None where nothing is left behind."""
    if state is None:
        return None
    if state.paid:
        part = "a part of " if state.rest else ""
        return f"note: {part}{name} ({size}) is there and paid for until it is deleted"
    if state.kind != "queued":
        return None
    what = f"{name} ({size}) is asked for, and is paid for from the moment it comes"
    return f"note: {what}; delete takes the request back"


def forgiving(shell: Shell, argv: list[str], kind: str = MISSING) -> None:
    """Runs a command whose refusal of one kind is as good as its success."""
    try:
        shell.run(argv)
    except Refused as refused:
        if refused.kind != kind:
            raise
