"""Pairs of every source become the same preferences; what is bad, excluded or too long is counted, and nothing is seen twice."""

import gzip
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from llama_jax.data.dialogues import Skipped, open_rows
from llama_jax.data.pair_statistics import agreement, statistics
from llama_jax.data.pairs import (
    UNKNOWN,
    BatchCursor,
    BatchShape,
    PairOrder,
    PreferenceConfig,
    evenly_spaced,
    load_pairs,
    pack_pairs,
    pair_batches,
)
from llama_jax.data.preferences import (
    PAIR_SHAPES,
    Preference,
    Strength,
    detect_pair_shape,
    encode_judged,
    encode_pair,
    pair_shape_named,
    read_preferences,
)
from llama_jax.errors import UserError
from llama_jax.text.chat import Llama2Chat, Message, Plain, encode_prompt
from llama_jax.text.tokenizer import Tokenizer

TEMPLATE = Llama2Chat()
QUESTION, GOOD, BAD = "Why is the sky blue?", "Light scatters.", "It is paint."
PROMPT = (Message("user", QUESTION),)
LONG_PROMPT = (Message("user", "Hello"), Message("assistant", "Hi."), Message("user", QUESTION))
TURNS = [{"role": role, "content": content} for role, content in LONG_PROMPT]


def transcript(*messages: Message) -> str:
    return "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {content}" for role, content in messages)


def answered(prompt: tuple[Message, ...], text: str) -> list[dict]:
    return [*({"role": m.role, "content": m.content} for m in prompt), {"role": "assistant", "content": text}]


ROWS = {
    "transcripts": {
        "chosen": transcript(*PROMPT, Message("assistant", GOOD)),
        "rejected": transcript(*PROMPT, Message("assistant", BAD)),
    },
    "dialogues": {"prompt": QUESTION, "chosen": answered(PROMPT, GOOD), "rejected": answered(PROMPT, BAD)},
    "answers": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "stackexchange": {"question": QUESTION, "response_j": GOOD, "response_k": BAD},
    "shp": {"history": QUESTION, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0},
    "webgpt": {
        "question": {"full_text": QUESTION},
        "answer_0": BAD,
        "answer_1": GOOD,
        "score_0": -0.5,
        "score_1": 0.5,
    },
}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, *rows, shape="auto"):
    source = open_rows(write(tmp_path / "rows.jsonl", rows))
    skipped, excluded = Skipped(), Counter()
    shape = pair_shape_named(shape) or detect_pair_shape(source, "rows.jsonl")
    return list(read_preferences(source, shape, TEMPLATE, skipped, excluded)), skipped, excluded


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [f"{QUESTION} {GOOD} {BAD} [INST] Hello Hi. [/INST]\n"] * 20
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=320)


@pytest.mark.parametrize("name", ROWS)
def test_every_shape_is_recognised_and_gives_the_same_preference(tmp_path, name):
    source = open_rows(write(tmp_path / "one.jsonl", [ROWS[name]]))
    assert detect_pair_shape(source, "").name == name
    assert read(tmp_path, ROWS[name])[0] == [Preference(PROMPT, GOOD, BAD)]


def test_every_shape_but_that_of_summaries_is_in_the_table():
    assert {shape.name for shape in PAIR_SHAPES} == {*ROWS, "summaries"}


@pytest.mark.parametrize("summaries", [[{"text": BAD}, {"text": GOOD}], {"text": [BAD, GOOD]}], ids=["rows", "columns"])
def test_a_comparison_of_summaries_asks_for_one(tmp_path, summaries):
    ((preference,), *_) = read(tmp_path, {"info": {"post": "A tale."}, "summaries": summaries, "choice": 1})
    assert (preference.chosen, preference.rejected) == (GOOD, BAD)
    assert preference.prompt == (Message("user", "A tale.\n\nSummarize this."),)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "chosen": GOOD, "rejected": BAD},
        {"prompt": TURNS, "chosen": answered((), GOOD), "rejected": answered((), BAD)},
        {"chosen": answered(LONG_PROMPT, GOOD), "rejected": answered(LONG_PROMPT, BAD)},
        {
            "chosen": transcript(*LONG_PROMPT, Message("assistant", GOOD)),
            "rejected": transcript(*LONG_PROMPT, Message("assistant", BAD)),
        },
    ],
)
def test_a_prompt_of_several_turns_is_what_both_share(tmp_path, row):
    assert read(tmp_path, row)[0] == [Preference(LONG_PROMPT, GOOD, BAD)]


