"""Contamination: the paper's Table 51 as arithmetic, and a search from files to a report that survives what may happen."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax import cli
from llama_jax.data.documents import tokenize
from llama_jax.errors import UserError
from llama_jax.evaluation import contamination, contamination_progress
from llama_jax.evaluation.contamination import check_contamination
from llama_jax.evaluation.contamination_statistics import AtLength, Subset, at_length, largest_benefit, sample_shares
from llama_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SUBSETS = ("clean", "not clean", "not dirty", "dirty")

# The paper's Table 51: n, mean score in % and Z of the four subsets.
PRINTED = {
    "HellaSwag 70B": ((7391, 2651, 9194, 848), (80.0, 89.5, 81.6, 92.2), (-5.73, 9.56, -2.27, 7.42)),
    "HellaSwag 7B": ((7391, 2651, 9194, 848), (70.5, 81.3, 72.4, 83.7), (-5.46, 9.17, -2.06, 6.84)),
    "MMLU humanities 70B": ((3996, 709, 4185, 520), (62.2, 82.7, 62.7, 85.8), (-4.08, 9.71, -3.50, 9.80)),
    "MMLU humanities 7B": ((3996, 709, 4185, 520), (40.8, 54.9, 41.1, 56.9), (-2.75, 6.50, -2.25, 6.49)),
    "MMLU 70B": ((11862, 2180, 12506, 1536), (68.0, 73.5, 67.7, 78.2), (-2.00, 4.64, -2.75, 7.87)),
}


def right_answers(n, means):
    """All (clean, between, dirty) counts of right answers whose four subset means round to the printed ones."""
    clean, not_clean, not_dirty, dirty = (
        range(math.ceil(size * (mean - 0.05) / 100), math.floor(size * (mean + 0.05) / 100) + 1)
        for size, mean in zip(n, means, strict=True)
    )
    for a, b, d in itertools.product(clean, not_clean, dirty):
        if a + b - d in not_dirty and 0 <= b - d <= n[1] - n[3]:
            yield a, b - d, d


def made(n, right) -> AtLength:
    """Samples of 0/1 scores with these right answers, through the program."""
    sizes = (n[0], n[1] - n[3], n[3])
    shares = np.repeat([0.0, 0.5, 1.0], sizes)
    scores = np.concatenate([np.arange(size) < count for size, count in zip(sizes, right, strict=True)]).astype(float)
    order = np.random.default_rng(0).permutation(len(shares))
    return at_length(40, shares[order], scores[order])


@pytest.mark.parametrize("name", PRINTED)
def test_z_of_the_papers_table(name):
    """Right and wrong answers that give the printed means give the printed Z, to 1.4% of each.

    Not to the last digit: the paper's two Z of a pair do not quite belong to one mean (a pair's sums of n (mean - mu) must
    cancel; its own differ by up to 1.7%), as if mu and sigma had been sampled. With the finite-population correction
    both Z of a pair would be equal in size, 6.99 and more: no rounding leads there.
    """
    n, means, printed = PRINTED[name]
    best = min(
        (made(n, right) for right in right_answers(n, means)),
        key=lambda one: max(abs(s.z / z - 1) for s, z in zip(one.subsets, printed, strict=True)),
    )
    assert [subset.name for subset in best.subsets] == list(SUBSETS)
    assert [subset.n for subset in best.subsets] == list(n)
    assert [round(100 * subset.score, 1) for subset in best.subsets] == list(means)
    assert [subset.z for subset in best.subsets] == pytest.approx(printed, rel=0.014)
    population = n[0] + n[1]
    corrected = [s.z / math.sqrt((population - s.n) / (population - 1)) for s in best.subsets]
    assert corrected[0] == pytest.approx(-corrected[1]) and corrected[2] == pytest.approx(-corrected[3])
    assert all(abs(z / p - 1) > 0.03 for z, p in zip(corrected, printed, strict=True))
    assert max(abs(z / p - 1) for z, p in zip(corrected, printed, strict=True)) > 1.9


def test_subsets_share_their_borders_as_the_paper_writes_them():
    shares = np.array([0, 0.1999, 0.2, 0.5, 0.7999, 0.8, 1])
    subsets = at_length(10, shares, None).subsets
    assert [(s.name, s.n, s.score, s.z) for s in subsets] == [
        (name, n, None, None) for name, n in zip(SUBSETS, (2, 5, 5, 2), strict=True)
    ]
    assert [s.contamination for s in subsets] == pytest.approx([0.09995, 0.65998, 0.33996, 0.9])


def test_evidence_needs_four_and_a_benefit_its_direction():
    def with_z(length, *z):
        return AtLength(
            length, 0.5, tuple(Subset(name, 9, 0.5, 0.5, one) for name, one in zip(SUBSETS, z, strict=True))
        )

    assert not with_z(10, -2.0, 3, -3, 3).is_evidence  # not above 2
    assert not with_z(10, -3, 3, None, 3).is_evidence
    assert with_z(10, -2.01, 3, -3, 3).is_evidence and with_z(10, -2.01, 3, -3, 3).is_benefit
    for worse in ((3, -3, 3, -3), (-3, 3, 3, -3), (3, -3, -3, 3)):
        assert with_z(10, *worse).is_evidence and not with_z(10, *worse).is_benefit
    some = [with_z(10, -3, 3, -3, 3), with_z(30, -3, 3, -3, 3), with_z(40, 3, -3, 3, -3), with_z(50, -1, 3, -3, 3)]
    assert largest_benefit(some).length == 30 and largest_benefit(some[2:]) is None


def test_no_z_without_variance():
    constant = at_length(10, np.array([0.0, 1.0, 0.1, 0.9]), np.ones(4))
    assert [s.z for s in constant.subsets] == [None] * 4 and not constant.is_evidence
    empty = at_length(10, np.zeros(4), np.array([0.0, 1, 0, 1]))
    assert [s.z for s in empty.subsets] == [0, None, 0, None]


def test_shares_by_hand():
    """Two samples: 20 tokens of which a match of 12 begins at 0 and one of 11 at 5; and 12 that are one match."""
    longest = np.zeros(32, np.int32)
    longest[[0, 5, 20]] = [12, 11, 12]
    sizes = np.array([20, 12])
    assert sample_shares(longest, sizes, 10).tolist() == sample_shares(longest, sizes, 11).tolist() == [0.8, 1]
    assert sample_shares(longest, sizes, 12).tolist() == [0.6, 1]
    assert sample_shares(longest, sizes, 13).tolist() == [0, 0]


WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "r", "st", "ll")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """40 samples of two benchmarks; 200 documents of which each fourth holds a sample with one wrong word."""
    folder = tmp_path_factory.mktemp("contamination")
    generator = np.random.default_rng(0)

    def sentence(size):
        return " ".join(generator.choice(WORDS, size))

    samples = [
        {"id": k, "benchmark": ("even", "odd")[k % 2], "text": sentence(150), "score": int(k < 20)} for k in range(40)
    ]
    documents = [sentence(80) for _ in range(200)]
    for number in range(0, 200, 4):
        words = samples[number // 4 % 20]["text"].split()
        words[75] = "xxx"
        documents[number] += " " + " ".join(words) + " " + sentence(5)
        documents[number + 2] += " " + " ".join(words[:60])  # and a part of it in another, which changes nothing
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    tokenizer = Tokenizer.train(documents, folder / "tokenizer.model", vocab_size=330)
    tokenize((f"jsonl:{folder}/corpus.jsonl",), tokenizer, folder / "shards", say=lambda line: None)
    return folder


def search(files, out, source="jsonl:{}/corpus.jsonl", **how):
    lines = []
    tokenizer = Tokenizer.load(files / "tokenizer.model")
    samples = str(files / "samples.jsonl")
    report = check_contamination(samples, [source.format(files)], tokenizer, out, say=lines.append, **how)
    return report, lines


def outcome(out):
    return (out / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """What one call on one shard gives."""
    out = tmp_path_factory.mktemp("whole")
    report, _ = search(files, out)
    return report, outcome(out)


def test_what_is_planted_is_found_and_scores_show_it(whole):
    report, rows = whole
    shares = [json.loads(row)["shares"] for row in rows.splitlines()]
    assert all(share[0] > 0.9 for share in shares[:20]) and all(share[-1] == 0 for share in shares[20:])
    assert report["corpus"]["documents"] == 200
    assert [(one["benchmark"], one["n"], one["score"]) for one in report["results"]] == [
        ("even", 20, 0.5),
        ("odd", 20, 0.5),
    ]
    for result in report["results"]:
        assert result["largest_length_with_benefit"] == 50
        at_50 = result["lengths"][-1]
        assert at_50["length"] == 50 and [s["n"] for s in at_50["subsets"]] == [10, 10, 10, 10]
        root = math.sqrt(10)  # means 0 and 1 about 0.5, sigma 0.5
        assert [s["z"] for s in at_50["subsets"]] == pytest.approx([-root, root, -root, root])


@pytest.mark.parametrize("source", ["jsonl:{}/corpus.jsonl", "tokens:{}/shards"])
def test_shards_change_nothing(files, whole, tmp_path, source):
    report, lines = search(files, tmp_path, source, shard_tokens=3000)
    assert len(lines) > 5 and lines[-1].startswith("200/200 documents 100.0%") and "eta 0s" in lines[-1]
    assert outcome(tmp_path) == whole[1] and report["results"] == whole[0]["results"]


def test_processes_change_nothing(files, whole, tmp_path):
    report, _ = search(files, tmp_path, shard_tokens=3000, workers=2)
    assert outcome(tmp_path) == whole[1] and report["results"] == whole[0]["results"]


def test_beam_changes_nothing(files, whole, tmp_path):
    pytest.importorskip("apache_beam")
    report, _ = search(files, tmp_path, shard_tokens=3000, beam=["--runner=DirectRunner"])
    assert outcome(tmp_path) == whole[1] and report["results"] == whole[0]["results"]
    assert report["corpus"]["documents"] == 200


KILLED = """
import sys
from llama_jax.evaluation import contamination, contamination_progress
from llama_jax.text.tokenizer import Tokenizer
contamination_progress._WRITING = 1e9  # after every shard, however short they are
samples, source, tokenizer, out, workers = sys.argv[1:]
contamination.check_contamination(samples, [source], Tokenizer.load(tokenizer), out, shard_tokens=3000, workers=int(workers),
    say=lambda line: print(line, flush=True) or (int(line.split("/")[0]) >= 100 and sys.stdin.read()))
