"""From the rows that this process reads to a global batch on the devices."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.data.pairs import BatchShape, PairBatch, PairOrder
from llama_jax.parallel.mesh import batch_rows_of_process, global_array, sharding, ways

AnyBatch = TypeVar("AnyBatch", bound=tuple)  # a NamedTuple of arrays


def share_of_process(mesh: Mesh, rows: int) -> dict[str, int]:
    """Which equal share of a batch's rows this process feeds to its devices, as `make_batches` takes it."""
    span = batch_rows_of_process(mesh, rows)
    return {"process_index": span.start // (span.stop - span.start), "process_count": rows // (span.stop - span.start)}


def shape_of_pairs(order: PairOrder, longest: int, epochs: int, micro_batches: int) -> BatchShape:
    """The shape of the batches of pairs on the ambient mesh; our choice: a row is as long as the longest pair."""
    return order.shape(epochs, longest + -longest % (128 * ways("length")), ways("batch") * micro_batches)


def abstract_pairs(mesh: Mesh, shape: BatchShape) -> PairBatch:
    """A batch of pairs as shapes, dtypes and shardings."""
    tokens = jax.ShapeDtypeStruct((shape.rows, shape.length), jnp.int32, sharding=sharding(mesh, "batch", "length"))
    places = jax.ShapeDtypeStruct((shape.rows, shape.places), jnp.int32, sharding=sharding(mesh, "batch", None))
    return PairBatch(tokens, tokens, *[places] * 7, places.update(dtype=jnp.bool_))


def to_devices(mesh: Mesh, batch: AnyBatch, rows: int) -> AnyBatch:
    """Puts this process's rows of a global batch of `rows` onto its devices, as the axes in the arrays' names say."""
    axes = {"B": "batch", "T": "length"}

    def place(name: str, array: np.ndarray) -> jax.Array:
        return global_array(mesh, array, *map(axes.get, name.rpartition("_")[2]), rows=rows)

    return type(batch)(*map(place, batch._fields, batch))