def test_the_better_answer_is_chosen_whichever_comes_first(tmp_path):
    swapped = {"history": QUESTION, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1}
    assert read(tmp_path, swapped)[0] == [Preference(PROMPT, GOOD, BAD)]
    swapped = ROWS["webgpt"] | {"answer_0": GOOD, "answer_1": BAD, "score_0": 0.5, "score_1": -0.5}
    assert read(tmp_path, swapped)[0] == [Preference(PROMPT, GOOD, BAD)]
    preferences, skipped, excluded = read(tmp_path, swapped | {"score_0": 0.0, "score_1": 0.0})
    assert not preferences and not skipped.count and excluded == {"no preference": 1}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("significantly better", Strength.SIGNIFICANTLY),
        ("better", Strength.BETTER),
        ("Slightly better", Strength.SLIGHTLY),
        ("negligibly better / unsure", Strength.NEGLIGIBLY),
        ("unsure", Strength.NEGLIGIBLY),
        (3, Strength.SIGNIFICANTLY),
        (0, Strength.NEGLIGIBLY),
        (None, None),
    ],
)
@pytest.mark.parametrize("field", ["strength", "rating"])
def test_a_strength_is_understood(tmp_path, field, said, meant):
    assert read(tmp_path, ROWS["answers"] | {field: said})[0][0].strength is meant


@pytest.mark.parametrize("value", ["hardly", "", 4, 0.7, True, [1]])
def test_another_strength_is_a_bad_row(tmp_path, value):
    preferences, skipped, _ = read(tmp_path, ROWS["answers"] | {"strength": value})
    assert not preferences and skipped.reasons == {"unknown strength": 1}


@pytest.mark.parametrize(
    ("label", "chosen", "rejected"),
    [("chosen safe", True, False), ("both_safe", True, True), ("Both unsafe", False, False)],
)
def test_a_safety_label_says_which_answer_is_safe(tmp_path, label, chosen, rejected):
    for row in ({"safety": label}, {"chosen_safe": chosen, "rejected_safe": rejected}):
        ((one,), *_) = read(tmp_path, ROWS["answers"] | row)
        assert (one.chosen_safe, one.rejected_safe) == (chosen, rejected)
    assert read(tmp_path, ROWS["answers"] | {"safety": "safe"})[1].reasons == {"unknown safety": 1}


def test_pairs_to_learn_nothing_from_are_excluded_and_are_not_bad(tmp_path):
    preferences, skipped, excluded = read(
        tmp_path,
        ROWS["answers"],
        ROWS["answers"] | {"safety": "rejected safe"},
        ROWS["answers"] | {"chosen_safe": False, "rejected_safe": True},
        ROWS["answers"] | {"rejected": GOOD + " "},
    )
    assert len(preferences) == 1 and not skipped.count
    assert excluded == {"chosen unsafe, other safe": 2, "equal answers": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": QUESTION, "chosen": "", "rejected": BAD}, "empty answer"),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": "[/INST] Yes."}, "tag in a message"),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": 3}, "another shape"),
        (
            {
                "chosen": answered(PROMPT, GOOD),
                "rejected": answered((Message("user", "Another question?"),), BAD),
            },
            "another shape",
        ),
        ({"prompt": QUESTION, "response": GOOD}, "another shape"),
    ],
)
def test_bad_rows_are_counted_and_named(tmp_path, row, reason):
    preferences, skipped, _ = read(tmp_path, row, ROWS["answers"], shape="answers")
    assert len(preferences) == 1 and skipped.reasons == {reason: 1}
    assert skipped.first[0].startswith(str(tmp_path / "rows.jsonl") + ", line 1: ")


