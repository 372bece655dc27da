"""An audit of a corpus: it depends on nothing but the documents, goes on where it stopped, and stands beside the paper's."""

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from llama_jax import cli
from llama_jax.data.audit import AuditConfig, Auditor
from llama_jax.data.audit_terms import AXES, OWN_DESCRIPTORS
from llama_jax.errors import UserError
from llama_jax.evaluation import audit as audit_module
from llama_jax.evaluation.audit import PART, audit, list_parts
from llama_jax.evaluation.audit_tables import (
    PAPER_DESCRIPTORS,
    PAPER_PRONOUNS,
    PAPER_TOXIC,
)

SENTENCES = (
    ("She met him.", ("she", "he", "3rd")),
    ("We thank you.", ("1st", "2nd")),
    ("They are here.", ("unspecified", "3rd")),
    ("A gay Christian spoke.", ("gay", "christian")),
    ("An American and an Indian spoke.", ("american", "indian")),
    ("The wall is white.", ()),
)


def write_jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"jsonl:{path}"


def planted(count: int, seed: int = 0) -> tuple[list[str], Counter]:
    """Documents of sentences drawn at random, and how many documents each thing is in."""
    rng, texts, counts = random.Random(seed), [], Counter()
    for _ in range(count):
        chosen = rng.sample(SENTENCES, rng.randrange(len(SENTENCES)))
        texts.append("\n".join(sentence for sentence, _ in chosen))
        counts.update({name for _, names in chosen for name in names})
    return texts, counts


def scorer(tmp_path) -> str:
    """Lines on a wall are toxic, and others by a quarter."""
    path = tmp_path / "mine.py"
    path.write_text("def score(lines):\n    return [1.0 if 'wall' in line else 0.25 for line in lines]\n")
    return f"{path}:score"


def outcome(capsys, *words) -> tuple[int, str, str]:
    code = cli.main(["audit", *map(str, words)])
    return code, *capsys.readouterr()


