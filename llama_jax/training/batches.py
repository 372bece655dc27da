"""From the rows that this process reads to a global batch on the devices."""

from jax.sharding import Mesh

from llama_jax.data.packing import Batch
from llama_jax.parallel.mesh import batch_rows_of_process, global_array


def share_of_process(mesh: Mesh, rows: int) -> dict[str, int]:
    """Which equal share of a batch's rows this process feeds to its devices, as `make_batches` takes it."""
    span = batch_rows_of_process(mesh, rows)
    return {"process_index": span.start // (span.stop - span.start), "process_count": rows // (span.stop - span.start)}


def to_devices(mesh: Mesh, batch: Batch, rows: int) -> Batch:
    """Puts this process's rows of a global batch of `rows` onto its devices."""
    return Batch(*(global_array(mesh, array, "batch", "length", rows=rows) for array in batch))
