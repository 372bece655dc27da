"""Held-out pairs (paper 3.2.2): their scores, and what these come to."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import Compute
from llama_jax.data.pairs import BatchShape, LoadedPairs, PairBatch, Pairs, make_pair_batch, pack_pairs
from llama_jax.data.pipeline import own_rows
from llama_jax.model.heads import RewardModel
from llama_jax.parallel.mesh import constrain
from llama_jax.training.batches import share_of_process, to_devices
from llama_jax.training.preference_loss import pair_scores
from llama_jax.training.run_folder import write_whole

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Findings:
    """What a reward model's scores of held-out pairs came to."""

    pairs: int
    accuracy: float
    """Share of pairs ranked right, ties counted half."""
    length_correlation: float
    """Of the difference of two answers' scores with the difference of their lengths; nan if all are equally long."""
    padding_change: float
    """Largest change of a score when its pair stands alone in a row, behind the padding instead of before it, in standard
    deviations of the scores.
    """


def accuracy_of(scores: np.ndarray) -> float:
    """The share of pairs (n, 2), chosen first, that are ranked right; ties count half."""
    return float(np.mean(np.heaviside(scores[:, 0] - scores[:, 1], 0.5)))


def length_correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Correlation, over pairs (n, 2), of the difference in score with the difference in length; nan if either is always 0.

    Within pairs, as prompts differ in what they deserve; about zero, as it does not matter which answer comes first.
    """
    by_score, by_length = (np.diff(a.astype(np.float64), axis=1)[:, 0] for a in (scores, lengths))
    norm = math.sqrt(float(by_score @ by_score) * float(by_length @ by_length))
    return float(by_score @ by_length) / norm if norm else math.nan


class PairScorer:
    """Scores pairs in batches of one shape, on the ambient mesh."""

    def __init__(self, mesh: Mesh, compute: Compute, rows: int, length: int):
        """Takes rows of a global batch, and tokens in a row, in which any pair fits."""
        self._mesh, self._rows, self._length = mesh, rows, length
        self._scores = jax.jit(partial(_on_every_device, compute=compute), static_argnames="left")

    def scores(self, model: RewardModel, pairs: Pairs, numbers: np.ndarray) -> np.ndarray:
        """Scores, float32 (n, 2), the chosen answers' first, of the pairs of these numbers."""
        return self._of_rows(model, pairs, pack_pairs(pairs, numbers, self._length), left=False)[numbers]

    def findings(self, model: RewardModel, pairs: Pairs, numbers: np.ndarray) -> tuple[Findings, np.ndarray]:
        """What the scores (n, 2) of the pairs of these numbers come to, and the scores."""
        scores, few = self.scores(model, pairs, numbers), numbers[: self._rows]
        alone = self._of_rows(model, pairs, [[int(number)] for number in few], left=True)[few]
        change = np.abs(alone - scores[: len(few)]).max() / max(scores.std(), 1e-9)
        follows = length_correlation(scores, pairs.answers[numbers])
        return Findings(len(scores), accuracy_of(scores), follows, float(change)), scores

    def _of_rows(self, model: RewardModel, pairs: Pairs, packed: Sequence[Sequence[int]], left: bool) -> np.ndarray:
        """Scores (pairs, 2) of the pairs in these rows; nan of all others."""
        shape = BatchShape(self._rows, self._length, max(map(len, packed), default=0))
        return of_each_pair(lambda batch: self._scores(model, batch, left=left), self._mesh, pairs, packed, shape)


def of_each_pair(
    score: Callable[[PairBatch], jax.Array],
    mesh: Mesh,
    pairs: Pairs,
    packed: Sequence[Sequence[int]],
    shape: BatchShape,
) -> np.ndarray:
    """Two numbers of each pair, float32 (pairs, 2), batch by batch; nan of those that stand in no row.

    Args:
      score: gives them for a global batch, (B, K, 2), on every device of the mesh.
      mesh: where the batches go.
      pairs: all of them.
      packed: which of them stand in which row.
      shape: of a batch.
    """
    scores = np.full((len(pairs), 2), np.nan, np.float32)
    own = own_rows(shape.rows, **share_of_process(mesh, shape.rows))
    for start in range(0, len(packed), shape.rows):
        rows = packed[start : start + shape.rows]
        batch = to_devices(mesh, make_pair_batch(pairs, rows, shape, own), shape.rows)
        got_BK2 = np.asarray(score(batch))
        for row, numbers in enumerate(rows):
            scores[numbers] = got_BK2[row, : len(numbers)]
    return scores


def _on_every_device(model: RewardModel, batch: PairBatch, compute: Compute, left: bool) -> jax.Array:
    return constrain(pair_scores(model, batch, compute, left), None, None, None)


def write_scores(folder: Path, loaded: LoadedPairs, held_out: np.ndarray, tests: np.ndarray) -> None:
    """Writes a line for each held-out pair, and each pair of a test set, with its scores (pairs, 2), into a run's folder."""
    names, trained = [found.source for found in loaded.found], len(loaded.train.sizes)
    lines = [
        *scored_lines("held out", names[:trained], loaded.held_out, held_out),
        *scored_lines("test", names[trained:], loaded.tests, tests),
    ]
    if jax.process_index() == 0:
        write_whole(folder / SCORES, "".join(lines).encode())


def scored_lines(kind: str, sources: Sequence[str], pairs: Pairs, scores: np.ndarray) -> list[str]:
    """A JSON line for each pair: where it is from, its labels, tokens of both answers and their scores."""
    columns = (pairs.source, pairs.strength, pairs.safe, pairs.answers, scores)
    return [
        json.dumps(
            {
                "set": kind,
                "source": sources[source],
                "strength": strength,
                "safe": safe,
                "tokens": tokens,
                "scores": both,
            }
        )
        + "\n"
        for source, strength, safe, tokens, both in zip(*(column.tolist() for column in columns), strict=True)
    ]
