"""Answers side by side: a row holds as many prompts with their answers as have room, so that short ones are not padding.

What a model says of an answer depends on neither its row nor its neighbours; the segments see to that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data.examples import best_fit


class Places(NamedTuple):
    """Where in rows each of A answers stands, its prompt before it."""

    row_A: np.ndarray
    start_A: np.ndarray
    length_A: np.ndarray
    shape: tuple[int, int]
    """Rows and tokens in a row."""


def place(lengths: Sequence[int], rows: int, length: int, parts: int = 1) -> Places:
    """Fills few rows, the longest answers first, so that the rest stay empty.

    Args:
      lengths: tokens of each answer with its prompt, none above `length`.
      rows: as many as there are answers, or more, so that there is room.
      length: tokens in a row.
      parts: micro-batches that a step splits the rows into, row r to part r % parts: one is filled after the other.
    """
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    packed = best_fit([int(lengths[number]) for number in longest_first], length)
    row_A, start_A = (np.zeros(len(lengths), np.int64) for _ in range(2))
    for filled, numbers in enumerate(packed):
        part, within = divmod(filled, rows // parts)
        start = 0
        for number in longest_first[numbers]:
            row_A[number], start_A[number] = within * parts + part, start
            start += lengths[number]
    return Places(row_A, start_A, np.asarray(lengths), (rows, length))


def to_rows(places: Places, array_AT: np.ndarray) -> np.ndarray:
    """What belongs to the answers' tokens, (A, T), as it stands in the rows, (B, T); zeros elsewhere."""
    rows_BT = np.zeros(places.shape, array_AT.dtype)
    for answer_T, row, start, length in zip(array_AT, *places[:3], strict=True):
        rows_BT[row, start : start + length] = answer_T[:length]
    return rows_BT


def to_answers(places: Places, rows_BT: np.ndarray) -> np.ndarray:
    """The inverse of `to_rows`, (A, T); zeros behind each answer."""
    array_AT = np.zeros((len(places.row_A), places.shape[1]), rows_BT.dtype)
    for answer_T, row, start, length in zip(array_AT, *places[:3], strict=True):
        answer_T[:length] = rows_BT[row, start : start + length]
    return array_AT


def segment_ids(places: Places) -> np.ndarray:
    """int32 (B, T): 0 for padding, another number for each answer of a row."""
    numbers_AT = np.broadcast_to(
        np.arange(1, len(places.row_A) + 1, dtype=np.int32)[:, None], (len(places.row_A), places.shape[1])
    )
    return to_rows(places, numbers_AT)
