"""Rows of examples: the trained tokens are the answers, nothing is lost or doubled, and any cursor goes on the same."""

import dataclasses
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest

from llama_jax.data import examples as module
from llama_jax.data.drawing import random_order
from llama_jax.data.examples import (
    DialogueConfig,
    Examples,
    Packing,
    RowCursor,
    answer_batches,
    best_fit,
    content_hash,
    encode_to_fit,
    held_out_answer_batches,
    load_examples,
)
from llama_jax.errors import UserError
from llama_jax.text.chat import Encoded, Llama2Chat, Llama3Chat, Message, Plain, encode_dialogue

LENGTH, ROWS = 256, 4
TEMPLATE = Llama2Chat()


def random_dialogue(rng: random.Random, number: int, pairs: int) -> tuple[Message, ...]:
    words = ("the", "rain", "in", "spain", "1984", "quick\n\n", " fox ", "héllo", "🦙", "[", "/INST", "</s>")

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 6)))

    messages = [Message("system", text())] if rng.random() < 0.3 else []
    for pair in range(pairs):
        messages += [Message("user", f"{number}.{pair} {text()}"), Message("assistant", f"{number}/{pair} {text()}")]
    return tuple(messages)


DIALOGUES = [random_dialogue(random.Random(n), n, pairs=1 + (n % 3 == 0)) for n in range(150)]


def write(path, dialogues) -> str:
    path.write_text("".join(json.dumps({"messages": [m._asdict() for m in d]}) + "\n" for d in dialogues))
    return str(path)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dialogues") / "t.jsonl", DIALOGUES)


@pytest.fixture(scope="module")
def loaded(spec, tokenizer):
    return load_examples(DialogueConfig(sources=(spec,), held_out=0.1), tokenizer, TEMPLATE, LENGTH)


@pytest.fixture(scope="module")
def packing(loaded):
    return Packing(loaded.train, LENGTH, seed=3)


def batches_of(packing, count, *, cursor=None, processes=1, rows=ROWS):
    """The first global batches, from every process's part, and the cursors after them."""
    options = {"rows": rows, "cursor": cursor, "process_count": processes}
    parts = [
        list(itertools.islice(answer_batches(packing, process_index=i, **options), count)) for i in range(processes)
    ]
    cursors = [[cursor for _, cursor in part] for part in parts]
    assert all(other == cursors[0] for other in cursors)
    return [np.concatenate([np.stack(part[i][0], axis=-1) for part in parts]) for i in range(count)], cursors[0]


def assert_same(batches, expected):
    for batch, expected_batch in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch, expected_batch)


def segments_of(batch) -> list[Encoded]:
    """The examples that stand in a batch, read back from its arrays alone."""
    found = []
    for tokens, targets, segments, positions, trained in np.moveaxis(np.asarray(batch), -1, 1):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
            np.testing.assert_array_equal(positions[at], np.arange(len(at)))
            np.testing.assert_array_equal(tokens[at[1:]], targets[at[:-1]])
            found.append(Encoded([*tokens[at].tolist(), int(targets[at[-1]])], [False, *trained[at].astype(bool)]))
        padding = segments == 0
        assert not (tokens[padding].any() or targets[padding].any() or positions[padding].any())
        assert not trained[padding].any()
    return found


def stacked(batches):
    return [segment for batch in batches for segment in segments_of(np.stack(batch, axis=-1))]


def as_bytes(encoded: Encoded) -> tuple:
    return tuple(encoded.ids), tuple(map(bool, encoded.answer_mask))


def epoch_batches(packing, epoch=0):
    """All rows of an epoch in one batch."""
    rows = packing.epoch(epoch)
    return module.make_batch(packing.examples, rows, packing.length)


def test_an_epoch_holds_every_example_once_with_its_ids_and_mask(loaded, packing, tokenizer):
    held_out = {content_hash(d) for d in DIALOGUES if content_hash(d) < 0.1 * 2**64}
    expected = [encode_dialogue(tokenizer, d, TEMPLATE) for d in DIALOGUES if content_hash(d) not in held_out]
    assert 5 < len(held_out) < 30 and len(loaded.train) == len(expected)
    for epoch in (0, 1):
        found = segments_of(np.stack(epoch_batches(packing, epoch), axis=-1))
        assert Counter(map(as_bytes, found)) == Counter(map(as_bytes, expected))
    evaluated = stacked(held_out_answer_batches(loaded.held_out, length=LENGTH, rows=ROWS))
    rest = [encode_dialogue(tokenizer, d, TEMPLATE) for d in DIALOGUES if content_hash(d) in held_out]
    assert Counter(map(as_bytes, evaluated)) == Counter(map(as_bytes, rest))


