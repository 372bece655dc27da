"""Answers that share rows: each stands whole in one row, apart from its neighbours, and the fewest parts are filled."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.training.answer_rows import place, segment_ids, to_answers, to_rows

LENGTH = 16


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=24), st.sampled_from([1, 2, 4]))
def test_what_is_laid_into_rows_comes_back_and_neighbours_are_apart(lengths, parts):
    rows = len(lengths) + -len(lengths) % parts
    places = place(lengths, rows, LENGTH, parts)
    real_AT = np.arange(LENGTH) < np.array(lengths)[:, None]
    numbers_AT = np.where(real_AT, np.arange(1, real_AT.size + 1).reshape(real_AT.shape), 0)
    rows_BT = to_rows(places, numbers_AT)
    assert rows_BT.shape == (rows, LENGTH)
    assert np.array_equal(np.sort(rows_BT[rows_BT > 0]), np.sort(numbers_AT[real_AT])), "every token once"
    assert np.array_equal(to_answers(places, rows_BT), numbers_AT)
    segments_BT = segment_ids(places)
    assert np.array_equal(segments_BT > 0, rows_BT > 0)
    # A segment is an answer: its tokens follow each other, and no other answer has its number.
    for number in range(1, len(lengths) + 1):
        assert np.diff(rows_BT[segments_BT == number]).tolist() == [1] * (lengths[number - 1] - 1)


@given(st.lists(st.integers(1, LENGTH), min_size=8, max_size=8), st.sampled_from([1, 2, 4, 8]))
def test_parts_are_filled_one_after_the_other(lengths, parts):
    places = place(lengths, 8, LENGTH, parts)
    used = len(set(places.row_A.tolist()))
    filled = np.bincount(np.array(sorted(set(places.row_A.tolist()))) % parts, minlength=parts)
    whole, left = divmod(used, 8 // parts)
    assert filled.tolist() == ([8 // parts] * whole + [left] * (left > 0) + [0] * parts)[:parts]


def test_short_answers_take_few_rows_and_the_same_lengths_the_same_places():
    lengths = [12, 4, 3, 5, 8, 16, 1, 7, 8]
    places = place(lengths, 9, LENGTH)
    assert len(set(places.row_A.tolist())) == 4 == -(-sum(lengths) // LENGTH)
    assert all(np.array_equal(*both) for both in zip(places[:3], place(lengths, 9, LENGTH)[:3], strict=True))


def test_what_does_not_fit_a_row_is_a_bug():
    with pytest.raises(ValueError, match="does not fit a row of 16"):
        place([17], 1, LENGTH)
