"""Time awareness: the arithmetic of dates against an independent count, and rows that fine-tuning reads."""

import json
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import pytest

from experiments import time_awareness
from experiments.time_awareness import answer, examples, full_years, in_words, is_right
from llama_jax.data.examples import DialogueConfig, load_examples
from llama_jax.errors import UserError
from llama_jax.text.chat import Llama2Chat, Message, encode_prompt
from llama_jax.text.tokenizer import Tokenizer

EVENTS = [json.loads(line) for line in time_awareness.EVENTS.read_text().splitlines()]
MOON = date(1969, 7, 20)


def anniversaries_reached(event: date, query: date) -> int:
    """Counted day by day: how often a later day up to the query is the event's, by its name in the calendar."""
    count, day = 0, event + timedelta(days=1)
    while day <= query:
        leap_day_missing = (event.month, event.day) == (2, 29) and (day.month, day.day) == (3, 1)
        leap_day_missing = leap_day_missing and (day - timedelta(days=1)).day == 28
        count += (day.month, day.day) == (event.month, event.day) or leap_day_missing
        day += timedelta(days=1)
    return count


@pytest.mark.parametrize(
    "event", [MOON, date(1912, 1, 1), date(1999, 12, 31), date(1996, 2, 29), date(1990, 3, 1)], ids=str
)
def test_full_years_around_every_anniversary(event):
    for years in (0, 1, 2, 4, 9, 10, 100):
        for days in range(-2, 3):
            query = date(event.year + years, event.month, 1) + timedelta(days=event.day - 1 + days)
            if query >= event:
                assert full_years(event, query) == anniversaries_reached(event, query), query
            else:
                assert full_years(event, query) < 0


@pytest.mark.parametrize(
    ("query", "how_long", "whether"),
    [
        (date(1969, 7, 19), "not happened yet", "not happened yet"),
        (date(1969, 7, 20), "this very day", "Yes"),
        (date(1969, 7, 21), "less than a year ago", "Yes"),
        (date(1970, 7, 19), "less than a year ago", "Yes"),
        (date(1970, 7, 20), "1 year ago", "Yes"),
        (date(1971, 7, 19), "1 year ago", "Yes"),
        (date(1971, 7, 20), "2 years ago", "Yes"),
        (date(2019, 7, 19), "49 years ago", "Yes"),
        (date(2019, 7, 20), "50 years ago", "Yes"),
    ],
)
def test_the_answer_turns_on_the_day(query, how_long, whether):
    for kind, expected in (("how_long", how_long), ("whether", whether)):
        text, decisive = answer(kind, "the Moon landing", MOON, query)
        assert decisive == expected and decisive in text
        # What lies ahead is not told.
        assert ("20 July 1969" in text) == (query >= MOON)


def test_every_row_agrees_with_the_calendar():
    dates = {event["event"]: date.fromisoformat(event["date"]) for event in EVENTS}
    for row in examples(300):
        query = date.fromisoformat(row["query_date"])
        assert row["system"] == f"Today is {in_words(query)}." == f"Today is {query.day} {query:%B %Y}."
        if row["kind"] in ("year", "day"):
            assert row["event_date"] == "" and str(query.year) in row["response"]
            continue
        (event,) = (event for event in dates if event in row["prompt"])
        assert dates[event] == date.fromisoformat(row["event_date"])
        if query < dates[event]:
            assert "not happened yet" in row["response"]
        elif row["kind"] == "how_long" and (years := anniversaries_reached(dates[event], query)):
            assert row["response"].endswith(f", {years} year{'s' if years > 1 else ''} ago.")


def test_the_right_answer_is_right_and_that_of_another_day_is_not():
    rows = examples(300)
    assert all(is_right(row, row["response"]) for row in rows)
    row = {"decisive": "3 years ago"}
    assert not is_right(row, "That was 53 years ago.") and is_right(row, "It was 3 years ago, I think.")
    wrong = Counter()
    for row in (row for row in rows if row["kind"] == "how_long"):
        event, query = (date.fromisoformat(row[name]) for name in ("event_date", "query_date"))
        other = answer("how_long", "it", event, query.replace(year=query.year + 2, day=min(query.day, 28)))[0]
        if query >= event:
            wrong[is_right(row, other)] += 1
    assert wrong[False] > 50 and not wrong[True]


def test_every_event_is_asked_about_from_both_sides_and_at_its_edges():
    dated = [row for row in examples(1000) if row["event_date"]]
    pairs = [(date.fromisoformat(row["event_date"]), date.fromisoformat(row["query_date"])) for row in dated]
    before = {event for event, query in pairs if query < event}
    after = {event for event, query in pairs if query >= event}
    assert before == after == {date.fromisoformat(event["date"]) for event in EVENTS}
    days_after = Counter((query - event).days for event, query in pairs)
    assert days_after[-1] and days_after[0] and days_after[1]
    near = sum((query.month, query.day) == (event.month, event.day) for event, query in pairs)
    assert near > 10


def test_rows_differ_and_depend_on_the_seed_alone():
    rows = examples(1000)
    assert len({(row["system"], row["prompt"]) for row in rows}) == 1000
    assert rows == examples(1000) and rows[:100] == examples(100) and rows != examples(1000, seed=1)


def test_fine_tuning_reads_every_row(tmp_path):
    path = tmp_path / "time.jsonl"
    time_awareness.main(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = Tokenizer.train([row["response"] for row in rows], tmp_path / "t.model", vocab_size=400)
    loaded = load_examples(DialogueConfig(sources=(str(path),), held_out=0), tokenizer, Llama2Chat(), 512)
    assert len(loaded.train) == len(rows) == 1000 and not loaded.skipped[0].count and not loaded.too_long
    # The day stands before the question, untrained; the answer alone is trained.
    for number in (0, 1, 500):
        row = rows[number]
        ids, mask = loaded.train[number]
        asked = encode_prompt(
            tokenizer, (Message("system", row["system"]), Message("user", row["prompt"])), Llama2Chat()
        )
        assert ids[~mask].tolist() == asked
        assert tokenizer.decode(ids[mask].tolist()).strip() == row["response"]


@pytest.mark.parametrize(("name", "count"), [("time.json", 10), ("time.jsonl", 0)])
def test_bad_input(tmp_path, name, count):
    with pytest.raises(UserError, match=r"give the name of a \.jsonl file, and 1 example or more"):
        time_awareness.main(tmp_path / name, count)
    assert not list(Path(tmp_path).iterdir())