def trained_texts(batch, tokenizer) -> list[str]:
    """The runs of trained targets in a batch, decoded, each of which must end with EOS."""
    texts = []
    for targets, segments, trained in zip(batch.targets_BT, batch.segment_ids_BT, batch.loss_mask_BT, strict=True):
        run = []
        for target, segment, counts in zip(targets.tolist(), segments.tolist(), trained.tolist(), strict=True):
            assert not counts or segment
            if counts:
                run.append(target)
            if run and (not counts or target == tokenizer.eos_id):
                assert run.pop() == tokenizer.eos_id
                texts.append(tokenizer.decode(run))
                run = []
        assert not run
    return texts


def answers_of(dialogues) -> Counter:
    return Counter(f"{m.content.strip()} " for d in dialogues for m in d if m.role == "assistant")


def test_what_is_trained_in_packed_rows_is_the_answers_and_their_eos(packing, tokenizer):
    in_training = [d for d in DIALOGUES if content_hash(d) >= 0.1 * 2**64]
    assert Counter(trained_texts(epoch_batches(packing), tokenizer)) == answers_of(in_training)


@pytest.mark.parametrize("template", [TEMPLATE, Plain()])
def test_of_answers_last_only_the_last_that_is_kept_is_trained(tmp_path, tokenizer, template):
    """Also where a dialogue is cut to fit a row: then an answer is the last that was not the last before."""
    dialogues = [random_dialogue(random.Random(n), n, pairs=1 + n) for n in range(30)]
    config = DialogueConfig(sources=(write(tmp_path / "t.jsonl", dialogues),), held_out=0, answers="last")
    loaded = load_examples(config, tokenizer, template, LENGTH)
    kept = [encode_to_fit(tokenizer, dialogue, template, LENGTH + 1)[1] for dialogue in dialogues]
    assert loaded.shortened == sum(count < len(d) for count, d in zip(kept, dialogues, strict=True)) > 5
    trained = trained_texts(epoch_batches(Packing(loaded.train, LENGTH)), tokenizer)
    last = [(d[count - 1],) for count, d in zip(kept, dialogues, strict=True) if count]
    assert Counter(text.strip() for text in trained) == Counter(text.strip() for text in answers_of(last))


def test_a_loss_mask_one_place_off_is_noticed(packing, tokenizer):
    """The mutant: the answer mask laid over the inputs instead of the targets."""
    batch = epoch_batches(packing)
    late = np.zeros_like(batch.loss_mask_BT)
    late[:, 1:] = batch.loss_mask_BT[:, :-1]
    with pytest.raises(AssertionError):
        trained_texts(batch._replace(loss_mask_BT=late), tokenizer)


@pytest.mark.parametrize("weights", [(), (2.0, 1.0)])
def test_stopping_anywhere_and_going_on_changes_nothing(loaded, weights):
    examples = dataclasses.replace(loaded.train, sizes=(100, len(loaded.train) - 100))
    packing = Packing(examples, LENGTH, seed=3, weights=weights)
    count = packing.count(2) // ROWS + 2  # beyond two epochs
    whole, cursors = batches_of(packing, count)
    assert cursors[-1].row > packing.count(2)
    for k in range(count - 1):
        saved = RowCursor(**json.loads(json.dumps(cursors[k]._asdict())))
        rest, cursors_after = batches_of(packing, count - 1 - k, cursor=saved)
        assert_same(rest, whole[k + 1 :])
        assert cursors_after == cursors[k + 1 :]


def test_processes_together_see_what_one_sees_also_after_a_change_of_their_number(packing):
    whole, cursors = batches_of(packing, 6)
    for processes in (2, 4):
        assert_same(batches_of(packing, 6, processes=processes)[0], whole)
        assert_same(batches_of(packing, 3, processes=processes, cursor=cursors[2])[0], whole[3:])
    with pytest.raises(UserError, match="4 rows cannot be shared equally by 3 processes"):
        answer_batches(packing, rows=ROWS, process_count=3)