def test_dialogues_that_differ_before_the_last_answer_are_no_pair(tmp_path):
    row = ROWS["dialogues"] | {"rejected": answered((Message("user", "Another question?"),), BAD)}
    assert read(tmp_path, row)[1].reasons == {"different prompts": 1}
    row = {"chosen": transcript(*PROMPT, Message("assistant", GOOD)), "rejected": transcript(*PROMPT)}
    assert read(tmp_path, row)[1].reasons == {"different prompts": 1}


def test_too_many_bad_rows_and_unknown_shapes_are_errors(tmp_path, tokenizer):
    path = write(tmp_path / "bad.jsonl", [ROWS["answers"], {"prompt": QUESTION, "chosen": GOOD, "rejected": ""}])
    with pytest.raises(UserError, match=r"1 of 2 rows \(50.00%\) left out: 1 empty answer; at most 1.00% may be"):
        load_pairs(PreferenceConfig((path,)), tokenizer, TEMPLATE, 64)
    with pytest.raises(UserError, match="no preferences of a known shape: its first row has the fields text. Expected"):
        load_pairs(PreferenceConfig((write(tmp_path / "x.jsonl", [{"text": "x"}]),)), tokenizer, TEMPLATE, 64)
    with pytest.raises(UserError, match="--data.shape pairs is none of auto, transcripts"):
        pair_shape_named("pairs")
    with pytest.raises(UserError, match="Set --data.sources"):
        load_pairs(PreferenceConfig(), tokenizer, TEMPLATE, 64)


@pytest.mark.parametrize("template", [Llama2Chat(), Plain()])
def test_both_dialogues_begin_with_the_prompt_and_end_with_eos(tokenizer, template):
    pair = encode_pair(tokenizer, Preference(LONG_PROMPT, GOOD, BAD), template, 512)
    prompt = encode_prompt(tokenizer, LONG_PROMPT, template)
    for ids, tokens in zip((pair.chosen, pair.rejected), pair.answers, strict=True):
        assert ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_id
        assert tokens == len(ids) - len(prompt)
    assert (pair.turns, pair.dropped) == (2, 0)


def test_a_long_prompt_loses_its_oldest_turns_in_both_dialogues_alike(tokenizer):
    system = Message("system", "Be brief.")
    turns = [Message(role, f"{role} {n} said this") for n in range(3) for role in ("user", "assistant")]
    preference = Preference((system, *turns, Message("user", QUESTION)), GOOD, BAD * 12)

    def sizes(prompt):
        return [
            len(encode_judged(tokenizer, d, TEMPLATE, 10**6)[0].ids)
            for d in Preference(prompt, GOOD, BAD * 12).dialogues
        ]

    kept = (system, *turns[4:], Message("user", QUESTION))  # without the two oldest turns
    chosen, rejected = sizes(kept)
    assert sizes((system, *turns[2:], Message("user", QUESTION)))[0] < rejected  # the chosen one alone would lose one
    pair = encode_pair(tokenizer, preference, TEMPLATE, rejected)
    assert (len(pair.chosen), len(pair.rejected), pair.dropped, pair.turns) == (chosen, rejected, 2, 2)
    assert pair.chosen[: chosen - pair.answers[0]] == encode_prompt(tokenizer, kept, TEMPLATE)
    assert encode_pair(tokenizer, preference, TEMPLATE, len(encode_prompt(tokenizer, PROMPT, TEMPLATE))) is None


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tokenizer):
    """Two sources of 30 and 10 pairs, and a test set."""
    folder = tmp_path_factory.mktemp("sources")
    strengths = itertools.cycle(("significantly better", "better", "better", "unsure"))
    first = [ROWS["answers"] | {"prompt": f"question {n}", "strength": next(strengths)} for n in range(30)]
    second = [ROWS["answers"] | {"prompt": f"other {n}", "safety": "chosen safe"} for n in range(10)]
    third = [ROWS["answers"] | {"prompt": f"question {n}"} for n in range(5)]
    paths = [write(folder / f"{n}.jsonl", rows) for n, rows in enumerate((first, second, third))]
    config = PreferenceConfig(tuple(paths[:2]), tests=(paths[2],), held_out=0.2)
    return load_pairs(config, tokenizer, TEMPLATE, 64)