"""


def test_killed_half_way_it_goes_on_and_ends_the_same(files, whole, tmp_path, monkeypatch):
    words = [files / "samples.jsonl", f"jsonl:{files}/corpus.jsonl", files / "tokenizer.model", tmp_path, 0]
    command = [sys.executable, "-c", KILLED, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True) as process:
        while int(process.stdout.readline().split("/")[0]) < 100:  # documents; then it waits
            pass
        process.send_signal(signal.SIGKILL)
    half = contamination_progress._read(tmp_path / "matches.npz", recipe_of(tmp_path))
    assert 100 <= half.documents < 200 and not (tmp_path / "report.json").exists()
    searched = []
    monkeypatch.setattr(
        contamination, "search_here", lambda search, shards: searched.extend(shards) or map(search, shards)
    )
    report, _ = search(files, tmp_path, shard_tokens=3000)
    assert sum(shard.last - shard.first for shard in searched) == 200 - half.documents
    assert outcome(tmp_path) == whole[1] and report == whole[0]


def recipe_of(out):
    with np.load(out / "matches.npz") as file:
        return str(file["recipe"])


def test_what_is_done_is_not_searched_again_for_new_scores(files, tmp_path, monkeypatch):
    search(files, tmp_path)
    for name, right in {"v2.7b": range(0, 40, 2), "70b": range(20)}.items():
        rows = [{"id": k, "score": float(k in right)} for k in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(contamination, "search_here", lambda search, shards: map(pytest.fail, shards))
    report, _ = search(files, tmp_path, scores=[str(tmp_path / "v2.7b.jsonl"), str(tmp_path / "70b.jsonl")])
    verdicts = {(one["benchmark"], one["model"]): one["largest_length_with_benefit"] for one in report["results"]}
    assert verdicts[("even", "70b")] == verdicts[("odd", "70b")] == verdicts[("odd", "")] == 50
    assert verdicts[("even", "v2.7b")] is verdicts[("odd", "v2.7b")] is None
    page = (tmp_path / "report.md").read_text()
    assert "| even | 70b | 50 | dirty | 10 | 99." in page and "| even | v2.7b | 20 | 100.0 |" in page


def test_only_the_same_search_is_gone_on_with(files, tmp_path):
    rows = (files / "samples.jsonl").read_text().splitlines(keepends=True)

    def again(rows, source="jsonl:{}/corpus.jsonl", tokenizer="tokenizer.model"):
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        loaded = Tokenizer.load(files / tokenizer)
        check_contamination(
            str(tmp_path / "rows.jsonl"), [source.format(files)], loaded, tmp_path / "out", say=lambda line: None
        )

    again(rows)
    again([row.replace('"score": 0', '"score": 1') for row in rows])
    Tokenizer.train(WORDS, files / "another.model", vocab_size=290)
    (tmp_path / "longer.jsonl").write_text((files / "corpus.jsonl").read_text() + '{"text": "more"}\n')
    for how in (
        {"rows": rows[1:]},
        {"rows": [rows[0].replace('text": "', 'text": "x '), *rows[1:]]},
        {"rows": rows, "tokenizer": "another.model"},
        {"rows": rows, "source": f"jsonl:{tmp_path}/longer.jsonl"},
    ):
        with pytest.raises(UserError, match="of other samples, sources or tokenizer; name another --out"):
            again(**how)


def verb(capsys, files, *words):
    fixed = [
        files / "samples.jsonl",
        "--corpus",
        f"jsonl:{files}/corpus.jsonl",
        "--tokenizer",
        files / "tokenizer.model",
    ]
    code = cli.main([str(word) for word in ("contamination", *fixed, *words)])
    return code, *capsys.readouterr()


def test_the_verb_prints_the_page_or_the_report(capsys, files, whole, tmp_path):
    code, out, err = verb(capsys, files, "--out", tmp_path / "out")
    assert code == 0 and out == (tmp_path / "out" / "report.md").read_text() and "200/200 documents" in err
    code, out, _ = verb(capsys, files, "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out) == whole[0] == json.loads((tmp_path / "out" / "report.json").read_text())


def lines(*rows):
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "is no file; expected JSON lines with id and text"),
        (lines({"id": 1}), "line 1 holds id; expected the fields id and text"),
        (lines({"id": 1, "text": "a"}, "{"), "line 2 is not JSON"),
        (lines({"id": 1, "text": " "}), "expected text that is not blank"),
        (lines({"id": 1, "text": 5}), "expected text that is not blank"),
        (lines({"id": 1, "text": "a"}, {"id": "1", "text": "b"}), "the id 1 is there twice"),
        (lines({"id": 1, "text": "a", "score": 76.5}), "expected a number from 0 to 1"),
        (
            lines({"id": 1, "text": "a", "score": 1}, {"id": 2, "text": "b"}),
            "the sample 2 of samples has no score of its own, and others have",
        ),
    ],
)
def test_bad_samples(capsys, files, tmp_path, samples, message):
    path = tmp_path / "samples.jsonl"
    if samples is not None:
        path.write_text(samples)
    words = [
        path,
        "--corpus",
        f"jsonl:{files}/corpus.jsonl",
        "--tokenizer",
        files / "tokenizer.model",
        "--out",
        tmp_path / "o",
    ]
    assert cli.main(["contamination", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert not (tmp_path / "o").exists()  # known before the search


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "-1"], "--workers is -1"),
        (["--corpus"], "--corpus names no source"),
        (["--corpus", "text:no/such.txt"], "no/such.txt"),
        (["--tokenizer", "no/such.model"], "No tokenizer at no/such.model"),
        (["--scores", "no/such.jsonl"], "no/such.jsonl is no file"),
        (["--scores", "{}/wrong.jsonl"], "the id 99 is not in"),
        (["--scores", "{}/samples.jsonl", "{}/samples.jsonl"], "two files are called samples"),
        (["--out", "{}/corpus.jsonl"], "cannot be made"),
        (["--out", "{}/other"], "holds a search of other samples, sources or tokenizer"),
        (["--out", "{}/broken"], "cannot be read"),
        (["--beam=--runner=DirectRunner", "--out", "{}/beam"], "pip install apache-beam"),
    ],
)
def test_bad_input(capsys, files, monkeypatch, words, message):
    (files / "wrong.jsonl").write_text('{"id": 99, "score": 1}\n')
    if words[-1] == "{}/other" and not (files / "other").exists():
        search(files, files / "other", "tokens:{}/shards")
    (files / "broken").mkdir(exist_ok=True)
    (files / "broken" / "matches.npz").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    code, out, err = verb(capsys, files, "--out", files / "out", *(word.format(files) for word in words))
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_a_bad_document_ends_the_search_in_any_process(capsys, files, tmp_path):
    lines = (files / "corpus.jsonl").read_text().splitlines()
    lines[150] = '{"txt": 1}'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    for workers in ("0", "2"):
        code, _, err = verb(
            capsys, files, "--corpus", f"jsonl:{tmp_path}/bad.jsonl", "--out", tmp_path / workers, "--workers", workers
        )
        assert code == 2 and "bad.jsonl, line 151 has no text in field 'text'" in err and "Traceback" not in err
