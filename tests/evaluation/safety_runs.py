"""What a run of the safety benchmarks comes to, beside another."""

import json

import pytest


def leaves(value) -> list:
    """The texts and numbers in a JSON value, with the keys, in order."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in (key, *leaves(inner))]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def assert_same(one, other):
    """Two runs come to the same, log-probabilities to float32's rounding: after a stop they are summed in other batches."""
    found = []
    for out in (one, other):
        files = (out / "results.json", *sorted(out.glob("samples/*.jsonl")))
        values = leaves([[path.name, *map(json.loads, path.read_text().splitlines())] for path in files[1:]])
        values += leaves(json.loads(files[0].read_text()))
        found.append(
            [[leaf for leaf in values if isinstance(leaf, float) == are_floats] for are_floats in (False, True)]
        )
    (others, floats), (same, near) = found
    assert others == same and floats == pytest.approx(near, rel=1e-5) and len(floats) > 50