def test_pairs_are_held_out_by_their_prompt_and_test_sets_are_whole(loaded, tmp_path, tokenizer):
    assert len(loaded.train) + len(loaded.held_out) == 40 and len(loaded.held_out) > 0 and len(loaded.tests) == 5
    rows = [ROWS["answers"] | {"prompt": f"question {n % 20}", "rejected": f"{BAD} {n}"} for n in range(60)]
    again = load_pairs(PreferenceConfig((write(tmp_path / "x.jsonl", rows),), held_out=0.3), tokenizer, TEMPLATE, 64)
    prompts = [
        {tuple(side[number][0][: -side.answers[number, 0]]) for number in range(len(side))}
        for side in (again.train, again.held_out)
    ]
    assert len(prompts[0]) + len(prompts[1]) == 20 and not prompts[0] & prompts[1]


def test_labels_arrive_and_are_unknown_where_the_source_is_silent(loaded):
    pairs, first = loaded.train, loaded.train.sizes[0]
    assert set(pairs.strength[:first]) == {0, 2, 3} and set(pairs.strength[first:]) == {UNKNOWN}
    assert (pairs.safe[:first] == UNKNOWN).all() and (pairs.safe[first:] == (1, 0)).all()
    shares = agreement(pairs, np.arange(len(pairs)))
    assert shares["chosen safe"] == 1 and shares["slightly"] == 0
    assert sum(shares[name.name.lower()] for name in Strength) == pytest.approx(1)


def numbers_of(order, batch) -> list[int]:
    """Which pairs are in a batch, by looking the ids of both their dialogues up."""
    known = {(tuple(a), tuple(b)): n for n, (a, b) in enumerate(map(order.pairs.__getitem__, range(len(order.pairs))))}
    found = []
    for r, k in zip(*np.nonzero(batch.pair_mask_BK), strict=True):
        sides = []
        for last in (batch.chosen_last_BK[r, k], batch.rejected_last_BK[r, k]):
            own = batch.segment_ids_BT[r] == batch.segment_ids_BT[r, last]
            assert own.nonzero()[0][-1] == last  # the last token of its dialogue
            sides.append(tuple(batch.tokens_BT[r, own]))
        found.append(known[tuple(sides)])
    return found


def labels_of(batch) -> list[tuple]:
    labels = (batch.strength_BK, batch.chosen_safe_BK, batch.rejected_safe_BK)
    return list(zip(*(array[batch.pair_mask_BK].tolist() for array in labels), strict=True))


def test_an_epoch_shows_every_pair_once_and_the_next_another_order(loaded):
    order = PairOrder(loaded.train, count=8, seed=1)
    shape = order.shape(2, 128, 2)
    stream = [batch for batch, _ in itertools.islice(pair_batches(order, shape), 2 * order.batches)]
    numbers = [numbers_of(order, batch) for batch in stream]
    first, second = (list(itertools.chain(*part)) for part in (numbers[: order.batches], numbers[order.batches :]))
    assert sorted(first) == sorted(second) == list(range(len(loaded.train))) and first != second
    assert {len(own) for own in numbers[: order.batches - 1]} == {8}
    pairs = order.pairs
    for batch, own in zip(stream, numbers, strict=True):
        assert labels_of(batch) == [(pairs.strength[n], *pairs.safe[n]) for n in own]
        assert not batch.tokens_BT[batch.segment_ids_BT == 0].any()
        assert (batch.strength_BK[~batch.pair_mask_BK] == UNKNOWN).all()
        assert batch.tokens_BT.shape == shape[:2] and batch.pair_mask_BK.shape == (shape.rows, shape.places)