def test_planted_documents_give_their_counts_beside_the_papers(tmp_path):
    texts, counts = planted(700)
    results = audit([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", AuditConfig(OWN_DESCRIPTORS))
    assert results == json.loads((tmp_path / "out" / "audit.json").read_text())
    found = {}
    for group in (*results["pronouns"].values(), *results["descriptors"].values()):
        assert group["of"] == results["documents"] == 700
        for name, member in group["members"].items():
            assert member["of"] == group["count"]
            assert member["percent"] == (100 * member["count"] / group["count"] if group["count"] else None)
            found[name] = member["count"]
    assert {name: count for name, count in found.items() if count} == counts
    race = results["descriptors"]["race_ethnicity"]
    white = sum("white" in text for text in texts)
    assert (race["count"], race["dropped"], race["with_dropped"]["count"]) == (0, ["white"], white)
    she = results["pronouns"]["gender"]["members"]["she"]
    interval = binomtest(she["count"], she["of"]).proportion_ci(method="wilson")
    assert (she["low"], she["high"]) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert she["paper"] == 28.45
    page = (tmp_path / "out" / "audit.md").read_text()
    cells = [f"{she['percent']:.2f}", f"{she['low']:.2f} to {she['high']:.2f}", "28.45"]
    assert f"| she | {she['count']} | {' | '.join(cells)} |" in page
    assert f"| **race ethnicity, with white** | {white} |" in page


def test_what_the_paper_names_is_looked_for_and_its_shares_cannot_be_of_all_documents():
    assert all(set(members) <= set(OWN_DESCRIPTORS[axis]) for axis, (_, members) in PAPER_DESCRIPTORS.items())
    any_gendered, members = PAPER_PRONOUNS["gender"]
    assert members["unspecified"] > any_gendered
    _, members = PAPER_DESCRIPTORS["sexual_orientation"]
    assert sum(members.values()) + 14 * min(members.values()) < 100


@given(st.lists(st.integers(0, 3 * PART), max_size=5), st.data())
def test_parts_hold_every_document_once_in_order(lengths, data):
    total = sum(lengths)
    stop = data.draw(st.integers(0, total))
    start = data.draw(st.integers(0, stop))
    parts = list(list_parts(lengths, start, stop))
    numbers = [(source, number) for source, first, last in parts for number in range(first, last)]
    every = [(source, number) for source, length in enumerate(lengths) for number in range(length)]
    assert numbers == every[start:stop] and all(0 < last - first <= PART for _, first, last in parts)


def test_workers_order_and_files_change_nothing(tmp_path):
    texts, _ = planted(1500)
    config = AuditConfig(OWN_DESCRIPTORS, toxicity=scorer(tmp_path), sample=0.3)
    shuffled = random.Random(1).sample(texts, len(texts))
    corpora = {
        "one": ([write_jsonl(tmp_path / "a.jsonl", texts)], 0),
        "two": ([write_jsonl(tmp_path / "a.jsonl", texts)], 2),
        "mixed": ([write_jsonl(tmp_path / "b.jsonl", shuffled[:333]), write_jsonl(tmp_path / "c.jsonl", shuffled[333:])], 0),
    }  # fmt: skip
    found = {
        name: audit(sources, tmp_path / name, config, workers=workers) for name, (sources, workers) in corpora.items()
    }
    assert len({json.dumps({**results, "recipe": None}) for results in found.values()}) == 1
    assert (tmp_path / "one" / "audit.json").read_bytes() == (tmp_path / "two" / "audit.json").read_bytes()
    toxic = found["one"]["toxicity"]["toxic"]
    assert 300 < toxic["of"] < 500 and 0 < toxic["count"] < toxic["of"] and toxic["paper"] == PAPER_TOXIC


def test_an_audit_that_was_stopped_goes_on_and_ends_as_if_it_had_not(tmp_path, monkeypatch):
    texts, _ = planted(5 * PART)
    source, config = write_jsonl(tmp_path / "a.jsonl", texts), AuditConfig(OWN_DESCRIPTORS)
    whole = audit([source], tmp_path / "whole", config)
    read, count = [], Auditor.count

    def stopping(auditor, documents):
        documents = list(documents)
        if len(read) == 2 * PART:
            raise KeyboardInterrupt
        read.extend(documents)
        return count(auditor, documents)

    monkeypatch.setattr(Auditor, "count", stopping)
    with pytest.raises(KeyboardInterrupt):
        audit([source], tmp_path / "out", config)
    assert not (tmp_path / "out" / "audit.json").exists()
    monkeypatch.setattr(Auditor, "count", lambda auditor, documents: count(auditor, [*map(seen, documents)]))

    def seen(document):
        read.append(document)
        return document

    assert audit([source], tmp_path / "out", config) == whole and read == texts
    assert audit([source], tmp_path / "out", config) == whole and read == texts  # nothing is left


def test_a_kill_loses_what_was_counted_since_the_last_save_alone(tmp_path, monkeypatch):
    texts, _ = planted(5 * PART)
    source, config = write_jsonl(tmp_path / "a.jsonl", texts), AuditConfig(OWN_DESCRIPTORS)
    monkeypatch.setattr(audit_module, "_SECONDS_BETWEEN_SAVES", 0)
    states, said, save = [], [], audit_module._save
    monkeypatch.setattr(
        audit_module, "_save", lambda path, *rest: (save(path, *rest), states.append(path.read_bytes()))
    )
    whole = audit([source], tmp_path / "whole", config, say=said.append)
    assert [json.loads(state)["counts"]["documents"] // PART for state in states] == [0, 1, 2, 3, 4, 5, 5]
    assert re.fullmatch(r"512/1280 documents 40.0% \d+ documents/s eta \d+s", said[1])
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "counts.json").write_bytes(states[3])
    assert audit([source], tmp_path / "killed", config, say=said.append) == whole
    assert said[-1].startswith(f"{2 * PART} documents in ")


def test_a_limit_reads_the_first_documents(tmp_path):
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", [text] * 5) for n, text in enumerate(["she", "he", "they"])]
    results = audit(sources, tmp_path / "out", AuditConfig({}), limit=7)
    found = {name: member["count"] for name, member in results["pronouns"]["gender"]["members"].items()}
    assert results["documents"] == 7 and found == {"she": 5, "he": 2, "unspecified": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_document_that_cannot_be_read_ends_it_and_all_before_its_part_is_kept(tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(audit_module, "PART", 16)
    texts, _ = planted(100 * 16)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:807], '{"txt": 1}', *lines[808:]]))
    code, out, err = outcome(capsys, source, "--out", tmp_path / "out", "--workers", workers)
    assert (code, out) == (2, "") and "a.jsonl, line 808 has no text" in err and "Traceback" not in err
    state = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert state["counts"] == Auditor(AuditConfig(OWN_DESCRIPTORS)).count(texts[:800]).as_json()
    assert not (tmp_path / "out" / "audit.md").exists()
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert outcome(capsys, source, "--out", tmp_path / "out", "--workers", workers)[0] == 0
    found = json.loads((tmp_path / "out" / "counts.json").read_text())["counts"]
    assert found == Auditor(AuditConfig(OWN_DESCRIPTORS)).count(texts).as_json()


def test_the_verb_prints_its_tables_or_json(tmp_path, capsys):
    words = (write_jsonl(tmp_path / "a.jsonl", ["She is gay.", "A straight line"]), "--out", tmp_path / "out")
    words = (*words, "--toxicity", scorer(tmp_path), "--sample", "1")
    code, out, err = outcome(capsys, *words)
    assert code == 0 and out == (tmp_path / "out" / "audit.md").read_text() and "2 documents in" in err
    assert "| **sexual orientation, with straight** | 2 | 100.00 |" in out
    assert "on 2 documents of any language, a sample of 100%" in out and "| 0.2 to 0.3 | 2 | 100.00 |" in out
    for _, members in PAPER_DESCRIPTORS.values():
        for name, value in members.items():
            assert re.search(rf"\| {name} \| .* \| {value} \|", out)
    code, out, _ = outcome(capsys, *words, "--json")
    assert code == 0 and json.loads(out)["descriptors"]["sexual_orientation"]["members"]["gay"]["count"] == 1


