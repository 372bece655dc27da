"""What is drawn from sources, and in which order: shared by dialogues to fine-tune on and by pairs of answers."""

from collections.abc import Sequence

import numpy as np

from llama_jax.errors import UserError


def random_order(count: int, *key: int) -> np.ndarray:
    """A random order of so many things. By raw bits: NumPy promises that these never change, unlike its shuffles."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def check_sources(sources: Sequence[str], held_out: float, bad_rows: float, things: str) -> None:
    """Raises UserError for no source at all, or for shares of its `things` that are none."""
    if not sources:
        raise UserError(f"No {things}. Set --data.sources to a .jsonl file, hf:NAME or tfds:NAME.")
    if not 0 <= held_out <= 0.5:
        raise UserError(f"--data.held-out {held_out} is no fraction of {things} between 0 and 0.5.")
    if not 0 <= bad_rows <= 1:
        raise UserError(f"--data.bad-rows {bad_rows} is no share of rows between 0 and 1.")


def check_weights(weights: Sequence[float], sizes: Sequence[int], things: str) -> None:
    """Raises UserError for weights that do not suit sources of so many `things` each; no weights suit all."""
    if weights and len(weights) != len(sizes):
        raise UserError(f"{len(weights)} weights for {len(sizes)} sources. Give --data.weights one number for each.")
    if weights and not (all(weight > 0 for weight in weights) and all(sizes)):
        found, counts = (", ".join(map(str, values)) for values in (weights, sizes))
        raise UserError(
            f"Every weight must be above 0 and no source empty, found weights {found} for {counts} {things}. "
            "Leave out sources not wanted."
        )
