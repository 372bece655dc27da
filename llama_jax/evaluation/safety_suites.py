"""Each safety benchmark from its files to its tables (paper 4.1, 4.4, A.4.5 to A.4.7): read and checked first, asked and judged
when called.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import UserError
from llama_jax.evaluation.comparisons import Comparison
from llama_jax.evaluation.judges import find_answer_judge, find_answerer, find_judge, find_sentiment, judged
from llama_jax.evaluation.safety_bold import compare_bold, read_bold
from llama_jax.evaluation.safety_config import SafetyConfig
from llama_jax.evaluation.safety_model import SafetyModel
from llama_jax.evaluation.safety_toxigen import compare_toxigen, read_toxigen, statement
from llama_jax.evaluation.safety_truthfulqa import (
    Question,
    answer_in,
    by_choice,
    choice_pairs,
    compare_answers,
    compare_choices,
    read_truthfulqa,
    shot_prompt,
)
from llama_jax.evaluation.safety_violations import compare_refusals, compare_violations, read_safety_prompts
from llama_jax.text.chat import Message, Template


class Measured(NamedTuple):
    """What came out of a benchmark."""

    tables: tuple[Comparison, ...]
    samples: dict[str, list[dict[str, Any]]]
    """What was asked, answered and found, by part of the benchmark."""


Measure = Callable[[], Measured]
"""Asks, judges and compares what was read before."""


def measure_all(parts: Sequence[Measure]) -> Measured:
    """What comes out of several, one after the other."""
    found = [part() for part in parts]
    samples = {name: rows for part in found for name, rows in part.samples.items()}
    return Measured(tuple(table for part in found for table in part.tables), samples)


def toxigen(config: SafetyConfig, model: SafetyModel, template: Template) -> Measure:
    """Toxic continuations by group. Raises UserError for bad files or an unknown judge, as all of these."""
    prompts, notes = read_toxigen(config.toxigen)
    load = find_judge(config.toxicity_judge, "--safety.toxicity-judge", str)

    def measure() -> Measured:
        texts = [prompt.text for prompt in prompts]
        answers = model.generate(texts, "toxigen")
        said = list(map(statement, answers))
        some = [text for text in said if text]
        verdicts = iter(judged(load(), config.toxicity_judge, some))
        toxic = [bool(text) and next(verdicts) for text in said]
        rows = [
            {"group": prompt.group, "prompt": prompt.text, "answer": answer, "said": text, "toxic": verdict}
            for prompt, answer, text, verdict in zip(prompts, answers, said, toxic, strict=True)
        ]
        about = (*notes, *_cut(model, texts), f"judged by {config.toxicity_judge}")
        return Measured((compare_toxigen(prompts, toxic, model.paper, about),), {"toxigen": rows})

    return measure


def bold(config: SafetyConfig, model: SafetyModel, template: Template) -> Measure:
    """Sentiment of continuations by subgroup."""
    prompts, notes = read_bold(config.bold)
    sentiment = find_sentiment()

    def measure() -> Measured:
        texts = [prompt.text for prompt in prompts]
        said = model.generate(texts, "bold")
        rows = [
            {"group": prompt.group, "prompt": prompt.text, "answer": text}
            for prompt, text in zip(prompts, said, strict=True)
        ]
        tables = compare_bold(prompts, said, sentiment, model.paper, (*notes, *_cut(model, texts)))
        return Measured(tables, {"bold": rows})

    return measure


def truthfulqa(config: SafetyConfig, model: SafetyModel, template: Template) -> Measure:
    """Multiple choice, where the files have choices, and judged answers, where judges are named."""
    questions = read_truthfulqa(config.truthfulqa)
    choosing = [question for question in questions if question.one_true or question.several_true]
    if bool(config.truth_judge) != bool(config.info_judge):
        raise UserError(
            "TruthfulQA's answers need both judges, --safety.truth-judge and --safety.info-judge, or neither"
        )
    if not config.truth_judge and not choosing:
        raise UserError(
            "these questions of TruthfulQA have no choices; name --safety.truth-judge and --safety.info-judge"
        )
    parts = [_choices(model, choosing)] if choosing else []
    parts += [_judged_answers(config, model, questions)] if config.truth_judge else []
    return lambda: measure_all(parts)


def _choices(model: SafetyModel, questions: Sequence[Question]) -> Measure:
    def measure() -> Measured:
        pairs = [pair for question in questions for pair in zip(*choice_pairs(question), strict=True)]
        prompts, texts = map(list, zip(*pairs, strict=True))
        scored = by_choice(questions, model.log_probs(prompts, texts, "truthfulqa choices"))
        cut = model.count_cut_pairs(prompts, texts)
        notes = [f"{cut} of {len(pairs)} answers are behind a prompt that lost its beginning"] if cut else []
        rows = [{**question._asdict(), "log_probs": of} for question, of in zip(questions, scored, strict=True)]
        return Measured((compare_choices(questions, scored, model.paper, notes),), {"truthfulqa_choices": rows})

    return measure


def _judged_answers(config: SafetyConfig, model: SafetyModel, questions: Sequence[Question]) -> Measure:
    load_truth = find_answerer(config.truth_judge, "--safety.truth-judge", "True")
    load_info = find_answerer(config.info_judge, "--safety.info-judge", "Helpful")
    prompts = [shot_prompt(questions, number, model.seed) for number in range(len(questions))]

    def measure() -> Measured:
        answers = model.generate(prompts, "truthfulqa answers")
        said = list(map(answer_in, answers))
        pairs = [(question.text, text) for question, text in zip(questions, said, strict=True)]
        some = [pair for pair in pairs if pair[1]]
        true, info = (
            iter(judged(load(), name, some))
            for load, name in ((load_truth, config.truth_judge), (load_info, config.info_judge))
        )
        are_true = [next(true) if text else True for text in said]
        are_informative = [next(info) if text else False for text in said]
        names = ("question", "prompt", "answer", "said", "true", "informative")
        columns = ([question.text for question in questions], prompts, answers, said, are_true, are_informative)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        about = (*_cut(model, prompts), f"judged by {config.truth_judge} and {config.info_judge}")
        return Measured((compare_answers(are_true, are_informative, model.paper, about),), {"truthfulqa_answers": rows})

    return measure


def adversarial(config: SafetyConfig, model: SafetyModel, template: Template) -> Measure:
    """Violations among answers to adversarial prompts."""
    return _answered(config, model, template, "adversarial", config.adversarial, "violation", compare_violations)


def borderline(config: SafetyConfig, model: SafetyModel, template: Template) -> Measure:
    """Refusals among answers to harmless prompts that look adversarial."""
    return _answered(config, model, template, "borderline", config.borderline, "refusal", compare_refusals)


def _answered(
    config: SafetyConfig,
    model: SafetyModel,
    template: Template,
    benchmark: str,
    sources: Sequence[str],
    kind: str,
    compare: Callable[..., Comparison],
) -> Measure:
    """Answers to dialogues, of which the judge of that kind says which are one."""
    flag, name = f"--safety.{kind}-judge", {"violation": config.violation_judge, "refusal": config.refusal_judge}[kind]
    if not name:
        raise UserError(f"name who tells a {kind}: {flag} FILE.py:NAME, or a text classifier's FOLDER or HUB-ID")
    prompts, notes = read_safety_prompts(sources, template)
    load = find_answer_judge(name, flag)
    fitting = [prompt for prompt in prompts if model.has_room(prompt.dialogue)]
    if not fitting:
        raise UserError(
            f"none of {len(prompts)} dialogues in {', '.join(sources)} leaves room for --safety.decoding.max-answer-tokens "
            f"{config.decoding.max_answer_tokens} in the model's context; lower it"
        )
    left_out = [f"{len(prompts) - len(fitting)} dialogues leave no room for an answer"] * (len(fitting) < len(prompts))

    def measure() -> Measured:
        said = model.answer([prompt.dialogue for prompt in fitting], benchmark)
        dialogues = [(*prompt.dialogue, Message("assistant", text)) for prompt, text in zip(fitting, said, strict=True)]
        verdicts = judged(load(), name, dialogues)
        rows = [
            {**prompt._asdict(), "answer": text, kind: verdict}
            for prompt, text, verdict in zip(fitting, said, verdicts, strict=True)
        ]
        about = (*notes, *left_out, f"judged by {name}")
        return Measured((compare(fitting, verdicts, model.paper, about),), {benchmark: rows})

    return measure


def _cut(model: SafetyModel, prompts: Sequence[str]) -> list[str]:
    count = model.count_cut(prompts)
    return (
        [f"{count} of {len(prompts)} prompts are longer than the model's context and lost their beginning"]
        if count
        else []
    )
