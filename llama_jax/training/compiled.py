"""A training step compiled before any array exists, and what it will take of a device."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.errors import UserError
from llama_jax.parallel.mesh import format_mesh, mesh_sizes
from llama_jax.training.metrics import device_memory, format_count, say


def compile_step(train_step: Callable, mesh: Mesh, n_params: int, *arguments: Any) -> tuple[Callable, dict[str, Any]]:
    """Compiles a step for arguments given as shapes, dtypes and shardings.

    Args:
      train_step: from `make_train_step`.
      mesh: the devices.
      n_params: of the whole model.
      arguments: those of the step, abstract.

    Returns:
      the compiled step, and mesh, devices, parameters, bytes per device and seconds as JSON.

    Raises:
      UserError: the compiler finds that it does not fit the device's memory.
    """
    say(f"compiling the step of a {format_count(n_params)}-parameter model ...")
    began = time.monotonic()
    try:
        compiled = train_step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the step does not fit the memory of a device: {str(error).splitlines()[0][:300]}; "
            "try --compute.remat full, more --micro-batches, or a mesh with more fsdp or tensor"
        ) from error
    memory, available = compiled.memory_analysis(), device_memory()
    return compiled, {
        "mesh": mesh_sizes(mesh),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": n_params,
        "bytes_per_device": {
            "state_and_batch": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
        "bytes_available": None if available is None else int(available[1] * 1e9),
        "compile_seconds": round(time.monotonic() - began, 1),
    }


def describe_plan(plan: dict[str, Any]) -> dict[str, str]:
    """Devices and memory of a plan, as the lines of a banner."""
    state, temporary = plan["bytes_per_device"].values()
    available = plan["bytes_available"]
    return {
        "devices": f"{plan['devices']}, mesh {format_mesh(plan['mesh'])}, {jax.process_count()} process(es)",
        "memory": f"{(state + temporary) / 1e9:.2f} GB a device predicted ({state / 1e9:.2f} state and batch, "
        f"{temporary / 1e9:.2f} temporary)" + ("" if available is None else f", {available / 1e9:.1f} available"),
    }
