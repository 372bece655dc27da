"""Documents' tokens to rows of equal length, no token lost or doubled (paper section 2.2 fixes the length: 4096).

All documents in order form one stream s. Row r of T tokens has inputs s[rT : (r+1)T] and targets one token later, so
every token is an input once and a target once. A document that goes on in the next row is a new segment there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.errors import UserError


class Cursor(NamedTuple):
    """A place in the stream, before any batch (0, 0): the next document and how many of its tokens are used."""

    document: int = 0
    token: int = 0


class Batch(NamedTuple):
    """Rows of packed documents, one process's share of a global batch."""

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32, valid ids everywhere
    segment_ids_BT: np.ndarray  # int32, 1, 2, ... along a row, 0 for padding
    positions_BT: np.ndarray  # int32, from 0 in every segment
    loss_mask_BT: np.ndarray  # bool, False where the target is the first token of another document, or padding


def pack(
    documents: Iterator[np.ndarray],
    *,
    rows: int,
    length: int,
    own_rows: range,
    cursor: Cursor = Cursor(),  # noqa: B008 (a tuple, so immutable)
) -> Iterator[tuple[Batch, Cursor]]:
    """Gives batches of `rows` x `length`, of each only `own_rows`, with the cursor after that batch.

    `documents` are integer arrays and start with number `cursor.document`. Only what own rows need is copied, so
    memory-mapped documents of other processes' rows are never read. If the documents end, the last batch is padded.
    Raises UserError if the first document is shorter than the cursor says.
    """
    need = rows * length + 1  # one token more than the inputs: the last target
    document, token = cursor
    waiting: list[np.ndarray] = []
    available, ended = -token, False
    while True:
        while available < need and not ended:
            tokens = next(documents, None)
            ended = tokens is None
            if tokens is not None:
                waiting.append(tokens)
                available += len(tokens)
                _check_cursor(waiting, document, token)
        if available < 2:  # nothing left that has a target
            return
        lengths = np.fromiter(map(len, waiting), np.int64, len(waiting))
        ends = np.cumsum(lengths) - token
        starts = ends - lengths
        first, last = own_rows.start * length, own_rows.stop * length + 1
        stream, is_start = _cut(waiting, starts, lengths, first, last)
        batch = _label(stream, is_start, length, real=available - first)
        used = int(np.searchsorted(ends, rows * length, side="right"))
        document += used
        token = rows * length - int(starts[used]) if used < len(waiting) else 0
        del waiting[:used]
        available -= rows * length
        yield batch, Cursor(document, token)


def _check_cursor(waiting: list[np.ndarray], document: int, token: int) -> None:
    if len(waiting) == 1 and len(waiting[0]) < token:
        raise UserError(
            f"Document {document} has {len(waiting[0])} tokens, but {token} of them are already used: the data changed "
            "since the checkpoint. Restore the data, or start anew with --resume never."
        )


def _cut(
    waiting: list[np.ndarray], starts: np.ndarray, lengths: np.ndarray, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Copies stream positions first to last (0 where there are none) and marks those that begin a document."""
    stream = np.zeros(last - first, np.int32)
    is_start = np.zeros(last - first, bool)
    low = int(np.searchsorted(starts + lengths, first, side="right"))
    high = int(np.searchsorted(starts, last, side="left"))
    for tokens, start in zip(waiting[low:high], (starts[low:high] - first).tolist(), strict=True):
        part = tokens[max(-start, 0) : last - first - start]
        stream[max(start, 0) : max(start, 0) + len(part)] = part
    begins = starts[low:high][lengths[low:high] > 0] - first
    is_start[begins[begins >= 0]] = True
    if high and (end := int(starts[high - 1] + lengths[high - 1]) - first) < last - first:
        is_start[max(end, 0)] = True  # padding begins here: its first token is nobody's target
    return stream, is_start


def _label(stream: np.ndarray, is_start: np.ndarray, length: int, real: int) -> Batch:
    """Makes rows, segments, positions and mask from a cut of n*length + 1 tokens of which the first `real` are real."""
    n = (len(stream) - 1) // length
    begins_BT = is_start[:-1].reshape(n, length).copy()
    begins_BT[:, :1] = True
    segment_ids_BT = np.cumsum(begins_BT, axis=1, dtype=np.int32)
    place_T = np.arange(length, dtype=np.int32)
    positions_BT = place_T - np.maximum.accumulate(np.where(begins_BT, place_T, np.int32(0)), axis=1)
    loss_mask_BT = ~is_start[1:].reshape(n, length)
    if real < len(stream):
        real_BT = (np.arange(n * length) < real).reshape(n, length)
        segment_ids_BT *= real_BT
        positions_BT *= real_BT
        loss_mask_BT &= real_BT
    return Batch(
        tokens_BT=stream[:-1].reshape(n, length),
        targets_BT=stream[1:].reshape(n, length),
        segment_ids_BT=segment_ids_BT,
        positions_BT=positions_BT,
        loss_mask_BT=loss_mask_BT,
    )
