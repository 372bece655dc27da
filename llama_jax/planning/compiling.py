"""A step compiled for TPUs or GPUs that are not there: libtpu and XLA's CUDA plugin are whole compilers, and need only names.

Nothing is ever allocated: states and batches are shapes, and a 70B compiles in the memory of a laptop.
"""

import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_jax.errors import UserError
from llama_jax.planning.gpu import target_config
from llama_jax.planning.hardware import Chip
from llama_jax.planning.topology import Topology

if TYPE_CHECKING:  # jax reads the environment as it is imported, and `prepare_environment` changes it before
    import jax

# libtpu would otherwise look for TPUs, for Google's metadata server, and for a lock that one process holds at a time; and XLA would
# warn, in its own words, of memory that the plan tells about.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of this host; what is compiled for says the topology
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Of the CUDA plugin: what it has at hand on a machine without a GPU. Versions are those of CUDA 12's last release, and cuDNN's
# with which every attention that jax asks for is there.
_CUDA, _CUDNN = (12, 9, 0), (9, 10, 0)


@dataclass(frozen=True)
class Refused:
    """The compiler's word that a program does not fit."""

    asked: float
    """Bytes that it would take of a device; 0 where the compiler does not say."""
    available: float
    """Bytes that a device has for it; 0 where the compiler does not say."""
    message: str
    beside: float = 0.0
    """Bytes of these that other programs of the same run keep."""


def compiler_package(chip: Chip) -> str:
    """The package that compiles for a chip, as pip names it.

    Raises:
      UserError: it is not installed; says the command.
    """
    if not chip.is_gpu:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"libtpu, the compiler for TPUs, is not installed; it runs on any CPU: {sys.executable} -m pip install 'jax[tpu]'"
            )
        return "libtpu"
    for cuda in ("12", "13"):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin") is not None:
            return f"jax-cuda{cuda}-plugin"
    raise UserError(
        "XLA's CUDA plugin, the compiler for GPUs, is not installed; it runs on any CPU: "
        f"{sys.executable} -m pip install 'jax[cuda12]'"
    )


def prepare_environment(chip: Chip, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the compiler for a chip needs on a machine without one, before jax is imported.

    Raises:
      UserError: it is not installed; says the command.
    """
    compiler_package(chip)
    for name, value in ENVIRONMENT.items():
        # What the user says of logging stands; what would make it look for a TPU does not.
        if name not in environment or not name.endswith("LOG_LEVEL"):
            environment[name] = value


def load_quietly() -> None:
    """Loads jax and its plugins, and keeps from stderr what the CUDA plugin says four times over: that there is no driver."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        import jax

        jax.devices()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def devices_of(topology: Topology) -> list["jax.Device"]:
    """The devices of slices or hosts that are not there, one a chip.

    Raises:
      UserError: this libtpu does not know the slices.
    """
    from jax.experimental import topologies

    if topology.chip.is_gpu:
        described, laid = target_config(topology.chip, _CUDA, _CUDNN), f"1x{topology.hosts}x{topology.shape[0]}"
        found = topologies.get_topology_desc(platform="cuda", target_config=described, topology=laid)
        return list(found.devices)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a v4 chip's two cores as one device, as jax shows them on one
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)
    except Exception as error:
        raise UserError(f"libtpu does not know the topology {topology}: {str(error).splitlines()[0][:200]}") from error


def compile_for(step: Any, mesh: Any, arguments: tuple) -> "jax.stages.Compiled | Refused":
    """Compiles a jitted step for its arguments' shapes and shardings, or gives the compiler's refusal for want of memory.

    Raises:
      UserError: it asks for cuDNN, which is not installed.
    """
    import jax

    try:
        with jax.set_mesh(mesh), _heartbeat():
            return step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return parse_refusal(str(error))
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UserError(
            f"cuDNN, whose attention the recipe has on these GPUs, is not installed: {sys.executable} -m pip install 'jax[cuda12]'; "
            "or --compute.attention xla"
        ) from error


def parse_refusal(message: str) -> Refused:
    """How much a refused program would take, read from the compiler's message, which has one of two forms.

    Of libtpu 0.0.42: "the total memory required for HLO temporaries (19.53G) exceeds available HBM (15.75G)", arguments and
    results among these; or "Used 20.11G of 15.75G hbm". G is 2^30.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    amount = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"required for HLO temporaries \({amount}\) exceeds available HBM \({amount}\)", message)
    found = found or re.search(rf"[Uu]sed {amount} of {amount} hbm", message)
    asked, available = (float(found[i]) * units[found[i + 1]] for i in (1, 3)) if found else (0.0, 0.0)
    return Refused(asked, available, message.splitlines()[0][:300])


@contextmanager
def _heartbeat(every: float = 60.0) -> Iterator[None]:
    """Says on stderr, once in a while, that a compile still runs: it cannot say how far it is."""
    began, stop = time.monotonic(), threading.Event()

    def beat() -> None:
        while not stop.wait(every):
            print(f"... still compiling after {(time.monotonic() - began) / 60:.0f} min", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