def test_another_batch_size_goes_on_in_the_same_stream_of_rows(packing):
    whole, cursors = batches_of(packing, 6)
    other, _ = batches_of(packing, 4, rows=6, cursor=cursors[1])
    np.testing.assert_array_equal(np.concatenate(other)[:16], np.concatenate(whole[2:]))


def test_the_order_follows_the_seed_and_the_epoch(loaded, packing):
    orders = [Packing(loaded.train, LENGTH, seed=seed).epoch(epoch) for seed in (3, 4) for epoch in (0, 1, 2)]
    assert orders[0] == packing.epoch(0)
    assert len({json.dumps(order) for order in orders}) == 6
    # Another order and another company too, not the same rows shuffled.
    rows = [{tuple(sorted(row)) for row in order if len(row) > 1} for order in orders]
    assert all(len(a & b) < 0.3 * len(a) for a, b in itertools.combinations(rows, 2))


def test_the_order_is_fixed_for_good():
    """A run must go on with another release of NumPy: these numbers may never change."""
    assert random_order(8, 3, 1, 0).tolist() == [0, 6, 2, 1, 3, 7, 4, 5]


def test_weights_are_shares_of_the_tokens():
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(20, 40, 50), *rng.integers(3, 9, 400)]
    sources = [[Encoded([1] * n, [True] * n) for n in part] for part in (lengths[:50], lengths[50:])]
    examples = Examples.of(sources, 330)
    assert examples.sizes == (50, 400)
    packing = Packing(examples, 64, weights=(3.0, 1.0))
    counts, places = Counter(), np.zeros(2)
    for epoch in range(8):
        numbers = np.array(list(itertools.chain(*packing.epoch(epoch))))
        counts.update(numbers.tolist())
        places += [examples.places[numbers[part]].sum() for part in (numbers < 50, numbers >= 50)]
    assert abs(places[0] / places.sum() - 0.75) < 0.005
    first, second = (Packing(examples, 64)._draw(0, epoch).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    for source in (range(50), range(50, 450)):  # whole rounds: no example comes twice before all came once
        times = [counts[number] for number in source]
        assert max(times) - min(times) <= 1


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        ((1.0,), (3, 2), "1 weights for 2 sources"),
        ((1.0, 0.0), (3, 2), "Every weight must be above 0"),
        ((1.0, 1.0), (5, 0), r"weights 1\.0, 1\.0 for 5, 0 examples"),
    ],
)
def test_weights_that_do_not_suit_are_refused(weights, sizes, message):
    examples = Examples.of([[Encoded([1, 2], [False, True])] * size for size in sizes], 330)
    with pytest.raises(UserError, match=message):
        Packing(examples, 8, weights=weights)


def test_an_empty_source_without_weights_gives_nothing_and_stops_nothing():
    examples = Examples.of([[], [Encoded([1, 2], [False, True])] * 5], 330)
    assert sorted(itertools.chain(*Packing(examples, 8).epoch(0))) == [0, 1, 2, 3, 4]


def test_best_fit_puts_each_thing_into_the_fullest_row_with_room():
    assert best_fit([5, 6, 3, 2, 4, 1], 8) == [[0, 2], [1, 3], [4, 5]]
    rng = np.random.default_rng(0)
    for capacity in (1, 7, 64, 500):
        sizes = rng.integers(1, capacity + 1, 300).tolist()
        rows = best_fit(sizes, capacity)
        assert sorted(itertools.chain(*rows)) == list(range(300))
        left = []
        for number, size in enumerate(sizes):  # by the definition, row after row
            fitting = [room for room in left if room >= size]
            if fitting:
                chosen = next(r for r, row in enumerate(rows) if number in row)
                assert left[chosen] == min(fitting)
                left[chosen] -= size
            else:
                left.append(capacity - size)
                assert rows[len(left) - 1][0] == number
    with pytest.raises(ValueError, match="does not fit"):
        best_fit([9], 8)


def test_rows_are_nearly_full_and_the_report_says_how_full(packing):
    report = packing.report()
    batch = epoch_batches(packing)
    assert report == {
        "rows": len(batch.tokens_BT),
        "examples": len(packing.examples),
        "answer_tokens": int(batch.loss_mask_BT.sum()),
        "efficiency": float((batch.segment_ids_BT > 0).mean()),
    }
    assert report["efficiency"] > 0.9


