"""`llama-jax eval`: what it writes, what it refuses, and that what was asked is what the files hold."""

import csv
import json

import pytest

from llama_jax import cli
from llama_jax.evaluation import code_benchmarks
from llama_jax.evaluation.benchmarks import SUITE
from llama_jax.evaluation.engine import Engine
from llama_jax.evaluation.eval_config import EvalConfig
from llama_jax.evaluation.eval_questions import chosen, load_tasks
from llama_jax.evaluation.eval_results import summary
from llama_jax.evaluation.paper_scores import SCORES
from tests.stories260k import FOLDER

pytest.importorskip("lm_eval", reason="the benchmarks are lm-eval's")


@pytest.fixture(scope="module")
def samples(shared):
    return shared / "samples"


def test_results_stand_beside_the_papers(shared, samples, tmp_path, capsys, monkeypatch):
    out = tmp_path / "eval"
    command = ["eval", str(shared / FOLDER), "--limit", "5", "--out", str(out), "--run-code", "--json", "--files"]
    command += [f"{name}={samples / name}_{rows}.jsonl" for name, rows in (("piqa", 50), ("humaneval", 20))]
    solutions = [
        json.loads(line)["canonical_solution"] for line in (samples / "humaneval_20.jsonl").read_text().splitlines()
    ]
    asked = []

    def complete(self, prompts, **settings):
        asked.append(settings["sampling"])
        return [
            solution if place != 2 else "    return None" for place, solution in enumerate(solutions[: len(prompts)])
        ]

    monkeypatch.setattr(Engine, "complete", complete)
    assert cli.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    rows = {row["task"]: row for row in results["tasks"]}
    assert [row["n"] for row in rows.values()] == [5, 5] and results["groups"] == []
    assert rows["humaneval"]["value"] == 0.8 and rows["humaneval"]["paper"] == 12.8  # one of five programs is wrong
    assert rows["humaneval"]["difference"] == pytest.approx(80 - 12.8)
    assert asked == [(0.1, 0.95, 0)]  # the paper's temperature and top-p of one sample
    piqa = rows["piqa"]
    assert piqa["metric"] == "acc_norm" and piqa["paper"] == 78.8 and piqa["paper_model"] == "Llama 2 7B"
    kept = [json.loads(line) for line in (out / "samples" / "piqa.jsonl").read_text().splitlines()]
    assert piqa["value"] == sum(row["acc_norm"] for row in kept) / 5
    for row in kept:  # recomputed from what the model was asked and answered: likelihood by the length of a choice
        scores = [answer[0] / len(choice) for answer, choice in zip(row["answers"], row["choices"], strict=True)]
        assert row["acc_norm"] == float(scores.index(max(scores)) == int(row["target"]))
    texts = {row["id"]: row for row in map(json.loads, (out / "verbalised.jsonl").read_text().splitlines())}
    first = json.loads((samples / "piqa_50.jsonl").read_text().splitlines()[0])
    assert len(texts) == 10 and texts["piqa-0"]["score"] == kept[0]["acc_norm"]
    assert all(part in texts["piqa-0"]["text"] for part in (first["query"], *first["choices"]))
    assert solutions[1] in texts["humaneval-1"]["text"] and "score" not in texts["humaneval-1"]
    page = (out / "report.md").read_text()
    assert "| humaneval | 0 | 5 | pass@1 | 80.0 |" in page and "of the paper's models Llama 2 7B is nearest" in page
    assert cli.main(["eval", "--table", "20", "--results", str(out)]) == 0
    assert f"{100 * piqa['value']:g}" in capsys.readouterr().out


def test_groups_are_averages_only_where_they_are_whole():
    def row(one, value):
        return {
            "task": one.name,
            "metric": one.metric,
            "shots": one.shots,
            "n": 9,
            "value": value,
            "interval": (0, 1),
            "benchmark": one,
        }

    sizes = {size: place for place, size in enumerate(("7B", "13B", "34B", "70B"))}
    rows = [row(one, SCORES[one.measure][sizes["13B"]] / 100) for one in SUITE if one.measure in SCORES]
    results = summary("x", 13_000_000_000, rows, 0)
    assert {one["group"] for one in results["groups"]} >= {"Code", "Commonsense reasoning", "Math", "MMLU", "AGI Eval"}
    for group in results["groups"]:  # the paper's own scores are as good as the paper's
        assert abs(group["difference"]) < 0.051, group
    assert all(one["difference"] == pytest.approx(0) for one in results["tasks"] if one["paper"] is not None)
    some = summary("x", 13_000_000_000, [row(one, 0.5) for one in SUITE if one.name == "piqa"], 0)
    assert some["groups"] == []