def test_the_five_greatest_of_an_axis_are_shown_and_the_papers_beside_them(tmp_path, capsys):
    common = ["british", "french", "german", "italian", "japanese", "spanish"]
    texts = [" ".join([*common[n:], "indian"]) for n in range(6)] + ["indian"]
    code, out, _ = outcome(capsys, write_jsonl(tmp_path / "a.jsonl", texts), "--out", tmp_path / "out")
    lines = [line.split(" | ")[0].removeprefix("| ") for line in out.splitlines()]
    shown = lines[lines.index("**nationality**") + 1 : lines.index("**race ethnicity**")]
    assert code == 0 and shown == [
        "indian",
        "spanish",
        "japanese",
        "italian",
        "german",
        "american",
        "chinese",
        "korean",
        "mexican",
    ]


def test_a_toxicity_of_one_half_is_toxic(tmp_path):
    (tmp_path / "mine.py").write_text("def score(lines):\n    return [float(line) for line in lines]\n")
    config = AuditConfig({}, toxicity=f"{tmp_path / 'mine.py'}:score", sample=1.0)
    texts = ["0.4999", "0.5", "1\n0", "0.4\n0.5", "0.9"]
    toxicity = audit([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", config)["toxicity"]
    assert (toxicity["toxic"]["count"], toxicity["toxic"]["of"]) == (3, 5)
    assert {name: share["count"] for name, share in toxicity["bins"].items() if share["count"]} == {
        "0.4 to 0.5": 2,
        "0.5 to 0.6": 2,
        "0.9 to 1.0": 1,
    }


def test_own_descriptors_can_be_given(tmp_path, capsys):
    (tmp_path / "d.json").write_text(json.dumps({axis: {"all": [{"descriptor": f"{axis[:3]}ish"}]} for axis in AXES}))
    words = (write_jsonl(tmp_path / "a.jsonl", ["Genish folk", "gay"]), "--out", tmp_path / "out", "--json")
    code, out, _ = outcome(capsys, *words, "--descriptors", tmp_path / "d.json")
    members = json.loads(out)["descriptors"]["gender_and_sex"]["members"]
    assert code == 0 and members["genish"]["count"] == 1 and members["female"]["count"] == 0
    assert "small list of our own" not in (tmp_path / "out" / "audit.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no source given"),
        (("txt:a.txt",), "Did you mean text:"),
        (("text:nowhere/*.txt",), "No file matches nowhere/*.txt"),
        (("tokens:shards",), "holds ids, and an audit reads text"),
        (("SOURCE", "--descriptors", "none.json"), "--descriptors none.json cannot be read as JSON"),
        (("SOURCE", "--toxicity", "nothing"), "no such folder; expected one of a Hugging Face text classifier"),
        (("SOURCE", "--toxicity", "bad.py:score", "--sample", "1"), "--toxicity gave nan for a line"),
        (("SOURCE", "--sample", "0"), "--sample 0.0 is no share"),
        (("SOURCE", "--sample", "1.5"), "--sample 1.5 is no share"),
        (("SOURCE", "--limit", "0"), "--limit 0 is no number of documents"),
        (("SOURCE", "--workers", "-1"), "--workers -1 is no number of processes"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(tmp_path / "a.jsonl", ["a line"])
    (tmp_path / "bad.py").write_text("def score(lines):\n    return [float('nan')] * len(lines)\n")
    code, out, err = outcome(capsys, *(source if word == "SOURCE" else word for word in words), "--out", "out")
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out" / "audit.json").exists()


def test_another_audit_in_the_folder_is_not_mixed_with_this_one(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["she", "he"])
    audit([source], tmp_path / "out", AuditConfig(OWN_DESCRIPTORS))
    with pytest.raises(UserError, match="other settings:\n  documents: 2 there, 1 here\n  sample: 0.1 there, 0.5 here"):
        audit([source], tmp_path / "out", AuditConfig(OWN_DESCRIPTORS, sample=0.5), limit=1)
    with pytest.raises(UserError, match="gave nan"):
        (tmp_path / "bad.py").write_text("def score(lines):\n    return [float('nan')] * len(lines)\n")
        audit([source], tmp_path / "new", AuditConfig({}, toxicity=f"{tmp_path}/bad.py:score", sample=1.0))
    audit([source], tmp_path / "new", AuditConfig({}))  # of the other nothing had been counted
    (tmp_path / "out" / "counts.json").write_text("{}")
    with pytest.raises(UserError, match="counts.json cannot be read"):
        audit([source], tmp_path / "out", AuditConfig(OWN_DESCRIPTORS))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        audit([source], tmp_path / "file" / "out", AuditConfig(OWN_DESCRIPTORS))
