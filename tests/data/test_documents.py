"""The order of documents: held-out and training parts, weights, epochs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.documents import EveryNth, mixed_in_order


@given(st.integers(2, 400), st.integers(2, 120))
def test_held_out_and_training_parts_share_nothing_and_lose_nothing(count, period):
    held_out = EveryNth(range(count), period, held_out=True)
    training = EveryNth(range(count), period, held_out=False)
    kept = [held_out[index] for index in range(len(held_out))]
    trained = [training[index] for index in range(len(training))]
    assert sorted(kept + trained) == list(range(count))
    assert trained == sorted(trained) and trained
    assert kept and set(np.diff(kept)) <= {period}
    assert abs(len(kept) - count / period) <= 1


def test_weights_are_shares_of_the_documents():
    """Llama 1's mix, in percent: CCNet, C4, GitHub, Wikipedia, Books, ArXiv, StackExchange."""
    weights = (67, 15, 4.5, 4.5, 4.5, 2.5, 2)
    sources = [range(1000 * number, 1000 * number + 50 + number) for number in range(7)]
    mixed = mixed_in_order(sources, weights, shuffle=False, seed=0)
    drawn = np.array([mixed[place] // 1000 for place in range(10_000)])
    for number, weight in enumerate(weights):
        assert abs((drawn == number).mean() - weight / 100) < 0.01 * weight / 100 + 1e-3


def test_each_source_of_a_mixture_goes_through_its_own_epochs():
    mixed = mixed_in_order([range(10), range(100, 140)], (1, 3), shuffle=True, seed=5)
    drawn = [mixed[place] for place in range(160)]
    small, large = [d for d in drawn if d < 100], [d for d in drawn if d >= 100]
    for part, size in ((small, 10), (large, 40)):
        epochs = [tuple(part[first : first + size]) for first in range(0, len(part), size)]
        assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == size for epoch in epochs)
        assert len(set(epochs)) == len(epochs) > 2


def test_without_weights_every_document_comes_once_an_epoch_whatever_its_source():
    mixed = mixed_in_order([range(10), range(100, 140)], (), shuffle=True, seed=5)
    drawn = [mixed[place] for place in range(100)]
    assert sorted(drawn[:50]) == sorted(drawn[50:]) == [*range(10), *range(100, 140)]
    assert drawn[:50] != drawn[50:]


@pytest.mark.parametrize("place", [0, 10**6, 10**12])
def test_any_place_of_the_endless_order_can_be_read_at_once(place):
    mixed = mixed_in_order([range(10), range(100, 140)], (1, 3), shuffle=True, seed=5)
    assert mixed.slice(slice(place, None))[3] == mixed[place + 3]
