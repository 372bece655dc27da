"""What the suite says of lm-eval's tasks, against the files of an installed lm-eval: they exist, read these columns, give these metrics."""

import importlib.util
import re
from pathlib import Path

import pytest

from llama_jax.evaluation.benchmarks import SUITE

# Where a task's files are not in a folder of its own name.
FOLDERS = {
    "social_iqa": "siqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "gsm8k_cot": "gsm8k",
    "bbh_fewshot": "bbh/fewshot",
    "asdiv_cot_llama": "asdiv",
}
FOLDERS |= {one.name: {"mmlu": "mmlu/default", "agieval": "agieval"}[one.group] for one in SUITE if one.questions}
WITH_TASK = [one for one in SUITE if one.lm_eval_task]


@pytest.fixture(scope="module")
def tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm-eval is not installed: pip install 'lm-eval>=0.4.13'")
    return Path(spec.origin).parent / "tasks"


@pytest.mark.parametrize("one", WITH_TASK, ids=lambda one: one.name)
def test_the_task_exists_and_reads_the_columns_and_gives_the_metric(tasks, one):
    folder = tasks / FOLDERS.get(one.lm_eval_task, one.lm_eval_task)
    # Groups of minerva_math's kind are defined apart from their tasks.
    files = [path for path in [*folder.iterdir(), tasks / "benchmarks" / f"{folder.name}.yaml"] if path.is_file()]
    text = "\n".join(path.read_text() for path in files if path.suffix != ".md")
    assert re.search(rf'^"?(task|group)"?: "?{one.lm_eval_task}"?$', text, re.M)
    for column in one.columns:
        assert re.search(rf"\b{column}\b", text), f"{column} is not read"
    metric, _, chosen = one.lm_eval_metric.partition(",")
    assert re.search(rf"\b{metric}\b", text), metric
    assert chosen == "none" or re.search(rf'name: "?{chosen}"?$', text, re.M), chosen


def test_only_what_lm_eval_lacks_has_no_task(tasks):
    without = {one.name for one in SUITE if one.lm_eval_task is None}
    ours = {"humaneval", "mbpp"}
    assert without == {"quac", "svamp", "mawps"} | ours
    assert not [name for name in without - ours if list(tasks.glob(f"*{name}*"))]
    assert all((one.lm_eval_metric is None) == (one.lm_eval_task is None) for one in SUITE)


def test_shots_of_tasks_with_examples_of_their_own_are_the_papers(tasks):
    """These come with worked examples, whose number lm-eval has as num_fewshot."""
    own = {"gsm8k": "gsm8k/gsm8k-cot.yaml", "bbh": "bbh/fewshot/_fewshot_template_yaml"}
    own |= {"math": "minerva_math/minerva_math_algebra.yaml", "asdiv": "asdiv/asdiv-cot-llama.yaml"}
    shots = {one.name: one.shots for one in SUITE}
    for name, file in own.items():
        assert re.search(r"^num_fewshot: (\d+)$", (tasks / file).read_text(), re.M)[1] == str(shots[name])
