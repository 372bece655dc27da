"""Joining the other processes of a run, where there are any."""

import atexit
import os
import socket

import jax

from llama_jax.errors import UserError
from llama_jax.parallel.watch import BEAT_EVERY, Watch

# Each says that a launcher started several processes of this program, in a form jax.distributed.initialize reads by
# itself.
LAUNCHERS = {
    "JAX_COORDINATOR_ADDRESS": lambda value: bool(value),
    "SLURM_NTASKS": lambda value: int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    # Off a TPU, jax with libtpu installed writes a warning into it instead of names.
    "TPU_WORKER_HOSTNAMES": lambda value: len(value.split(",")) > 1 and "WARNING" not in value,
    "MEGASCALE_NUM_SLICES": lambda value: int(value) > 1,
}


# The one that `initialize` began; as there is one `jax.distributed` in a process, there is one watch.
_watch: Watch | None = None


def initialize(lost_after: float = 60.0, hang_after: float = 600.0) -> None:
    """Connects this process to the others of its run, before any device is touched, and begins to watch over them; alone, it
    does nothing.

    Slurm, Open MPI, GKE and Cloud TPU are recognised by their environment. Anywhere else set JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      lost_after: seconds of silence behind which another process is lost.
      hang_after: seconds without a further step behind which every host's last step is reported.

    Raises:
      UserError: `lost_after` is shorter than a few signs of life take.
    """
    global _watch
    if lost_after < 3 * BEAT_EVERY:
        raise UserError(
            f"--loop.lost-after is {lost_after:g} s; a process is heard of every {BEAT_EVERY:g} s: give {3 * BEAT_EVERY:g} or more"
        )
    if jax.distributed.is_initialized():
        return
    if not any(name in os.environ and launched(os.environ[name]) for name, launched in LAUNCHERS.items()):
        return
    named = {}
    if "JAX_PROCESS_ID" in os.environ:
        named = {"num_processes": int(os.environ["JAX_NUM_PROCESSES"]), "process_id": int(os.environ["JAX_PROCESS_ID"])}
    # JAX itself aborts (code 134) where a process is silent for so long: after the watch, which says more and ends with 42.
    jax.distributed.initialize(**named, heartbeat_timeout_seconds=int(2 * lost_after) + 30)
    from jax._src.distributed import global_state  # the store has no public name

    _watch = Watch(
        global_state.client,
        global_state.process_id,
        socket.gethostname(),
        lost_after=lost_after,
        hang_after=hang_after,
    )
    _watch.start()
    atexit.register(_watch.close)  # before jax leaves the service, which it registered first


def note_step(step: int) -> None:
    """Tells the other processes, if there are any, which step this one has begun."""
    if _watch is not None:
        _watch.note(step)


def fail(code: int, message: str, *, foreseen: bool) -> None:
    """Tells the other processes that this one has failed, and ends it with `code`; alone, it does nothing."""
    if _watch is not None:
        _watch.fail(code, message, foreseen=foreseen)
