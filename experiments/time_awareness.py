"""Dialogues whose right answer depends on the day of the question (paper 5.1, "temporal perception").

Claim: the paper trained on 1,000 such examples, each with the date of its query and the date of its event, and the model
then placed its knowledge in time. Whether it does so here is not measured; every answer can be checked by `is_right`.
Our choice: the system message says the day (the paper does not say where the date stands); an event that lies ahead is
"not happened yet", without its date; years are counted full. The events are in data/events.jsonl.
Command: python -m experiments.time_awareness --out time.jsonl
  llama-jax sft Llama-2-7b-hf --data time.jsonl --train lora --nf4 --rows 8 --optimizer.peak-lr 2e-4 --out runs/time
Cost: a second for the examples. The training: as sft_domain_qa; not measured.
"""

import json
import random
import re
from datetime import date, timedelta
from pathlib import Path

import tyro

from llama_jax.cli import end_of
from llama_jax.errors import UserError
from llama_jax.training.run_folder import write_whole

EVENTS = Path(__file__).with_name("data") / "events.jsonl"
FIRST_DAY, LAST_DAY = date(1750, 1, 1), date(2035, 12, 31)
QUESTIONS = {
    "how_long": ("How long ago was {event}?", "How many years have passed since {event}?"),
    "whether": ("Has {event} already taken place?", "Has {event} happened yet?"),
    "year": ("What year is it?", "Which year do we have?"),
    "day": ("What is today's date?", "Which day is today?"),
}
SHARES = {"how_long": 0.6, "whether": 0.3, "year": 0.05, "day": 0.05}


def full_years(event: date, query: date) -> int:
    """Anniversaries of an event up to and with the day of the query; below 0 if the event lies ahead.

    The anniversary of 29 February is 1 March where the year has none.
    """
    return query.year - event.year - ((query.month, query.day) < (event.month, event.day))


def in_words(day: date) -> str:
    """A day as people write it, such as 20 July 1969."""
    return f"{day.day} {day:%B %Y}"


def answer(kind: str, event: str, event_date: date, query: date) -> tuple[str, str]:
    """The right answer, and the words in it that make it right."""
    if kind == "year":
        return f"It is {query.year}.", str(query.year)
    if kind == "day":
        return f"Today is {in_words(query)}.", in_words(query)
    if query < event_date:
        no = "No, as" if kind == "whether" else "As"
        return f"{no} of {in_words(query)}, {event} has not happened yet.", "not happened yet"
    years = full_years(event_date, query)
    ago = (
        "this very day"
        if query == event_date
        else f"{years} year{'s' * (years > 1)} ago"
        if years
        else "less than a year ago"
    )
    yes = f"Yes, {event}" if kind == "whether" else event[0].upper() + event[1:]
    return f"{yes} was on {in_words(event_date)}, {ago}.", "Yes" if kind == "whether" else ago


def is_right(row: dict[str, str], answered: str) -> bool:
    """Whether an answer to a row's question says what is true on its day."""
    return re.search(rf"\b{re.escape(row['decisive'])}\b", answered, re.IGNORECASE) is not None


def draw_query(event: date, rng: random.Random) -> date:
    """A day to ask on: often close to the event or an anniversary, where a mistake shows, sometimes years before it."""
    if rng.random() < 0.3:
        around = event + timedelta(days=rng.randint(-3, 3))
        # By way of the month's first, as 29 February is not in every year.
        day = date(rng.choice((event.year, rng.randint(event.year, LAST_DAY.year - 1))), around.month, 1)
        day += timedelta(days=around.day - 1)
    else:
        before = event - timedelta(days=rng.randint(1, 40 * 365))
        day = before if rng.random() < 0.4 else event + timedelta(days=rng.randrange((LAST_DAY - event).days))
    return max(day, FIRST_DAY)


def examples(count: int, seed: int = 0) -> list[dict[str, str]]:
    """So many different rows of prompt, response and system, with `query_date`, `event_date` (empty where none is
    asked about), `kind` and `decisive`."""
    events = [json.loads(line) for line in EVENTS.read_text().splitlines()]
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        event = rng.choice(events)
        event_date = date.fromisoformat(event["date"])
        query = draw_query(event_date, rng)
        (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
        question = rng.choice(QUESTIONS[kind]).format(event=event["event"])
        response, decisive = answer(kind, event["event"], event_date, query)
        row = {"system": f"Today is {in_words(query)}.", "prompt": question, "response": response}
        dated = "" if kind in ("year", "day") else event["date"]
        about = {"query_date": str(query), "event_date": dated, "kind": kind, "decisive": decisive}
        rows[row["system"], question] = row | about
    return list(rows.values())


def main(out: Path, count: int = 1000, seed: int = 0) -> None:
    """Writes the examples.

    Args:
      out: a .jsonl file.
      count: examples; the paper has 1,000.
      seed: of events, days and questions.
    """
    if out.suffix != ".jsonl" or count < 1:
        raise UserError(f"--out {out} --count {count}: give the name of a .jsonl file, and 1 example or more")
    rows = examples(count, seed)
    write_whole(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{len(rows)} examples in {out}; the first: {rows[0]}")


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
