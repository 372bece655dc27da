"""Held-out loss: nats per token, and bits per byte, which no choice of tokenizer can flatter."""

import math
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from llama_jax.config import Compute
from llama_jax.data.packing import Batch
from llama_jax.data.pipeline import DataConfig, held_out_batches, held_out_bytes
from llama_jax.model.transformer import Transformer
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.batches import share_of_process, to_devices
from llama_jax.training.step import batch_loss


def make_held_out_loss(
    data: DataConfig, tokenizer: Tokenizer, mesh: Mesh, compute: Compute, *, rows: int, length: int
) -> Callable[[Transformer], dict[str, float]]:
    """Builds the evaluation of a model on the held-out documents.

    Every token but BOS is predicted once, EOS included; a token's context begins where its row of `length` tokens does.

    Args:
      data: whose held-out documents are scored.
      tokenizer: turns them into tokens.
      mesh: where the batches go; ambient when the result is called.
      compute: precision and kernel.
      rows: sequences scored at once.
      length: tokens in a sequence.

    Returns:
      a function from model to `eval/loss` (nats per token) and `eval/bits_per_byte` (of the documents' UTF-8 bytes).
    """
    n_bytes = held_out_bytes(data, tokenizer)
    score = make_score(mesh, compute, rows)

    def evaluate(model: Transformer) -> dict[str, float]:
        share = share_of_process(mesh, rows)
        nats, targets = score(model, held_out_batches(data, tokenizer, rows=rows, length=length, **share))
        return {"eval/loss": nats / targets, "eval/bits_per_byte": nats / math.log(2) / n_bytes}

    return evaluate


def make_score(mesh: Mesh, compute: Compute, rows: int) -> Callable[[Transformer, Iterable[Batch]], tuple[float, int]]:
    """Builds a function from a model and batches to the nats of all their targets, and how many these are.

    Args:
      mesh: where the batches go; ambient when the result is called.
      compute: precision and kernel.
      rows: sequences of a global batch.
    """

    @jax.jit
    def of_batch(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
        weights_BT = batch.loss_mask_BT.astype("float32")
        return batch_loss(model, batch, weights_BT, compute).nats, batch.loss_mask_BT.sum()

    def score(model: Transformer, batches: Iterable[Batch]) -> tuple[float, int]:
        nats = targets = 0.0
        for batch in batches:
            batch_nats, batch_targets = of_batch(model, to_devices(mesh, batch, rows))
            nats, targets = nats + float(batch_nats), targets + int(batch_targets)
        return nats, int(targets)

    return score