@pytest.mark.parametrize("template", [TEMPLATE, Llama3Chat(1, 5, 6, 7), Plain()])
@pytest.mark.parametrize("system", [False, True])
def test_long_dialogues_keep_the_first_turns_that_fit(tokenizer, template, system):
    dialogue = random_dialogue(random.Random(1), 1, pairs=6)
    dialogue = tuple(m for m in dialogue if m.role != "system")
    if system:
        dialogue = (Message("system", "quick"), *dialogue)
    sizes = [len(encode_dialogue(tokenizer, dialogue[: system + 2 * n], template).ids) for n in range(1, 7)]
    for n, size in enumerate(sizes, start=1):
        for longest in (size, size + 1):
            encoded, kept = encode_to_fit(tokenizer, dialogue, template, longest)
            assert kept == system + 2 * n
            assert encoded == encode_dialogue(tokenizer, dialogue[:kept], template)
    assert encode_to_fit(tokenizer, dialogue, template, sizes[0] - 1) == (Encoded([], []), 0)


def test_what_is_cut_or_left_out_is_counted(tmp_path, tokenizer):
    long = random_dialogue(random.Random(1), 1, pairs=40)
    giant = (Message("user", "x " * 2000), Message("assistant", "y"))
    spec = write(tmp_path / "t.jsonl", [*DIALOGUES[:20], long, giant])
    loaded = load_examples(DialogueConfig(sources=(spec,), held_out=0), tokenizer, TEMPLATE, LENGTH)
    assert (loaded.shortened, loaded.too_long, len(loaded.train)) == (1, 1, 21)
    assert max(loaded.train.places) <= LENGTH
    assert "1 dialogues cut at a turn to fit a row, 1 left out as too long" in str(loaded)
    with pytest.raises(UserError, match=r"No dialogue is left to train on"):
        load_examples(DialogueConfig(sources=(spec,), held_out=0), tokenizer, TEMPLATE, 4)


def test_an_example_may_have_one_token_more_than_a_row_has_places(tmp_path, tokenizer):
    """Its last token is only a target."""
    config = DialogueConfig(sources=(write(tmp_path / "t.jsonl", DIALOGUES[1:2]),), held_out=0)
    tokens = len(encode_dialogue(tokenizer, DIALOGUES[1], TEMPLATE).ids)
    examples = load_examples(config, tokenizer, TEMPLATE, tokens - 1).train
    (found,) = segments_of(np.stack(epoch_batches(Packing(examples, tokens - 1)), axis=-1))
    assert len(found.ids) == tokens
    with pytest.raises(UserError, match="1 left out as too long"):
        load_examples(config, tokenizer, TEMPLATE, tokens - 2)


def test_held_out_dialogues_follow_their_content_alone(tmp_path, tokenizer):
    def held_out(dialogues, **changes):
        config = DialogueConfig(sources=(write(tmp_path / "t.jsonl", dialogues),), held_out=0.1, **changes)
        found = load_examples(config, tokenizer, Plain(), 4 * LENGTH).held_out
        return {tokenizer.decode(found[n][0][:-1]) for n in range(len(found))}

    expected = held_out(DIALOGUES)
    shuffled = random.Random(0).sample(DIALOGUES, len(DIALOGUES))
    assert held_out(shuffled) == expected and 5 < len(expected) < 30
    # Fewer or more dialogues around them move none to the other side.
    assert held_out(DIALOGUES[:75]) | held_out(DIALOGUES[75:]) == expected
    assert len(held_out(DIALOGUES, system_prompt="Be kind.")) == len(expected)


def test_several_sources_and_a_system_prompt(tmp_path, tokenizer):
    specs = tuple(write(tmp_path / f"{i}.jsonl", DIALOGUES[i::2][:10]) for i in range(2))
    config = DialogueConfig(sources=specs, held_out=0, system_prompt="Be kind.")
    examples = load_examples(config, tokenizer, TEMPLATE, LENGTH).train
    assert examples.sizes == (10, 10)
    kind = 0
    for number, dialogue in enumerate([*DIALOGUES[0::2][:10], *DIALOGUES[1::2][:10]]):
        if dialogue[0].role != "system":
            dialogue, kind = (Message("system", "Be kind."), *dialogue), kind + 1
        ids, mask = examples[number]
        assert (ids.tolist(), mask.tolist()) == encode_dialogue(tokenizer, dialogue, TEMPLATE)
    assert 5 < kind < 20


