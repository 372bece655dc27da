"""The stream of batches: the same for every process and worker count, from any cursor, for every kind of source."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data.documents import tokenize
from llama_jax.data.packing import Cursor
from llama_jax.data.pipeline import (
    DataConfig,
    held_out_batches,
    held_out_bytes,
    held_out_documents,
    make_batches,
    training_documents,
)
from llama_jax.errors import UserError

KINDS = ["text", "jsonl", "gz", "zst", "tfds", "tokens"]
ROWS, LENGTH = 4, 48


def batches_of(config, tokenizer, count, *, cursor=None, seed=1, processes=1):
    """The first global batches, from every process's part, and the cursors after them."""
    options = {"rows": ROWS, "length": LENGTH, "seed": seed, "cursor": cursor, "process_count": processes}
    streams = [make_batches(config, tokenizer, process_index=i, **options) for i in range(processes)]
    parts = [list(itertools.islice(stream, count)) for stream in streams]
    for stream in streams:
        stream.close()
    cursors = [[cursor for _, cursor in part] for part in parts]
    assert all(other == cursors[0] for other in cursors)
    batches = [np.concatenate([np.stack(part[i][0], axis=-1) for part in parts]) for i in range(count)]
    return batches, cursors[0]


def assert_same(batches, expected):
    for batch, expected_batch in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch, expected_batch)


def documents_of(batches, tokenizer):
    """The texts in a run of batches whose stream starts with a document; the last one may be cut."""
    stream = np.concatenate([batch[..., 0].ravel() for batch in batches])
    starts = np.flatnonzero(stream == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part) for part in np.split(stream, starts[1:])]


@pytest.fixture
def config(specs, request):
    return DataConfig(sources=(specs[request.param],), held_out=0.1)


@pytest.mark.parametrize("config", KINDS, indirect=True)
def test_stopping_anywhere_and_going_on_changes_nothing(config, tokenizer, texts):
    count = 30  # beyond the first epoch
    whole, cursors = batches_of(config, tokenizer, count)
    assert cursors[-1].document > len(texts)
    for k in range(count - 1):
        saved = Cursor(*json.loads(json.dumps(cursors[k])))
        rest, cursors_after = batches_of(config, tokenizer, count - 1 - k, cursor=saved)
        assert_same(rest, whole[k + 1 :])
        assert cursors_after == cursors[k + 1 :]


@pytest.mark.parametrize("config", ["text", "tokens"], indirect=True)
def test_processes_together_see_what_one_sees_also_after_a_change_of_their_number(config, tokenizer):
    whole, cursors = batches_of(config, tokenizer, 6)
    for processes in (2, 4):
        assert_same(batches_of(config, tokenizer, 6, processes=processes)[0], whole)
        rest, _ = batches_of(config, tokenizer, 3, processes=processes, cursor=cursors[2])
        assert_same(rest, whole[3:])


@pytest.mark.parametrize("config", ["gz", "tfds", "tokens"], indirect=True)
def test_workers_change_nothing_also_after_a_change_of_their_number(config, tokenizer):
    whole, cursors = batches_of(config, tokenizer, 20)
    worked = dataclasses.replace(config, workers=2)
    rest, cursors_after = batches_of(worked, tokenizer, 17, cursor=cursors[2])
    assert_same(rest, whole[3:])
    assert cursors_after == cursors[3:]


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_a_mixture_resumes_and_slices_like_a_single_source(specs, tokenizer, weights):
    config = DataConfig(sources=(specs["jsonl"], specs["tokens"]), weights=weights, held_out=0)
    whole, cursors = batches_of(config, tokenizer, 20)
    for k in (0, 7, 18):
        assert_same(batches_of(config, tokenizer, 19 - k, cursor=cursors[k])[0], whole[k + 1 :])
    assert_same(batches_of(config, tokenizer, 20, processes=2)[0], whole)


@pytest.mark.parametrize("config", ["text"], indirect=True)
def test_prefetching_changes_nothing(config, tokenizer):
    expected = batches_of(config, tokenizer, 5)
    for prefetch in (0, 7):
        found = batches_of(dataclasses.replace(config, prefetch=prefetch), tokenizer, 5)
        assert_same(found[0], expected[0])
        assert found[1] == expected[1]


