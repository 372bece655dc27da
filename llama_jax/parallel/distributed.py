"""Joining the other processes of a run, where there are any."""

import os

import jax

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


def initialize() -> None:
    """Connects this process to the others of its run, before any device is touched; alone, it does nothing.

    Slurm, Open MPI, GKE and Cloud TPU are recognised by their environment. Anywhere else set JAX_COORDINATOR_ADDRESS
    (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if jax.distributed.is_initialized():
        return
    if not any(name in os.environ and launched(os.environ[name]) for name, launched in LAUNCHERS.items()):
        return
    if "JAX_PROCESS_ID" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    else:
        jax.distributed.initialize()
