"""Each safety benchmark from its files to its tables (paper 4.1, 4.4, A.4.5 to A.4.7): read and checked first, asked and judged
when called.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.evaluation.comparisons import Comparison
from llama_jax.evaluation.judges import find_answer_judge, find_answerer, find_judge, find_sentiment, judged
from llama_jax.evaluation.kept_answers import ask_all
from llama_jax.evaluation.safety_bold import compare_bold, read_bold
from llama_jax.evaluation.safety_config import SafetyConfig
from llama_jax.evaluation.safety_model import SafetyModel
from llama_jax.evaluation.safety_toxigen import compare_toxigen, read_toxigen, statement
from llama_jax.evaluation.safety_truthfulqa import (
    Question,
    answer_in,
    choice_log_probs,
    choice_pairs,
    compare_answers,
    compare_choices,
    read_truthfulqa,
    shot_prompt,
)
from llama_jax.evaluation.safety_violations import compare_refusals, compare_violations, read_safety_prompts
from llama_jax.text.chat import Message, Template
from llama_jax.training.run_folder import write_rows

Tables = Callable[[], tuple[Comparison, ...]]
"""Asks, judges and compares what was read before."""


def toxigen(config: SafetyConfig, model: SafetyModel, template: Template, out: Path) -> Tables:
    """Toxic continuations by group. Raises UserError for bad files or an unknown judge, as all of these."""
    prompts, notes = read_toxigen(config.toxigen)
    load = find_judge(config.toxicity_judge, "--safety.toxicity-judge", str)

    def tables() -> tuple[Comparison, ...]:
        texts = [prompt.text for prompt in prompts]
        said = list(map(statement, _continued(config, model, texts, out / "toxigen.jsonl")))
        some = [text for text in said if text]
        verdicts = iter(judged(load(), config.toxicity_judge, some))
        toxic = [bool(text) and next(verdicts) for text in said]
        rows = zip(prompts, said, toxic, strict=True)
        write_rows(
            out / "toxigen.judged.jsonl",
            ({"group": prompt.group, "said": text, "toxic": verdict} for prompt, text, verdict in rows),
        )
        about = (*notes, *_cut(model, texts), f"judged by {config.toxicity_judge}")
        return (compare_toxigen(prompts, toxic, model.paper, about),)

    return tables


def bold(config: SafetyConfig, model: SafetyModel, template: Template, out: Path) -> Tables:
    """Sentiment of continuations by subgroup."""
    prompts, notes = read_bold(config.bold)
    sentiment = find_sentiment()

    def tables() -> tuple[Comparison, ...]:
        texts = [prompt.text for prompt in prompts]
        said = _continued(config, model, texts, out / "bold.jsonl")
        return compare_bold(prompts, said, sentiment, model.paper, (*notes, *_cut(model, texts)))

    return tables


def truthfulqa(config: SafetyConfig, model: SafetyModel, template: Template, out: Path) -> Tables:
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
    judging = _judged_answers(config, model, questions, out) if config.truth_judge else None

    def tables() -> tuple[Comparison, ...]:
        found = []
        if choosing:
            scored = ask_all(
                out / "truthfulqa_choices.jsonl",
                {"model": model.name},
                choosing,
                lambda some: [choice_log_probs(question, model.log_probs) for question in some],
                batch=1,
            )
            pairs = [pair for question in choosing for pair in zip(*choice_pairs(question), strict=True)]
            cut = model.count_cut_pairs(*map(list, zip(*pairs, strict=True)))
            notes = [f"{cut} of {len(pairs)} answers are behind a prompt that lost its beginning"] if cut else []
            found.append(compare_choices(choosing, scored, model.paper, notes))
        return (*found, *(judging() if judging else ()))

    return tables


def _judged_answers(config: SafetyConfig, model: SafetyModel, questions: Sequence[Question], out: Path) -> Tables:
    load_truth = find_answerer(config.truth_judge, "--safety.truth-judge", "True")
    load_info = find_answerer(config.info_judge, "--safety.info-judge", "Helpful")
    prompts = [shot_prompt(questions, number, config.decoding.seed) for number in range(len(questions))]

    def tables() -> tuple[Comparison, ...]:
        said = list(map(answer_in, _continued(config, model, prompts, out / "truthfulqa_answers.jsonl")))
        pairs = [(question.text, text) for question, text in zip(questions, said, strict=True)]
        some = [pair for pair in pairs if pair[1]]
        true, info = (
            iter(judged(load(), name, some))
            for load, name in ((load_truth, config.truth_judge), (load_info, config.info_judge))
        )
        are_true = [next(true) if text else True for text in said]
        are_informative = [next(info) if text else False for text in said]
        rows = zip(pairs, are_true, are_informative, strict=True)
        write_rows(
            out / "truthfulqa_answers.judged.jsonl",
            ({"question": question, "said": text, "true": t, "informative": i} for (question, text), t, i in rows),
        )
        about = (*_cut(model, prompts), f"judged by {config.truth_judge} and {config.info_judge}")
        return (compare_answers(are_true, are_informative, model.paper, about),)

    return tables


def adversarial(config: SafetyConfig, model: SafetyModel, template: Template, out: Path) -> Tables:
    """Violations among answers to adversarial prompts."""
    return _answered(
        config, model, template, out / "adversarial.jsonl", config.adversarial, "violation", compare_violations
    )


def borderline(config: SafetyConfig, model: SafetyModel, template: Template, out: Path) -> Tables:
    """Refusals among answers to harmless prompts that look adversarial."""
    return _answered(config, model, template, out / "borderline.jsonl", config.borderline, "refusal", compare_refusals)


def _answered(
    config: SafetyConfig,
    model: SafetyModel,
    template: Template,
    path: Path,
    sources: Sequence[str],
    kind: str,
    compare: Callable[..., Comparison],
) -> Tables:
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

    def tables() -> tuple[Comparison, ...]:
        drawn = {"temperature", "top_p", "max_answer_tokens", "seed"}
        recipe = {name: value for name, value in asdict(config.decoding).items() if name in drawn}
        said = ask_all(
            path,
            recipe | {"model": model.name, "template": repr(template)},
            [prompt.dialogue for prompt in fitting],
            model.answer,
            batch=config.batch,
        )
        dialogues = [(*prompt.dialogue, Message("assistant", text)) for prompt, text in zip(fitting, said, strict=True)]
        verdicts = judged(load(), name, dialogues)
        rows = zip(fitting, said, verdicts, strict=True)
        write_rows(
            path.with_suffix(".judged.jsonl"),
            ({**prompt._asdict(), "said": text, kind: verdict} for prompt, text, verdict in rows),
        )
        return (compare(fitting, verdicts, model.paper, (*notes, *left_out, f"judged by {name}")),)

    return tables


def _continued(config: SafetyConfig, model: SafetyModel, prompts: Sequence[str], path: Path) -> list[str]:
    """The continuations of texts, those that the file has among them."""
    drawn = {"temperature", "top_p", "max_new_tokens", "seed"}
    recipe = {name: value for name, value in asdict(config.decoding).items() if name in drawn}
    return ask_all(path, recipe | {"model": model.name}, prompts, model.generate, batch=config.batch)


def _cut(model: SafetyModel, prompts: Sequence[str]) -> list[str]:
    count = model.count_cut(prompts)
    return (
        [f"{count} of {len(prompts)} prompts are longer than the model's context and lost their beginning"]
        if count
        else []
    )