def test_every_source_gives_the_same_batches_for_the_same_documents(specs, tokenizer):
    expected, _ = batches_of(DataConfig(sources=(specs["text"],)), tokenizer, 6)
    for kind in ("jsonl", "gz", "zst", "tokens"):  # tfds stores documents in an order of its own
        assert_same(batches_of(DataConfig(sources=(specs[kind],)), tokenizer, 6)[0], expected)


@pytest.mark.parametrize("config", KINDS, indirect=True)
def test_an_epoch_holds_each_training_document_once_and_no_held_out_one(config, tokenizer, texts):
    held_out = list(held_out_documents(config, tokenizer))
    expected = sorted(set(texts) - set(held_out))
    assert len(held_out) == 12 and len(expected) == 108
    seen = documents_of(batches_of(config, tokenizer, 70)[0], tokenizer)
    assert sorted(seen[:108]) == expected
    assert sorted(seen[108:216]) == expected
    assert seen[:108] != seen[108:216]  # another order


def test_the_order_follows_the_seed_and_without_shuffling_the_source(specs, tokenizer, texts):
    config = DataConfig(sources=(specs["text"],), held_out=0)
    one, again, other = (documents_of(batches_of(config, tokenizer, 8, seed=s)[0], tokenizer) for s in (1, 1, 2))
    assert one == again and one[:10] != other[:10]
    unshuffled = dataclasses.replace(config, shuffle=False)
    assert documents_of(batches_of(unshuffled, tokenizer, 8)[0], tokenizer)[:30] == texts[:30]


def test_neighbouring_seeds_share_no_epoch(specs, tokenizer):
    config = DataConfig(sources=(specs["text"],), held_out=0)
    epochs = []
    for seed in (1, 2, 3):
        seen = documents_of(batches_of(config, tokenizer, 100, seed=seed)[0], tokenizer)
        epochs += [tuple(seen[first : first + 120]) for first in (0, 120, 240)]
    assert len(set(epochs)) == 9


def test_held_out_documents_do_not_follow_the_seed_or_the_tokeniser_source(specs, tokenizer):
    by_kind = [
        list(held_out_documents(DataConfig(sources=(specs[kind],), held_out=0.1), tokenizer))
        for kind in ("text", "tokens")
    ]
    assert by_kind[0] == by_kind[1]


