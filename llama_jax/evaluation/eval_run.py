"""A model's scores on the paper's benchmarks, beside what the paper's model of the nearest size scores (paper 2.3 and A.2.2).

The tasks are lm-eval's, with the paper's shots and the metric nearest to the paper's; what is known to differ is said in the
table. Programs that a model writes are run by ours (`code_execution`), and only where the user allows it.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from llama_jax.conversion.convert import open_pinned
from llama_jax.evaluation.code_benchmarks import ask_code
from llama_jax.evaluation.engine import ANSWERS, Answers, Engine
from llama_jax.evaluation.eval_config import FREE_TO_CHANGE, EvalConfig
from llama_jax.evaluation.eval_questions import CodeFile, Question, check, chosen, load_tasks
from llama_jax.evaluation.eval_results import RESULTS, VERBALISED, rows_of, sections, summary, verbalised
from llama_jax.evaluation.report import write_page
from llama_jax.evaluation.safety import run_safety
from llama_jax.generation.llama import Llama
from llama_jax.parallel import distributed
from llama_jax.text.chat import Llama2Chat
from llama_jax.training.metrics import say
from llama_jax.training.preemption import stopping_at_once
from llama_jax.training.run_folder import find_recipe, make_folder, without, write_recipe, write_rows, write_whole


def run(config: EvalConfig) -> dict[str, Any]:
    """Asks the model what `config` says, going on where an earlier run stopped, and writes results.json and report.md.

    Returns:
      what results.json holds: checkpoint, tasks and groups, each with its value and, where there is one, the paper's.

    Raises:
      UserError: a task, a file or the checkpoint does not fit.
      Preempted: told to stop; the answers so far are kept.
    """
    check(config)
    distributed.initialize()
    questions = [] if config.suite == "safety" else chosen(config)
    checkpoint, model, _ = open_pinned(config.checkpoint)
    tasks = load_tasks(questions)
    if config.dry_run:
        for question in questions:
            print(f"{question.name}: {question.shots if question.shots is not None else 'its own'} shots")
        return {}
    folder = Path(config.out)
    if jax.process_index() == 0:
        found = find_recipe(folder, "eval", config.resume)
        make_folder(folder)
        recipe = without(config, FREE_TO_CHANGE) | {"checkpoint": str(checkpoint)}
        write_recipe(folder, "eval", config, recipe, found)
    llama = Llama.load(checkpoint, mesh=config.mesh or None, int8=config.int8)
    with stopping_at_once(), closing(Answers(folder / ANSWERS)) as answers:  # judges and programs take long too
        engine = Engine(llama, answers, rows=config.rows, seed=config.seed)
        if config.suite == "safety":
            safety = run_safety(config.safety, engine, str(checkpoint))
            samples, page = safety.samples, [safety.markdown()]
            results = {"checkpoint": str(checkpoint), "tasks": [], "groups": []} | safety.as_json()
        else:
            rows = ask(engine, questions, tasks, config)
            samples = {row["task"]: row.pop("samples") for row in rows}
            results = summary(str(checkpoint), model.n_params, rows, len(engine.truncated))
            page = sections(results)
    if jax.process_index() == 0:
        for name, rows_of_task in samples.items():
            write_rows(folder / "samples" / f"{name}.jsonl", rows_of_task)
        if results["tasks"]:
            write_rows(folder / VERBALISED, verbalised(results["tasks"], samples))
        write_whole(folder / RESULTS, json.dumps(results, indent=2).encode())
        if config.json:
            print(json.dumps(results))
        say(f"report: {write_page(folder / 'report.md', f'Evaluation of {config.checkpoint}', page)}")
    return results


def ask(
    engine: Engine, questions: Sequence[Question], tasks: Mapping[str, Mapping[str, Any]], config: EvalConfig
) -> list[dict[str, Any]]:
    """Asks all questions, and gives a row for each value that is reported.

    Args:
      engine: asks the model.
      questions: all of them.
      tasks: those of lm-eval that each question is made of; see `load_tasks`.
      config: how they are asked.
    """
    from lm_eval import evaluator

    from llama_jax.evaluation.lm_eval_model import HarnessModel

    template = Llama2Chat() if config.chat or config.suite == "chat" else None
    found: dict[str, Any] = {"samples": {}, "results": {}}
    if tasks:
        found = evaluator.evaluate(
            HarnessModel(engine, template),
            {"tasks": {name: task for of_question in tasks.values() for name, task in of_question.items()}},
            limit=config.limit,
            bootstrap_iters=0,
            apply_chat_template=template is not None,
            fewshot_as_multiturn=template is not None,
        )
    rows = []
    for question in questions:
        if isinstance(question.spec, CodeFile):
            settings = {"shots": question.shots or 0, "samples": config.code_samples, "limit": config.limit}
            new = [ask_code(engine, question.name, question.spec.file, **settings)]
        else:
            new = list(rows_of(question, tasks[question.name], found))
        about = {"task": question.name, "shots": question.shots, "benchmark": question.benchmark}
        rows += [about | row for row in new]
    return rows