def test_rows_hold_as_many_pairs_as_have_room_and_as_few_as_a_batch_needs(loaded):
    pairs, numbers = loaded.train, np.arange(len(loaded.train))
    longest = int(pairs.lengths.sum(1).max())
    assert [len(row) for row in pack_pairs(pairs, numbers, longest)] == [1] * len(pairs)
    packed = pack_pairs(pairs, numbers, 3 * longest)
    assert sorted(itertools.chain(*packed)) == numbers.tolist() and len(packed) <= -(-len(pairs) // 3)
    assert all(pairs.lengths[row].sum() <= 3 * longest for row in packed)
    assert max(map(len, pack_pairs(pairs, np.repeat(numbers, 9), 10**5))) == 32
    shape = PairOrder(pairs, count=8).shape(1, 3 * longest, 4)
    assert shape == BatchShape(4, 3 * longest, 3)


def test_any_cursor_and_any_process_count_gives_the_same_pairs(loaded):
    order = PairOrder(loaded.train, count=8, seed=1)
    shape = order.shape(2, 128, 2)
    whole = list(itertools.islice(pair_batches(order, shape), 9))
    for start in (1, order.batches - 1, order.batches, 6):
        for (batch, cursor), (ours, our_cursor) in zip(
            whole[start:], pair_batches(order, shape, cursor=BatchCursor(start)), strict=False
        ):
            assert cursor == our_cursor and all(map(np.array_equal, batch, ours))
    shares = [pair_batches(order, shape, process_index=i, process_count=2) for i in range(2)]
    for (batch, _), (a, _), (b, _) in itertools.islice(zip(whole, *shares, strict=False), 9):
        assert all(map(np.array_equal, batch, map(np.concatenate, zip(a, b, strict=True))))


def test_weights_are_shares_of_the_pairs_and_nothing_is_seen_twice(loaded):
    pairs = loaded.train
    a, b = pairs.sizes
    order = PairOrder(pairs, count=4, weights=(1, 1))
    assert order.drawn == (min(a, b),) * 2
    drawn = order.epoch(0)
    assert len(set(drawn)) == len(drawn) == 2 * min(a, b) and (drawn < a).sum() == min(a, b)
    assert set(drawn[drawn < a]) != set(range(min(a, b)))  # from all of the source, not from its beginning
    assert set(drawn) != set(order.epoch(1))
    assert PairOrder(pairs, count=4, weights=(90, 10)).drawn == (a, round(a / 9))
    with pytest.raises(UserError, match="1 weights for 2 sources"):
        PairOrder(pairs, count=4, weights=(1,))


def test_numbers_are_evenly_spaced():
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7] and evenly_spaced(3, 0).tolist() == [0, 1, 2]
    assert evenly_spaced(3, 5).tolist() == [0, 1, 2] and not len(evenly_spaced(0, 5))


def test_statistics_are_those_of_the_papers_table(tmp_path, tokenizer):
    rows = [{"messages": TURNS, "chosen": GOOD, "rejected": BAD}, ROWS["answers"]]
    pairs = load_pairs(
        PreferenceConfig((write(tmp_path / "x.jsonl", rows),), held_out=0), tokenizer, TEMPLATE, 512
    ).train
    prompt, greeting = (len(encode_prompt(tokenizer, p, TEMPLATE)) for p in (PROMPT, LONG_PROMPT[:1]))
    answers = [len(pairs[1][side]) - prompt for side in range(2)]
    found = statistics(pairs, np.arange(2))
    assert found["comparisons"] == 2 and found["turns per dialogue"] == 1.5
    assert found["tokens in response"] == pytest.approx(np.mean(answers))
    assert found["tokens in prompt"] == pytest.approx(((prompt + greeting) / 2 + prompt) / 2)
    assert found["tokens per example"] == pytest.approx(np.mean([len(side) for n in range(2) for side in pairs[n]]))


def test_real_pairs_are_read(shared, tokenizer):
    """Anthropic's harmless pairs: of 1156 all are whole, and none is bad."""
    spec = str(shared / "hh_rlhf_harmless_1156.jsonl.gz")
    rows, skipped, excluded = open_rows(spec), Skipped(), Counter()
    shape = detect_pair_shape(rows, spec)
    preferences = list(read_preferences(rows, shape, TEMPLATE, skipped, excluded))
    assert shape.name == "transcripts" and skipped.rows == 1156
    assert skipped.count + excluded.total() + len(preferences) == 1156 and skipped.count <= 11
    with gzip.open(spec, "rt") as lines:
        raw = json.loads(next(lines))
    assert all(raw[side].strip().endswith(getattr(preferences[0], side)) for side in ("chosen", "rejected"))
