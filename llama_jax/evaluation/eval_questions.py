"""Which benchmarks an evaluation asks, and where their questions come from: lm-eval's tasks, files, problems to program."""

import difflib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.evaluation.benchmarks import SUITE, Benchmark
from llama_jax.evaluation.eval_config import EvalConfig
from llama_jax.evaluation.local_tasks import LocalRows, published_task, read_local, shaped_task
from llama_jax.training.metrics import say

WORD_PROBLEMS = "word problems"
SAFETY_HINT = "its own settings begin with --safety, such as --safety.toxigen FILES"
SUITE_HINT = "settings that begin with --safety belong to --suite safety"


@dataclass(frozen=True)
class Question:
    """A benchmark as it will be asked."""

    name: str
    spec: "str | LocalRows | CodeFile"
    """The name of a task of lm-eval, or the rows of a file, or problems to program."""
    shots: int | None
    benchmark: Benchmark | None
    """The paper's, where it is one."""


@dataclass(frozen=True)
class CodeFile:
    """Problems to program, in a file and one of examples; the hub's if none is given."""

    file: tuple[str, str | None] | None


def check(config: EvalConfig) -> None:
    """Raises UserError for settings that the suite does not read."""
    of_safety = config.suite == "safety"
    other = ("tasks", "files", "shots", "limit", "chat", "run_code", "code_samples") if of_safety else ("safety",)
    default = EvalConfig()
    if unread := [name for name in other if getattr(config, name) != getattr(default, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
        raise UserError(f"--suite {config.suite} does not read {flags}; {SAFETY_HINT if of_safety else SUITE_HINT}")


def chosen(config: EvalConfig) -> list[Question]:
    """What will be asked, in the order of the paper's table.

    Raises:
      UserError: a file does not hold a benchmark, or nothing is left to ask.
    """
    files = dict(_named(entry) for entry in config.files)
    if len(files) < len(config.files):
        raise UserError(f"--files names a benchmark twice: {' '.join(config.files)}")
    if config.suite.endswith((".yaml", ".yml")):
        if not Path(config.suite).is_file():
            raise UserError(
                f"no file {config.suite}; --suite is table3, chat, safety or a task of lm-eval as a YAML file"
            )
        return [Question(Path(config.suite).stem, config.suite, config.shots, None)]
    if config.suite not in ("table3", "chat"):
        raise UserError(f"--suite {config.suite} is not table3, chat, safety or a task of lm-eval as FILE.yaml")
    in_suite = {one.name: one for one in SUITE if (one.group == WORD_PROBLEMS) == (config.suite == "chat")}
    names = list(config.tasks) or list(files) or list(in_suite)
    questions = []
    for name in dict.fromkeys([*names, *files]):
        benchmark = next((one for one in SUITE if one.name == name), None)
        shots = config.shots if config.shots is not None else benchmark.shots if benchmark else None
        if benchmark is not None and benchmark.group == "code":
            if config.run_code:
                questions.append(Question(name, CodeFile(files.get(name)), shots, benchmark))
            elif name in files or config.tasks:
                raise UserError(f"{name} runs programs that the model writes; allow that with --run-code")
            else:
                say(f"left out: {name}, which runs programs that the model writes (--run-code asks it)")
        elif name in files:
            questions.append(Question(name, read_local(name, *files[name], shots or 0), shots or 0, benchmark))
        elif benchmark is None:
            questions.append(Question(name, name, shots, None))
        elif benchmark.lm_eval_task is not None:
            questions.append(Question(name, benchmark.lm_eval_task, shots, benchmark))
        elif config.tasks:
            raise UserError(f"lm-eval has no task for {name}; give it as a file: --files {name}=FILE")
        else:
            say(f"left out: {name}, which lm-eval has no task for (--files {name}=FILE asks it)")
    if not questions:
        raise UserError("nothing is left to ask; name benchmarks with --tasks or --files")
    return questions


def _named(entry: str) -> tuple[str, tuple[str, str | None]]:
    name, mark, path = entry.partition("=")
    if not (name and mark and path):
        raise UserError(f"--files {entry} is not NAME=FILE, such as piqa=piqa.jsonl")
    file, _, examples = path.partition(",")
    return name, (file, examples or None)


def load_tasks(questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """The tasks of lm-eval that each question is made of, by the question's name; those to program are not lm-eval's.

    Raises:
      UserError: lm-eval is not installed, there is no such task, or its data cannot be had.
    """
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("benchmarks need lm-eval, which is not installed: pip install 'llama-jax[eval]'") from None

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    questions = [question for question in questions if not isinstance(question.spec, CodeFile)]
    manager = TaskManager(include_defaults=any(map(is_published, questions)))
    named = [question.spec for question in questions if isinstance(question.spec, str)]
    if unknown := [name for name in named if not Path(name).is_file() and name not in manager.task_index]:
        names = [one.name for one in SUITE]
        near = difflib.get_close_matches(unknown[0], names) or difflib.get_close_matches(unknown[0], manager.all_tasks)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists lm-eval's."
        raise UserError(f"no task {unknown[0]!r}; {hint} A benchmark in a file is asked with --files NAME=FILE")
    with tempfile.TemporaryDirectory() as folder:
        return {question.name: _load(manager, question, Path(folder)) for question in questions}


def is_published(question: Question) -> bool:
    """Whether it is asked as lm-eval's own task asks it; a file is where its rows have the published columns."""
    if isinstance(question.spec, str):
        return True
    benchmark = question.benchmark
    is_group = benchmark is None or benchmark.group in ("mmlu", "agieval", "bbh")  # of which a file has one task
    return not is_group and benchmark.lm_eval_task and all(name in question.spec.asked[0] for name in benchmark.columns)


def _load(manager: Any, question: Question, folder: Path) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        tasks = manager.load([_spec(manager, question, folder)])["tasks"]
    except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the data of {question.name} cannot be had ({reason}); give it as a file: --files {question.name}=FILE"
        ) from error
    for task in tasks.values():
        if question.shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=question.shots or 0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own
    return tasks


def _spec(manager: Any, question: Question, folder: Path) -> str | dict[str, Any]:
    """What lm-eval loads: the name or the file of a task, or a config."""
    if isinstance(question.spec, str):
        return question.spec
    if not is_published(question):
        return shaped_task(question.spec, question.name, question.shots or 0)
    definition = manager.task_index[question.benchmark.lm_eval_task].yaml_path
    path = str(published_task(question.spec, question.name, definition, folder))
    if has_own_examples(*manager.load([path])["tasks"].values()):
        path = str(published_task(question.spec.whole(), question.name, definition, folder))
    return path


def has_own_examples(task: Any) -> bool:
    """Whether a task of lm-eval brings its examples itself."""
    return bool(task.get_config("fewshot_config").samples)