@pytest.mark.parametrize("config", ["text", "tokens"], indirect=True)
@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_batches_score_every_byte_of_the_held_out_documents_once(config, tokenizer, processes):
    held_out = list(held_out_documents(config, tokenizer))
    parts = [
        list(held_out_batches(config, tokenizer, rows=4, length=32, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    targets = sum(int(batch.loss_mask_BT.sum()) for part in parts for batch in part)
    assert targets == sum(len(tokenizer.encode(text, bos=False, eos=True)) for text in held_out)
    assert held_out_bytes(config, tokenizer) == sum(len(text.encode()) for text in held_out)
    last = parts[-1][-1]
    assert not last.loss_mask_BT[last.segment_ids_BT == 0].any() and (last.segment_ids_BT == 0).any()


def test_evaluation_takes_evenly_spaced_documents_up_to_the_limit(specs, tokenizer, texts):
    config = DataConfig(sources=(specs["text"],), eval_sources=(specs["jsonl"],), eval_documents=4)
    assert list(held_out_documents(config, tokenizer)) == [texts[0], texts[30], texts[60], texts[90]]
    everything = dataclasses.replace(config, eval_documents=0)
    assert list(held_out_documents(everything, tokenizer)) == texts


def test_with_evaluation_sources_of_their_own_all_documents_are_trained_on(specs, tokenizer, texts):
    config = DataConfig(sources=(specs["text"],), eval_sources=("tfds:rainy_plains:test",), shuffle=False)
    assert documents_of(batches_of(config, tokenizer, 40)[0], tokenizer)[:120] == texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "Set --data.sources"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 sources"),
        ({"weights": (0.0,)}, "above 0"),
        ({"held_out": 0.7}, "between 0 and 0.5"),
        ({"held_out": -0.1}, "between 0 and 0.5"),
    ],
)
def test_configurations_that_cannot_be_are_refused_before_the_first_batch(specs, tokenizer, changes, message):
    config = dataclasses.replace(DataConfig(sources=(specs["text"],)), **changes)
    with pytest.raises(UserError, match=message):
        make_batches(config, tokenizer, rows=1, length=8, seed=0)


def test_other_refusals(specs, tokenizer, tmp_path):
    config = DataConfig(sources=(specs["text"],))
    with pytest.raises(UserError, match="6 rows cannot be shared equally by 4"):
        make_batches(config, tokenizer, rows=6, length=8, seed=0, process_count=4)
    with pytest.raises(UserError, match="No document is held out"):
        held_out_batches(dataclasses.replace(config, held_out=0), tokenizer, rows=1, length=8)
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(UserError, match="single document"):
        make_batches(DataConfig(sources=(f"text:{tmp_path}/one.txt",)), tokenizer, rows=1, length=8, seed=0)


def test_errors_while_running_reach_the_reader(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n\n{"text": "good"}\n{"text": \n')
    config = DataConfig(sources=(f"jsonl:{tmp_path}/bad.jsonl",), held_out=0)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 4 is not JSON"):
        list(make_batches(config, tokenizer, rows=1, length=8, seed=0))


def test_documents_without_any_text_end_with_a_message(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 5)
    config = DataConfig(sources=(f"jsonl:{tmp_path}/empty.jsonl",), held_out=0)
    with pytest.raises(UserError, match="All 5 documents of the sources are empty"):
        next(make_batches(config, tokenizer, rows=1, length=8, seed=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_that_ends_without_closing_its_batches_ends_well(specs, tokenizer, tmp_path, workers):
    tokenizer.save(tmp_path / "tokenizer.model")
    (tmp_path / "program.py").write_text(
        "from llama_jax.data.pipeline import DataConfig, make_batches\n"
        "from llama_jax.text.tokenizer import Tokenizer\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(sources=({specs['text']!r},), workers={workers})\n"
        f"    batches = make_batches(config, Tokenizer.load({str(tmp_path)!r}), rows=2, length=64, seed=0)\n"
        "    print(len(next(batches)[0].tokens_BT))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, str(tmp_path / "program.py")]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr


@pytest.mark.parametrize("long_kind", ["text", "tokens"])
def test_weights_are_shares_of_the_tokens_however_long_the_documents(tokenizer, tmp_path, long_kind):
    lengths = np.random.default_rng(0).integers(10, 90, 4000).tolist()
    short = "".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths)
    (tmp_path / "short.jsonl").write_text(short)
    # Longer than what is looked at to estimate their length.
    (tmp_path / "long.txt").write_text("<|endoftext|>\n".join("y" * (3000 + 10 * n) + "\n" for n in range(300)))
    long = f"text:{tmp_path}/long.txt"
    if long_kind == "tokens":
        tokenize((long,), tokenizer, tmp_path / "shards", say=lambda line: None)
        long = f"tokens:{tmp_path}/shards"
    config = DataConfig(sources=(f"jsonl:{tmp_path}/short.jsonl", long), weights=(3, 1), held_out=0)
    stream = make_batches(config, tokenizer, rows=8, length=1024, seed=0)
    seen = np.concatenate([batch.tokens_BT.ravel() for batch, _ in itertools.islice(stream, 150)])
    stream.close()
    y_id = tokenizer.encode("-y", bos=False)[-1]
    documents = np.split(seen, np.flatnonzero(seen == tokenizer.bos_id)[1:])
    of_long = sum(len(ids) for ids in documents if (ids == y_id).any())
    assert abs(of_long / len(seen) - 0.25) < 0.01


@pytest.mark.parametrize("config", ["text", "jsonl", "tfds"], indirect=True)
def test_the_tokenizers_texts_are_those_trained_on(config, tokenizer, texts):
    assert sorted(training_documents(config)) == sorted(set(texts) - set(held_out_documents(config, tokenizer)))