def test_ids_beyond_two_bytes_are_kept():
    examples = Examples.of([[Encoded([70_000, 2, 3], [False, True, True])]], vocab_size=128_256)
    assert examples[0][0].tolist() == [70_000, 2, 3] and examples.ids.dtype == np.int32
    assert Examples.of([[Encoded([65_535], [True])]], vocab_size=1 << 16)[0][0].tolist() == [65_535]


def test_the_last_held_out_batch_is_filled_with_empty_rows(loaded):
    for processes in (1, 2):
        parts = [
            list(
                held_out_answer_batches(
                    loaded.held_out, length=LENGTH, rows=8, process_index=i, process_count=processes
                )
            )
            for i in range(processes)
        ]
        assert len({len(part) for part in parts}) == 1
        assert all(batch.tokens_BT.shape == (8 // processes, LENGTH) for part in parts for batch in part)
        found = Counter(as_bytes(segment) for part in parts for segment in stacked(part))
        assert found == Counter(as_bytes(Encoded(*map(list, loaded.held_out[n]))) for n in range(len(loaded.held_out)))


def test_of_many_held_out_dialogues_some_are_evaluated(loaded):
    """As many as asked for, from all over; never one twice."""
    every = [as_bytes(Encoded(*map(list, loaded.held_out[n]))) for n in range(len(loaded.held_out))]
    for most in (1, 4, len(every) + 1):
        batches = held_out_answer_batches(loaded.held_out, length=LENGTH, rows=ROWS, most=most)
        places = sorted(every.index(as_bytes(segment)) for segment in stacked(batches))
        assert len(set(places)) == len(places) == min(most, len(every))
        assert most != 4 or (places[1] < len(every) / 2 <= places[2])


def test_too_many_bad_rows_are_an_error(tmp_path, tokenizer):
    path = tmp_path / "t.jsonl"
    write(path, DIALOGUES)
    path.write_text(path.read_text() + '{"messages": []}\n' * 2)
    config = DialogueConfig(sources=(str(path),))
    with pytest.raises(UserError, match=r"2 of 152 rows \(1\.32%\) left out: 2 wrong roles; at most 1\.00% may be"):
        load_examples(config, tokenizer, TEMPLATE, LENGTH)
    lenient = load_examples(dataclasses.replace(config, bad_rows=0.02), tokenizer, TEMPLATE, LENGTH)
    assert str(lenient).startswith("messages (`messages` or `conversations`, ")
    assert "): 2 of 152 rows (1.32%) left out: 2 wrong roles\n" in str(lenient)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, r"Set --data\.sources"),
        ({"held_out": 0.6}, r"--data\.held-out 0\.6"),
        ({"eval_dialogues": -1}, r"--data\.eval-dialogues is -1"),
        ({"bad_rows": -0.1}, r"--data\.bad-rows -0\.1"),
        ({"shape": "alpaca"}, r"--data\.shape alpaca is none of auto"),
    ],
)
def test_bad_settings_are_refused(spec, tokenizer, changes, message):
    with pytest.raises(UserError, match=message):
        load_examples(DialogueConfig(**({"sources": (spec,)} | changes)), tokenizer, TEMPLATE, LENGTH)


@pytest.mark.parametrize("name", ["dolly_hhrlhf_train_small.jsonl", "hh_rlhf_harmless_1156.jsonl.gz"])
def test_real_dialogues_in_rows_of_the_papers_length(shared, tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    config = DialogueConfig(sources=(str(shared / name),), held_out=0.02)
    loaded = load_examples(config, tokenizer, TEMPLATE, 4096)
    packing = Packing(loaded.train, 4096)
    found = segments_of(np.stack(epoch_batches(packing), axis=-1))
    train = loaded.train
    assert Counter(map(as_bytes, found)) == Counter(as_bytes(Encoded(*map(list, train[n]))) for n in range(len(train)))
    assert packing.report()["efficiency"] > 0.95
    assert len(loaded.held_out) + len(train) + loaded.too_long + sum(s.count for s in loaded.skipped) in (1000, 1156)
