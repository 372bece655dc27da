"""From the rows that this process reads to a global batch on the devices."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.parallel.mesh import batch_rows_of_process, global_array

AnyBatch = TypeVar("AnyBatch", bound=tuple)  # a NamedTuple of arrays


def share_of_process(mesh: Mesh, rows: int) -> dict[str, int]:
    """Which equal share of a batch's rows this process feeds to its devices, as `make_batches` takes it."""
    span = batch_rows_of_process(mesh, rows)
    return {"process_index": span.start // (span.stop - span.start), "process_count": rows // (span.stop - span.start)}


def to_devices(mesh: Mesh, batch: AnyBatch, rows: int) -> AnyBatch:
    """Puts this process's rows of a global batch of `rows` onto its devices, as the axes in the arrays' names say."""
    axes = {"B": "batch", "T": "length"}

    def place(name: str, array: np.ndarray) -> jax.Array:
        return global_array(mesh, array, *map(axes.get, name.rpartition("_")[2]), rows=rows)

    return type(batch)(*map(place, batch._fields, batch))
