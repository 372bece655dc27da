"""HumanEval and MBPP asked of a model: programs are drawn, run contained and counted as pass@k (paper 2.3 and A.2.2, Table 21)."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_jax.errors import UserError
from llama_jax.evaluation.code_execution import Program, run_programs
from llama_jax.evaluation.code_problems import (
    HUMANEVAL_STOPS,
    MBPP_STOPS,
    HumanEvalProblem,
    MbppProblem,
    humaneval_program,
    mbpp_program,
    mbpp_prompt,
    mbpp_questions,
    mbpp_shots,
    read_humaneval,
    read_mbpp,
)
from llama_jax.evaluation.engine import Engine
from llama_jax.evaluation.pass_at_k import TOP_P, pass_at_k, temperature
from llama_jax.generation.sampler import Sampling
from llama_jax.training.run_folder import digest_of

HUB = {"humaneval": ("openai/openai_humaneval", None), "mbpp": ("google-research-datasets/mbpp", "full")}
MAX_NEW_TOKENS = 512  # Our choice


def ask_code(
    engine: Engine, name: str, file: tuple[str, str | None] | None, *, shots: int, samples: int, limit: int | None
) -> dict[str, Any]:
    """Draws programs for each problem, runs them, and gives the row for pass@`samples`.

    Not for pass@1 of several samples too: the paper draws for that at another temperature.

    Args:
      engine: asks the model.
      name: humaneval or mbpp.
      file: its public file and one that examples are taken from; the hub's if none.
      shots: 3 for MBPP's own examples, or 0.
      samples: programs for each problem: one is drawn at temperature 0.1, several at 0.8, as in the paper.
      limit: problems at most; all if none.

    Raises:
      UserError: the file is of another form, or cannot be had.
      Preempted: told to stop; the programs drawn so far are kept.
    """
    if samples < 1 or shots not in (0, 3 if name == "mbpp" else 0):
        raise UserError(f"{name} with {samples} samples and {shots} shots; --code-samples is 1 or more, --shots 0 or 3")
    with tempfile.TemporaryDirectory() as folder:
        path, examples = file or (_fetch(name, Path(folder)), None)
        problems, prompts = _problems(name, path, examples or path, shots)
    problems, prompts = problems[:limit], prompts[:limit]
    encode = engine.llama.tokenizer.encode
    texts = engine.complete(
        [encode(prompt) for prompt in prompts for _ in range(samples)],
        max_new_tokens=min(MAX_NEW_TOKENS, engine.context // 2),
        stops=HUMANEVAL_STOPS if name == "humaneval" else MBPP_STOPS,
        sampling=Sampling(temperature(samples), TOP_P, 0),
        what=name,
    )
    build = humaneval_program if name == "humaneval" else mbpp_program
    programs: list[Program] = [build(problems[place // samples], text) for place, text in enumerate(texts)]
    outcomes = list(tqdm(run_programs(programs, run_code=True), total=len(programs), desc=f"{name} run", mininterval=5))
    passed = [[one.passed for one in outcomes[i : i + samples]] for i in range(0, len(outcomes), samples)]
    texts_of = [solution(problem) for problem in problems]
    rows = [
        {
            "prompt": prompts[place // samples],
            "answers": [text],
            "program": outcome.why,
            "text": texts_of[place // samples],
        }
        for place, (text, outcome) in enumerate(zip(texts, outcomes, strict=True))
    ]
    value = pass_at_k(passed, samples)
    return {
        "metric": f"pass@{samples}",
        "n": len(problems),
        "value": value.mean,
        "interval": (value.low, value.high),
        "prompts": digest_of(prompts)[:12],
        "samples": rows,
    }


def solution(problem: HumanEvalProblem | MbppProblem) -> str:
    """A problem with its solution as a text, as it would stand in a corpus."""
    if isinstance(problem, HumanEvalProblem):
        return problem.prompt + problem.canonical_solution
    return f"{problem.text}\n{problem.code}"


def _problems(name: str, path: str, examples: str, shots: int) -> tuple[Sequence[Any], list[str]]:
    """The problems that are asked, and the prompt of each."""
    if name == "humaneval":
        problems = read_humaneval(path)
        return problems, [problem.prompt for problem in problems]
    shown = mbpp_shots(read_mbpp(examples)) if shots else ()
    problems = mbpp_questions(read_mbpp(path))
    return problems, [mbpp_prompt(problem, shown) for problem in problems]


def _fetch(name: str, folder: Path) -> str:
    """The hub's data as the public file."""
    import datasets

    repository, config = HUB[name]
    try:
        splits = datasets.load_dataset(repository, config)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{repository} cannot be had ({reason}); give its file: --files {name}={name}.jsonl") from error
    path = folder / f"{name}.jsonl"
    datasets.concatenate_datasets(list(splits.values())).to_json(path)
    return str(path)
