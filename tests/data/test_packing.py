"""Packing against a packer that is slow and obviously right, and against that packer made wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.packing import Batch, Cursor, pack
from llama_jax.errors import UserError

documents_strategy = st.lists(st.integers(0, 12), min_size=1, max_size=25)


def make_documents(lengths):
    """Documents in which every token is another number, from 1."""
    ends = np.cumsum(lengths)
    return [np.arange(end - size + 1, end + 1, dtype=np.uint16) for end, size in zip(ends, lengths, strict=True)]


def reference_rows(documents, rows, length):
    """Rows of (token, target, segment, position, mask), by the words of the definition; the last batch is padded."""
    stream = [(int(token), number) for number, tokens in enumerate(documents) for token in tokens]
    batches = -(-(len(stream) - 1) // (rows * length))  # the last token has no target
    result = []
    for first in range(0, batches * rows * length, length):
        row, segment, position = [], 0, 0
        for place in range(first, first + length):
            if place >= len(stream):
                row.append((0, 0, 0, 0, False))
                continue
            token, document = stream[place]
            is_new = place == first or stream[place - 1][1] != document
            segment, position = (segment + 1, 0) if is_new else (segment, position + 1)
            target, target_document = stream[place + 1] if place + 1 < len(stream) else (0, None)
            row.append((token, target, segment, position, target_document == document))
        result.append(row)
    return result


def packed_rows(documents, rows, length, own_rows=None, cursor=Cursor()):  # noqa: B008
    batches = pack(iter(documents), rows=rows, length=length, own_rows=own_rows or range(rows), cursor=cursor)
    return [np.stack(batch, axis=-1) for batch, _ in batches]


def assert_rows_are(packed, expected):
    np.testing.assert_array_equal(np.concatenate(packed), np.array(expected, np.int32))


@settings(max_examples=300, deadline=None)
@given(documents_strategy, st.integers(1, 4), st.integers(1, 9))
def test_every_field_equals_the_reference(lengths, rows, length):
    documents = make_documents(lengths)
    expected = reference_rows(documents, rows, length)
    packed = packed_rows(documents, rows, length)
    if not expected:
        assert packed == []
    else:
        assert_rows_are(packed, expected)


@settings(max_examples=200, deadline=None)
@given(documents_strategy, st.integers(1, 7))
def test_every_token_is_an_input_once_and_a_target_once_but_each_documents_first(lengths, length):
    documents = make_documents(lengths)
    batches = [batch for batch, _ in pack(iter(documents), rows=2, length=length, own_rows=range(2))]
    inputs = sorted(token for batch in batches for token in batch.tokens_BT[batch.segment_ids_BT > 0].tolist())
    targets = sorted(token for batch in batches for token in batch.targets_BT[batch.loss_mask_BT].tolist())
    total = sum(lengths)
    if batches:
        # The very last token has no target, so where it alone would begin a row it is no input either.
        assert inputs in (list(range(1, total + 1)), list(range(1, total)))
    assert targets == sorted(token for tokens in documents for token in tokens[1:].tolist())


@settings(max_examples=150, deadline=None)
@given(documents_strategy, st.integers(1, 6), st.sampled_from([(2, 2), (4, 2), (4, 4)]))
def test_processes_together_hold_what_one_holds(lengths, length, rows_and_processes):
    rows, processes = rows_and_processes
    documents = make_documents(lengths)
    whole = packed_rows(documents, rows, length)
    share = rows // processes
    parts = [packed_rows(documents, rows, length, range(i * share, (i + 1) * share)) for i in range(processes)]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[number] for part in parts]), batch)


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(1, 3), st.integers(1, 6))
def test_going_on_from_any_cursor_gives_the_rest(lengths, rows, length):
    documents = make_documents(lengths)
    whole = list(pack(iter(documents), rows=rows, length=length, own_rows=range(rows)))
    for number, (_, cursor) in enumerate(whole):
        rest = pack(iter(documents[cursor.document :]), rows=rows, length=length, own_rows=range(rows), cursor=cursor)
        for (batch, after), (expected, expected_after) in zip(rest, whole[number + 1 :], strict=True):
            assert after == expected_after
            for field, expected_field in zip(batch, expected, strict=True):
                np.testing.assert_array_equal(field, expected_field)


def mutate_targets(row):  # off by one
    return [(token, token, *rest) for token, _, *rest in row]


def mutate_mask(row):  # BOS predicted from EOS
    return [(a, b, c, d, c > 0) for a, b, c, d, _ in row]


def mutate_positions(row):  # counted along the row
    return [(a, b, c, place if c else 0, e) for place, (a, b, c, _, e) in enumerate(row)]


def mutate_segments(row):  # one segment a row
    return [(a, b, min(c, 1), d, e) for a, b, c, d, e in row]


@pytest.mark.parametrize("mutate", [mutate_targets, mutate_mask, mutate_positions, mutate_segments])
def test_the_comparison_notices_a_wrong_packer(mutate):
    documents = make_documents([5, 3, 1, 9, 4])
    expected = reference_rows(documents, 2, 6)
    packed = packed_rows(documents, 2, 6)
    assert_rows_are(packed, expected)
    with pytest.raises(AssertionError):
        assert_rows_are(packed, [mutate(row) for row in expected])


def test_the_types_are_those_that_the_step_compiles_for():
    batch, _ = next(pack(iter(make_documents([9])), rows=2, length=3, own_rows=range(2)))
    assert isinstance(batch, Batch)
    assert [field.dtype for field in batch] == [np.int32] * 4 + [np.bool_]
    assert {field.shape for field in batch} == {(2, 3)}


def test_rows_of_other_processes_are_not_read():
    class Unreadable(np.ndarray):
        def __getitem__(self, key):
            raise AssertionError("read")

    mine, other = make_documents([8, 8])
    documents = [mine, other.view(Unreadable), *make_documents([8])]
    batch, cursor = next(pack(iter(documents), rows=3, length=7, own_rows=range(1)))
    np.testing.assert_array_equal(batch.tokens_BT, [np.arange(1, 8)])
    assert cursor == (2, 5)


def test_a_cursor_beyond_its_document_says_that_the_data_changed():
    with pytest.raises(UserError, match="Document 4 has 5 tokens, but 6 of them"):
        next(pack(iter(make_documents([5, 5])), rows=1, length=2, own_rows=range(1), cursor=Cursor(4, 6)))
