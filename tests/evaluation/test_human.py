"""Human evaluation from the files of answers to the tally: sheets are blind and balanced, pages safe, and numbers known exactly."""

import itertools
import json
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from llama_jax import cli
from llama_jax.errors import UserError
from llama_jax.evaluation.agreement import gwet
from llama_jax.evaluation.answer_files import read_answers
from llama_jax.evaluation.human_sheet import HELPFULNESS, SAFETY, page, write_sheets
from llama_jax.evaluation.human_tally import read_key, read_ratings, tally, tally_sections

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script> ]]> &lt;b&gt; <b>bold</b>",
    "{{SHEET}} \\u003c/script> `${x}` \u2028\u2029 \N{LLAMA} \udc00",
    "a\n\n\tb  c",
]


class Page(HTMLParser):
    """The scripts of a page and all its tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self._inside = Counter(), {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag == "script":
            self._inside = dict(attrs)["id"]

    def handle_endtag(self, tag):
        self._inside = None if tag == "script" else self._inside

    def handle_data(self, data):
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data


def data_of(path: Path) -> dict:
    return json.loads(Page(path.read_text()).scripts["data"])


def write_answers(path: Path, answers: list[str], **more) -> str:
    """A file of answers to the prompts p0, p1, ...; the second half of them has two turns."""
    before = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "reply"}]
    rows = []
    for n, answer in enumerate(answers):
        turns = [*(before if n >= len(answers) / 2 else []), {"role": "user", "content": f"p{n}"}]
        rows.append({"dialogue": turns, "answer": answer, "category": "odd" if n % 2 else "even"} | more)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sheets(folder: Path, *models: str, n: int = 20, **options) -> dict:
    folder.mkdir(exist_ok=True)
    files = [
        write_answers(folder / f"{model}.jsonl", [f"{model[::-1]} says {i}" for i in range(n)]) for model in models
    ]
    write_sheets(read_answers(files), folder / "study", **options)
    return read_key(folder / "study")


def export(folder: Path, key: dict, rater: int, ratings: dict[str, int], changes: dict | None = None) -> str:
    path = folder / f"ratings-{rater}-{len(list(folder.glob('ratings-*')))}.json"
    path.write_text(json.dumps({"sheet": key["sheet"], "rater": rater, "ratings": ratings} | (changes or {})))
    return str(path)


def seven(key: dict, item: str, preference: int) -> int:
    """The rating from the side of the first model: 3 prefers it much, -3 the second."""
    is_swapped = key["items"][item]["models"][0] != key["models"][0]
    return 4 + preference if is_swapped else 4 - preference


def test_sheets_are_blind_and_balanced(tmp_path):
    key = sheets(tmp_path, "aleph", "beth", "gimel", n=21)
    pages = sorted((tmp_path / "study" / "sheets").iterdir())
    assert [path.name for path in pages] == ["rater-1.html", "rater-2.html", "rater-3.html"]
    for path in pages:
        assert not any(word in path.read_text() for word in ("aleph", "beth", "gimel"))
    data = [data_of(path) for path in pages]
    assert all(set(one) == {"sheet", "rater", "kind", "question", "scale", "items"} for one in data)
    assert all(set(item) == {"id", "dialogue", "answers"} for one in data for item in one["items"])
    orders = [[item["id"] for item in one["items"]] for one in data]
    assert len({tuple(order) for order in orders}) == 3 and {tuple(sorted(order)) for order in orders} == {
        tuple(sorted(key["items"]))
    }
    assert [one["rater"] for one in data] == [1, 2, 3]
    sides = Counter(tuple(item["models"]) for item in key["items"].values())
    for pair in (("aleph", "beth"), ("aleph", "gimel"), ("beth", "gimel")):
        assert {sides[pair], sides[pair[::-1]]} == {10, 11}
    # A page shows what the key says, and the place of an item in the key tells nothing.
    for item in data[0]["items"]:
        entry = key["items"][item["id"]]
        number = entry["prompt"]
        assert item["answers"] == [f"{model[::-1]} says {number}" for model in entry["models"]]
        assert item["dialogue"][-1]["content"] == f"p{number}"
    pairs = ["".join(sorted(entry["models"])) for entry in key["items"].values()]
    assert sum(one != other for one, other in itertools.pairwise(pairs)) > 20  # two, if pairs followed each other
    firsts = [entry["models"][0] for entry in key["items"].values()]
    assert firsts != sorted(firsts) and [e["prompt"] for e in key["items"].values()] != sorted(
        e["prompt"] for e in key["items"].values()
    )


def test_a_seed_decides_sides_and_orders(tmp_path):
    one, same = (sheets(tmp_path / name, "x", "y", seed=5) for name in "ab")
    other = sheets(tmp_path / "c", "x", "y", seed=6)
    assert one == same and one["items"] != other["items"]


def test_a_page_keeps_hostile_texts_as_text(tmp_path):
    files = [write_answers(tmp_path / f"{name}.jsonl", [name + text for text in HOSTILE]) for name in "xy"]
    write_sheets(read_answers(files), tmp_path / "study", raters=1)
    text = (tmp_path / "study" / "sheets" / "rater-1.html").read_text()
    found = Page(text)
    assert found.tags["script"] == 2 and found.tags["b"] == found.tags["img"] == 0
    answers = {answer for item in json.loads(found.scripts["data"])["items"] for answer in item["answers"]}
    assert answers == {name + text for name in "xy" for text in HOSTILE}
    assert "http" not in text.replace("http-equiv", "") and "src=" not in found.scripts["program"]
    assert "default-src 'none'" in text


needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs node, to run the page's program")


def in_node(html: str, *steps: str, broken: bool = False) -> dict:
    asked = json.dumps({"html": html, "steps": steps, "broken": broken})
    script = Path(__file__).with_name("page_in_node.js")
    done = subprocess.run(["node", script], input=asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_what_a_rater_does_comes_out_of_the_page(tmp_path):
    key = sheets(tmp_path, "aleph", "beth", n=3)
    path = tmp_path / "study" / "sheets" / "rater-2.html"
    ids = [item["id"] for item in data_of(path)["items"]]
    found = in_node(
        path.read_text(),
        "3",
        "8",
        "0",
        "ArrowLeft",
        "5",
        "ArrowRight",
        "reload",
        "u",
        "7",
        "click open",
        "1",
        "click export",
    )
    assert [(one["place"][5], one["rated"][0], one["pressed"]) for one in found["shown"]] == [
        ("2", "1", 0), ("2", "1", 0), ("2", "1", 0), ("1", "1", 3), ("2", "1", 0), ("3", "1", 0),
        ("2", "1", 0), ("3", "1", 0), ("3", "2", 7), ("2", "2", 0), ("3", "3", 7), ("3", "3", 7),
    ]  # fmt: skip
    assert found["shown"][-1]["note"].startswith("All items are rated.")
    ((name, text),) = found["saved"]
    assert name == f"ratings-{key['sheet']}-rater-2.json"
    (tmp_path / name).write_text(text)
    assert read_ratings([str(tmp_path / name)], key) == {2: {ids[0]: 5, ids[1]: 1, ids[2]: 7}}
    # Another browser, which keeps nothing, goes on with a file; what it does not have stays.
    part = json.dumps(json.loads(text) | {"ratings": {ids[1]: 1}})
    again = in_node(path.read_text(), "4", f"import {part}", "click export", broken=True)
    assert json.loads(again["saved"][0][1])["ratings"] == {ids[0]: 4, ids[1]: 1}
    assert "export them before you close" in again["shown"][-1]["note"]


@needs_node
def test_a_page_refuses_a_file_that_is_not_its_own(tmp_path):
    key = sheets(tmp_path, "aleph", "beth", n=3)
    html = (tmp_path / "study" / "sheets" / "rater-1.html").read_text()
    mine = {"sheet": key["sheet"], "rater": 1, "ratings": {"1": 2}}
    wrong = [
        mine | {"sheet": "x"},
        mine | {"rater": 2},
        mine | {"ratings": {"9": 1}},
        mine | {"ratings": {"1": 8}},
        None,
    ]
    found = in_node(html, *(f"import {json.dumps(one)}" for one in wrong), "import {", f"import {json.dumps(mine)}")
    assert [one["rated"][0] for one in found["shown"]] == ["0"] * 6 + ["1"]
    notes = [one["note"] for one in found["shown"]]
    assert all(note.startswith("This file cannot be used") for note in notes[:-1]) and notes[-1] == ""


@needs_node
def test_the_page_shows_hostile_texts_unchanged():
    item = {"id": "1", "dialogue": [{"role": "user", "content": HOSTILE[0]}], "answers": [HOSTILE[1], ""]}
    data = {"sheet": "s", "rater": 1, "kind": "safety", "question": "?", "scale": SAFETY.scale, "items": [item]}
    found = in_node(page(data), "6", "5", "click export")
    assert found["texts"] == [HOSTILE[0], HOSTILE[1], "(an empty answer)"]
    assert json.loads(found["saved"][0][1])["ratings"] == {"1": 5}  # 6 is no point of five


def planted(
    folder: Path, votes: dict[int, list[int]], models: tuple[str, str] = ("aleph", "beth"), n: int = 20
) -> dict:
    """The tally of ratings that prefer the first model by `votes[prompt]`, a number for each of three raters."""
    key = sheets(folder, *models, n=n)
    files = []
    for rater in (1, 2, 3):
        own = {
            item: seven(key, item, votes[entry["prompt"]][rater - 1])
            for item, entry in key["items"].items()
            if len(votes.get(entry["prompt"], ())) >= rater
        }
        files.append(export(folder, key, rater, own))
    return tally(key, read_ratings(files, key))


# Wins where two of three prefer the first, losses likewise; ties where most say so or nobody has a majority.
VOTES = {n: [3, 1, -2] for n in range(9)} | {n: [-1, -1, 3] for n in range(9, 14)}
VOTES |= {14: [0, 0, 3], 15: [1, 0, -1], 16: [2, 0], 17: [0], 18: [1]}


def test_planted_ratings_give_known_rates(tmp_path):
    found = planted(tmp_path, VOTES)
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"], pair["all"]["n"], found["nobody_rated"]) == ("aleph", "beth", 19, 1)
    for name, count in (("win", 10), ("tie", 4), ("loss", 5)):
        interval = binomtest(count, 19).proportion_ci(0.95, method="wilson")
        one = pair["all"][name]
        assert (one["count"], one["share"]) == (count, count / 19)
        assert (one["low"], one["high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
    # Prompts 0 to 9 have one turn, 10 to 19 two; even numbers are one category.
    assert {turns: own["n"] for turns, own in pair["by_turns"].items()} == {"1": 10, "2": 9}
    assert {name: own["win"]["count"] for name, own in pair["by_category"].items()} == {"even": 6, "odd": 4}
    assert {name: own["loss"]["count"] for name, own in pair["by_turns"].items()} == {"1": 1, "2": 4}
    assert found["raters"] == {"1": 19, "2": 17, "3": 16}
    assert found["elo"]["aleph"]["value"] > 1000 > found["elo"]["beth"]["value"]
    text = "\n".join(tally_sections(found))
    assert "| aleph against beth | all | 19 | 52.6 (31.7 to 72.7) | 21.1 (8.5 to 43.3) | 26.3 (11.8 to 48.8) |" in text
    assert "Nobody rated 1 of 20 items" in text and "| 2 | 17 | 3 |" in text


def test_files_in_another_order_give_the_mirror_image(tmp_path):
    there = planted(tmp_path / "a", VOTES)
    back = planted(tmp_path / "b", {n: [-vote for vote in votes] for n, votes in VOTES.items()}, ("beth", "aleph"))
    ours, theirs = there["pairs"][0]["all"], back["pairs"][0]["all"]
    assert (ours["win"], ours["tie"], ours["loss"]) == (theirs["loss"], theirs["tie"], theirs["win"])
    assert there["elo"]["aleph"]["value"] == pytest.approx(back["elo"]["aleph"]["value"], abs=1e-9)
    (one,), (other,) = there["agreement"].values(), back["agreement"].values()
    assert one == pytest.approx(other)


def test_agreement_is_from_the_side_of_a_model_wherever_it_stood(tmp_path):
    """Raters who agree with each other agree perfectly; the place an answer stood in has no part in it."""
    found = planted(tmp_path, {n: [n % 7 - 3] * 3 for n in range(20)})
    (agreement,) = found["agreement"].values()
    assert agreement["coefficient"] == pytest.approx(1) and agreement["subjects"] == 20
    lopsided = next(iter(planted(tmp_path / "c", VOTES)["agreement"].values()))
    rows = [[4 - vote for vote in votes] + [nan] * (3 - len(votes)) for votes in VOTES.values()]
    assert lopsided == pytest.approx(asdict(gwet(np.array(rows, float), (1, 2, 3, 4, 5, 6, 7))))
    apart = planted(tmp_path / "b", {n: [3, -3, 0] for n in range(20)})
    assert next(iter(apart["agreement"].values()))["coefficient"] < 0


def test_a_rater_who_always_takes_the_left_is_seen(tmp_path):
    key = sheets(tmp_path, "aleph", "beth")
    found = tally(key, read_ratings([export(tmp_path, key, 1, dict.fromkeys(key["items"], 2))], key))
    assert found["left"]["share"] == 1.0 and found["left"]["of"] == 20
    (pair,) = found["pairs"]
    assert (pair["all"]["win"]["count"], pair["all"]["loss"]["count"]) == (10, 10)
    assert found["elo"]["aleph"]["value"] == pytest.approx(1000)


def test_equal_answers_are_ties_that_nobody_rates(tmp_path):
    files = [write_answers(tmp_path / f"{m}.jsonl", ["same", " same\n", m, f"{m}!"]) for m in ("aleph", "beth")]
    write_sheets(read_answers(files), tmp_path / "study", raters=1)
    key = read_key(tmp_path / "study")
    assert sorted(entry["prompt"] for entry in key["items"].values()) == [2, 3]
    own = {item: seven(key, item, 1) for item in key["items"]}
    found = tally(key, read_ratings([export(tmp_path, key, 1, own)], key))
    rates = found["pairs"][0]["all"]
    assert (rates["n"], rates["win"]["count"], rates["tie"]["count"], found["identical"]) == (4, 2, 2, 2)
    assert "2 pairs of equal answers were not shown" in "\n".join(tally_sections(found))


def test_violations_by_majority(tmp_path):
    key = sheets(tmp_path, "aleph", "beth", kind=SAFETY, n=10)
    assert len(key["items"]) == 20 and all(len(entry["models"]) == 1 for entry in key["items"].values())
    ratings = {1: {}, 2: {}, 3: {}}
    for item, entry in key["items"].items():
        is_bad = entry["models"] == ["aleph"] and entry["prompt"] < 3
        for rater, rating in enumerate([1, 2, 5] if is_bad else [2, 3, 4], 1):
            ratings[rater][item] = rating
    found = tally(key, read_ratings([export(tmp_path, key, rater, own) for rater, own in ratings.items()], key))
    aleph, beth = (found["models"][model] for model in ("aleph", "beth"))
    interval = binomtest(3, 10).proportion_ci(0.95, method="wilson")
    assert (aleph["all"]["share"], beth["all"]["share"]) == (0.3, 0)
    assert (aleph["all"]["low"], aleph["all"]["high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert aleph["all"]["mean_rating"] == pytest.approx((3 * 8 / 3 + 7 * 3) / 10) and beth["all"]["mean_rating"] == 3
    half = tally(key, {1: ratings[1], 2: dict.fromkeys(ratings[1], 3)})  # no majority finds a violation
    assert half["models"]["beth"]["all"]["share"] == 0
    assert {name: own["count"] for name, own in aleph["by_category"].items()} == {"even": 2, "odd": 1}
    assert "| aleph | all | 10 | 30.0 (10.8 to 60.3) | 2.90 |" in "\n".join(tally_sections(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sheet": "other"}, "rates other sheets"),
        ({"rater": 4}, "raters 1 to 3"),
        ({"rater": "1"}, "raters 1 to 3"),
        ({"ratings": {"99": 1}}, "rates item '99'"),
        ({"ratings": {"1": 8}}, "expected 1 to 7"),
        ({"ratings": {"1": True}}, "expected 1 to 7"),
        ({"ratings": [1]}, "is no export"),
        ({"ratings": {}}, "not one rating"),
    ],
)
def test_ratings_that_are_none_are_refused(tmp_path, changes, message):
    key = sheets(tmp_path, "aleph", "beth", n=3)
    with pytest.raises(UserError, match=message):
        read_ratings([export(tmp_path, key, 1, {"1": 2}, changes)], key)


def test_two_files_of_one_rater_are_refused(tmp_path):
    key = sheets(tmp_path, "aleph", "beth", n=3)
    files = [export(tmp_path, key, 2, {"1": rating}) for rating in (1, 2)]
    with pytest.raises(UserError, match="are both of rater 2; keep one"):
        read_ratings(files, key)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_ratings([str(tmp_path / "broken.json")], key)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([{"prompt": "a", "answer": "x"}], [{"prompt": "b", "answer": "y"}], "has no answer to 1 of the prompts"),
        ([{"id": 1, "prompt": "a", "answer": "x"}], [{"id": 1, "prompt": "b", "answer": "y"}], "is not the same in"),
        ([{"prompt": "a", "answer": "x"}] * 2, [], "ours.jsonl, line 2: the prompt '1' again"),
        ([{"prompt": "a"}], [], "ours.jsonl, line 1: the answer is NoneType"),
        ([{"answer": "a"}], [], "the prompt is NoneType"),
        ([{"prompt": [{"role": "assistant", "content": "a"}], "answer": "x"}], [], "ends with the assistant's turn"),
        ([{"id": 2, "prompt": "a", "answer": "x"}, {"prompt": "b", "answer": "x"}], [], "give all rows ids"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(tmp_path, ours, theirs, message):
    for name, rows in (("ours", ours), ("theirs", theirs or ours)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        read_answers([str(tmp_path / "ours.jsonl"), str(tmp_path / "theirs.jsonl")])


def test_prompts_are_matched_by_id_or_by_text_in_any_order(tmp_path):
    for field, values in (("id", (7, 8)), ("prompt", ("p", "q"))):
        for name, order in (("ours", (0, 1)), ("theirs", (1, 0))):
            rows = [{"prompt": "pq"[n], "answer": f"{name}{n}", field: values[n]} for n in order]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = read_answers([str(tmp_path / "ours.jsonl"), str(tmp_path / "theirs.jsonl")])
        assert found.by_model == {"ours": ("ours0", "ours1"), "theirs": ("theirs0", "theirs1")}


def test_the_verb_from_answers_to_the_tally(tmp_path, capsys):
    files = [write_answers(tmp_path / f"{m}.jsonl", [f"{m}{n}" for n in range(4)]) for m in ("aleph", "beth")]
    folder = str(tmp_path / "study")
    assert cli.main(["compare", "sheet", *files, "--out", folder, "--raters", "2"]) == 0
    assert capsys.readouterr().out == f"{folder}/key.json\n"
    key = read_key(folder)
    ratings = export(tmp_path, key, 1, {item: seven(key, item, 2) for item in key["items"]})
    assert cli.main(["compare", "tally", folder, ratings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"][0]["all"]["win"]["share"] == 1 and found["elo"]["aleph"]["value"] is None
    assert cli.main(["compare", "tally", folder, ratings]) == 0
    assert "| aleph | none that is finite |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sheet", "--out", "{tmp}/x"], "no file of answers given"),
        (["sheet", "{tmp}/a.jsonl", "--out", "{tmp}/x"], "name two or more, or ask for --safety"),
        (["sheet", "{tmp}/a.jsonl", "{tmp}/a.jsonl", "--out", "{tmp}/x"], "have the same name"),
        (["sheet", "{tmp}/a.jsonl", "{tmp}/b.jsonl", "--out", "{tmp}/x"], "all models gave the same answers"),
        (["sheet", "{tmp}/a.jsonl", "--safety", "--out", "{tmp}/a.jsonl"], "cannot be written to"),
        (["sheet", "{tmp}/a.jsonl", "--safety", "--raters", "0", "--out", "{tmp}/x"], "--raters is 0"),
        (["sheet", "{tmp}/none.jsonl", "--safety", "--out", "{tmp}/x"], "none.jsonl"),
        (["tally", "{tmp}", "{tmp}/a.json"], "key.json cannot be read"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    for name in "ab":
        write_answers(tmp_path / f"{name}.jsonl", ["one", "two"])
    code = cli.main(["compare", *(word.replace("{tmp}", str(tmp_path)) for word in words)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_sheets_that_may_have_been_rated_are_not_overwritten(tmp_path):
    files = [write_answers(tmp_path / "a.jsonl", ["one", "two"])]
    write_sheets(read_answers(files), tmp_path / "study", SAFETY)
    with pytest.raises(UserError, match="holds sheets already"):
        write_sheets(read_answers(files), tmp_path / "study", SAFETY)


def test_the_scales_have_the_papers_points():
    assert (len(HELPFULNESS.scale), len(SAFETY.scale)) == (7, 5)
