"""How a run ends badly: every foreseen failure is one of these, and each has its exit code."""

PREEMPTED = 42
"""The exit code that asks for the same command again."""


class UserError(Exception):
    """Input that cannot be used (exit code 2): the message names what was found, what was expected and the remedy."""


class Diverged(Exception):
    """Training met more non-finite steps in a row than it may skip (exit code 3); the last good checkpoint stands."""


class Preempted(Exception):
    """The run was told to stop, saved its state and wants to be started again (exit code 42)."""