def test_examples_are_not_asked(samples):
    config = EvalConfig(files=(f"bbh={samples / 'bbh_boolean_50.jsonl'}",), shots=3)
    (tasks,) = load_tasks(chosen(config)).values()
    (task,) = tasks.values()
    rows = [json.loads(line) for line in (samples / "bbh_boolean_50.jsonl").read_text().splitlines()]
    asked = list(task.test_docs())
    assert len(asked) == 47
    prompt = task.fewshot_context(asked[0], 3)
    shown = "\n\n".join(f"Q: {row['input']}\nA: {row['target']}" for row in rows[:3])
    assert prompt == f"{shown}\n\nQ: {rows[3]['input']}\nA:"


def test_mmlu_is_asked_as_its_authors_ask(samples):
    files = f"mmlu_x={samples}/mmlu_astronomy_test.csv,{samples}/mmlu_astronomy_dev.csv"
    (tasks,) = load_tasks(chosen(EvalConfig(files=(files,), shots=5))).values()
    (task,) = tasks.values()
    prompt = task.fewshot_context(next(iter(task.test_docs())), 5)
    blocks = prompt.split("\n\n")
    assert len(blocks) == 6 and all(block.split("\n")[1].startswith("A. ") for block in blocks)
    with (samples / "mmlu_astronomy_dev.csv").open(newline="") as file:
        assert [block[-1] for block in blocks[:5]] == [line[-1] for line in csv.reader(file)][:5]
    assert blocks[5].endswith("\nAnswer:")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "pica"], "no task 'pica'; did you mean piqa"),
        (["--files", "piqa=nowhere.jsonl"], "--files nowhere.jsonl: No file matches nowhere.jsonl"),
        (["--files", "piqa"], "--files piqa is not NAME=FILE, such as piqa=piqa.jsonl"),
        (["--files", "x={bad}"], "has the columns prompt, label; expected those of one of these: query, choices, gold"),
        (["--files", "x={torn}"], "row 2 of {torn} has no choices; its rows began with them"),
        (["--files", "x={broken}"], "--files {broken}: the line is not JSON"),
        (["--files", "x={empty}"], "--files {empty}: Nothing to read in {empty}"),
        (["--files", "x={one}", "--shots", "3"], "has 1 rows for 3 examples and {one} 0 to ask; give fewer --shots"),
        (["--files", "humaneval={one}"], "humaneval runs programs that the model writes; allow that with --run-code"),
        (["--tasks", "svamp", "--suite", "chat"], "lm-eval has no task for svamp; give it as a file: --files svamp=FILE"),
        (["--suite", "table4"], "--suite table4 is not table3, chat, safety or a task of lm-eval as FILE.yaml"),
        (["--suite", "mine.yaml"], "no file mine.yaml"),
        (["--suite", "safety"], "no benchmark: name the files of"),
        (["--tasks", "quac", "--resume", "must"], "lm-eval has no task for quac"),
        (["--lmit", "3"], "--lmit"),
        (["--suite", "safety", "--limit", "3", "--shots", "2"], "--suite safety does not read --shots, --limit; its own settings"),
        (["--files", "x={one}", "--rows", "0"], "--rows is 0; it must be 1 or more"),
        (["--safety.chat", "--tasks", "piqa"], "--suite table3 does not read --safety; settings that begin with --safety"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(shared, tmp_path, capsys, flags, message):
    rows = {"bad": ['{"prompt": "x", "label": 1}'], "broken": ["{"], "empty": [""]}
    rows["one"] = ['{"query": "x", "choices": ["a", "b"], "gold": 0}']
    rows["torn"] = [*rows["one"], '{"query": "x", "gold": 0}']
    files = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in files.items():
        path.write_text("\n".join(rows[name]) + "\n")
    flags = [flag.format(**files) for flag in flags]
    assert cli.main(["eval", str(shared / FOLDER), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message.format(**files) in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_several_samples_are_drawn_hotter_and_counted_together(samples, monkeypatch, tmp_path):
    lines = (samples / "humaneval_20.jsonl").read_text().split("\n")[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(lines) + "\n")
    solutions = [json.loads(line)["canonical_solution"] for line in lines]

    class Planted:
        context = 512

        class llama:
            class tokenizer:
                encode = staticmethod(lambda text: [len(text)])

        def complete(self, prompts, *, sampling, **settings):
            assert tuple(sampling) == (0.8, 0.95, 0) and len(prompts) == 8
            return [solutions[0], "    return 1", solutions[0], "    pass"] + ["    pass"] * 4

    file = (str(tmp_path / "two.jsonl"), None)
    row = code_benchmarks.ask_code(Planted(), "humaneval", file, shots=0, samples=4, limit=None)
    assert (row["metric"], row["value"], row["n"]) == ("pass@4", 0.5, 2)  # two of four passed, and none of four


def test_quacs_questions_follow_each_other_and_are_graded_by_words(tmp_path):
    row = {
        "background": "A bear.", "section_title": "Life", "context": "It sleeps in winter.", "questions": ["When?", "Where?"],
        "answers": {"texts": [["in the winter", "winter"], ["CANNOTANSWER"]]},
    }  # fmt: skip
    (tmp_path / "quac.jsonl").write_text(json.dumps(row) + "\n")
    (tasks,) = load_tasks(chosen(EvalConfig(files=(f"quac={tmp_path / 'quac.jsonl'}",)))).values()
    (task,) = tasks.values()
    first, second = task.test_docs()
    prompt = "A bear.\n\nLife\nIt sleeps in winter.\n\nQ: When?\nA:"
    assert task.fewshot_context(first, 0) == prompt
    assert task.fewshot_context(second, 0) == f"{prompt} in the winter\n\nQ: Where?\nA:"
    # Three words shared of four and two, articles aside, with the first answer; one of four and one with the second.
    assert task.process_results(first, ["In cold, dark winter"])["f1"] == pytest.approx(2 * 2 / (4 + 2))
    assert (
        task.process_results(second, ["nowhere"])["f1"] == 0 and task.process_results(first, ["The winter!"])["f1"] == 1
    )


@pytest.mark.parametrize(
    ("row", "written", "right"),
    [
        ({"Body": "I had 5.", "Question": "Now?", "Answer": 1200.0}, "5 - 3 is 2. So the answer is 1,200.", 1),
        ({"Body": "I had 5.", "Question": "Now?", "Answer": 2.0}, "2 and then 3", 0),
        ({"Body": "I had 5.", "Question": "Now?", "Answer": 12345678.0}, "12,345,678", 1),
        ({"Body": "I had 5.", "Question": "Now?", "Answer": 0.1234567}, "0.123457", 0),
        ({"question": "How many?", "answer": "It is <<1+1=2>>2.\n#### 2"}, "2.0", 1),
        ({"question": "How many?", "answer": "It is 2.\n#### 2"}, "none", 0),
        ({"sQuestion": "How many?", "lSolutions": [4.0]}, "4", 1),
        ({"question": "who?", "answer": ["The Queen", "Anne"]}, " the queen.", 1),
        ({"question": "who?", "answer": ["The Queen", "Anne"]}, " a king", 0),
        ({"context": "1/2?", "answer": "\\frac{1}{2}", "chain_of_thought": "x"}, "so \\boxed{\\frac{1}{2}}.", 1),
        ({"context": "1/2?", "answer": "\\frac{1}{2}", "chain_of_thought": "x"}, "The answer is $\\frac{1} {2}$.", 1),
        ({"context": "1/2?", "answer": "2", "chain_of_thought": "x"}, "\\boxed{3}, not \\boxed{4}", 0),
    ],
)
def test_answers_are_graded(tmp_path, row, written, right):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    (tasks,) = load_tasks(chosen(EvalConfig(files=(f"x={tmp_path / 'x.jsonl'}",)))).values()
    (task,) = tasks.values()
    (doc,) = task.test_docs()
    assert task.process_results(doc, [written])["exact_match"] == right
