"""A model in the place of human raters (beside paper 3.4.2; the paper's own model judges are its reward models, 3.4.1).

A judge prefers the answer that it is shown first, or last, more or less whatever is in it. So every pair is shown in both orders,
and an answer wins only if it does in both; everything else is a tie. How often the orders agree, and which place is preferred, say
what the judge is worth. The results are those of `win_rates`, as people's are.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llama_jax.errors import UserError
from llama_jax.evaluation.answer_files import Answers, read_answers
from llama_jax.evaluation.bradley_terry import rate
from llama_jax.evaluation.human_tally import elo_table
from llama_jax.evaluation.report import table
from llama_jax.evaluation.win_rates import Result, percent, rates_table, share, win_rates
from llama_jax.generation.parts import complete, make_parts, parts_of, remove_parts
from llama_jax.text.chat import BadDialogue, Dialogue, Message, encode_prompt
from llama_jax.training.run_folder import digest_of, find_recipe, make_folder, write_recipe

if TYPE_CHECKING:
    from llama_jax.generation.llama import Llama
    from llama_jax.text.chat import Template

JUDGEMENTS = "judgements.jsonl"
Verdict = Literal["A", "B", "tie"]


class Question(NamedTuple):
    """What a judge is asked: which of two answers to a prompt is better."""

    prompt: Dialogue
    a: str
    b: str


Judge = Callable[[Sequence[Question]], Sequence[Verdict | None]]
"""A verdict on each question; None on one that cannot be asked, such as one that is too long."""


# Our choice: all of it, the paper asks no model. The letters are what is scored, so that every judge has a verdict.
PROMPT = """Below are a conversation and two answers to its last message. Judge which answer is better: more helpful, while it is safe \
and honest. Neither the order nor the length of the answers matters.

[Conversation]
{conversation}

[Answer A]
{a}

[Answer B]
{b}

[Task]
Reply with one letter: A if answer A is better, B if answer B is better, C if they are equally good."""
VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}


@dataclass(frozen=True)
class JudgeConfig:
    """What is judged, and by whom."""

    answers: tuple[str, ...]
    """A file of answers for each model."""
    judge: str
    """A checkpoint of a chat model."""
    out: str
    """The folder to write."""
    batch_size: int = 32
    """Questions that are saved together."""


def judge_pairs(questions: Sequence[Question], judge: Judge) -> list[tuple[Verdict | None, Verdict | None]]:
    """Two verdicts on each pair, as it is given and with its answers swapped; A and B are the places as they were shown."""
    swapped = [Question(one.prompt, one.b, one.a) for one in questions]
    verdicts = judge([*questions, *swapped])
    return list(zip(verdicts[: len(questions)], verdicts[len(questions) :], strict=True))


def score_of(verdicts: tuple[Verdict | None, Verdict | None]) -> int:
    """1 if the first answer wins in both orders, -1 if the second does, and 0 otherwise."""
    return {("A", "B"): 1, ("B", "A"): -1}.get(verdicts, 0)


def llama_judge(llama: "Llama", template: "Template") -> Judge:
    """A chat model as a judge: of the letters A, B and C it says the one that it finds the likeliest as its answer.

    No verdict is given on a question that is longer than the model's context, or that holds one of the template's tags.
    """
    letters = {letter: llama.tokenizer.encode(letter, bos=False) for letter in VERDICTS}
    longest = max(map(len, letters.values()))

    def judge(questions: Sequence[Question]) -> list[Verdict | None]:
        asked: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            try:
                ids = encode_prompt(llama.tokenizer, [Message("user", judge_prompt(question))], template)
            except BadDialogue:
                continue
            if len(ids) + longest <= llama.model.config.context_length:
                asked[number] = ids
        scores = iter(llama.score([(ids, letter) for ids in asked.values() for letter in letters.values()]))
        verdicts: list[Verdict | None] = [None] * len(questions)
        for number in asked:
            likely = {letter: next(scores).log_prob for letter in letters}
            verdicts[number] = VERDICTS[max(likely, key=likely.__getitem__)]
        return verdicts

    return judge


def judge_prompt(question: Question) -> str:
    """A question as the text that the judge is asked."""
    conversation = "\n".join(f"{message.role.capitalize()}: {message.content}" for message in question.prompt)
    return PROMPT.format(conversation=conversation, a=question.a, b=question.b)


def judge_answers(config: JudgeConfig, make_judge: Callable[[], Judge]) -> dict[str, Any]:
    """Judges all pairs of models' answers, saves the verdicts in judgements.jsonl, and gives what they come to, as JSON.

    What was stopped goes on; `make_judge` is only called if something is left to judge.

    Raises:
      UserError: answers that cannot be read or compared, or a folder of something else.
      Preempted: told to stop; what was judged is saved.
    """
    answers, folder = read_answers(config.answers), Path(config.out)
    if len(answers.by_model) < 2:
        raise UserError("one file of answers is given, and answers are compared; name two or more")
    recipe = {"judge": config.judge, "batch_size": config.batch_size, "answers": digest_of(asdict(answers))}
    found = find_recipe(folder, "judge", "auto")
    make_folder(folder)
    write_recipe(folder, "judge", config, recipe, found)
    pairs, _ = answers.pairs()
    parts = parts_of(len(pairs), 2, config.batch_size)

    def make_missing(missing: list[range]) -> None:
        judge = make_judge()
        make_parts(folder, missing, len(pairs), lambda part: _judged(answers, part, judge), lambda part: 2 * len(part))

    complete(folder, parts, JUDGEMENTS, make_missing)
    remove_parts(folder, parts)
    rows = (folder / JUDGEMENTS).read_text(encoding="utf-8").splitlines()
    return tally_judgements(answers, [json.loads(line) for line in rows])


def _judged(answers: Answers, part: range, judge: Judge) -> Iterable[dict[str, Any]]:
    """A row for each of a part's pairs: its prompt, its models and both verdicts."""
    pairs = answers.pairs()[0][part.start : part.stop]
    questions = [
        Question(answers.prompts[n].dialogue, answers.by_model[first][n], answers.by_model[second][n])
        for n, first, second in pairs
    ]
    for (n, first, second), verdicts in zip(pairs, judge_pairs(questions, judge), strict=True):
        yield {"prompt": answers.prompts[n].id, "first": first, "second": second, "verdicts": verdicts}


def tally_judgements(answers: Answers, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a judge's verdicts come to, as JSON; `judge_sections` shows it."""
    prompts = {prompt.id: prompt for prompt in answers.prompts}
    whole = [row for row in rows if None not in row["verdicts"]]
    equal = [
        {"prompt": answers.prompts[number].id, "first": first, "second": second, "verdicts": ("tie", "tie")}
        for number, first, second in answers.pairs()[1]
    ]
    results = []
    for row in [*whole, *equal]:
        prompt, score = prompts[row["prompt"]], score_of(tuple(row["verdicts"]))
        results.append(Result(prompt.id, row["first"], row["second"], score, prompt.turns, prompt.category))
    verdicts = [verdict for row in whole for verdict in row["verdicts"]]
    ratings = rate(results, list(answers.by_model)) if results else {}
    consistent = sum(tuple(row["verdicts"]) in {("A", "B"), ("B", "A"), ("tie", "tie")} for row in whole)
    return {
        "not_judged": len(rows) - len(whole),
        "identical": len(equal),
        "pairs": win_rates(results),
        "consistent": share(consistent, len(whole)),
        "first_shown": share(verdicts.count("A"), len(verdicts) - verdicts.count("tie")),
        "elo": {model: asdict(rating) for model, rating in ratings.items()},
    }


def judge_sections(found: dict[str, Any]) -> list[str]:
    """What `tally_judgements` gives, in Markdown."""
    left_out = (
        f"{found['not_judged']} pairs could not be judged: too long for the judge, or with tags of its chat format."
    )
    equal = f"{found['identical']} pairs of equal answers were not judged and count as ties."
    bias = [
        ("both orders have the same verdict %", percent(found["consistent"])),
        ("of verdicts that are no tie, for the answer shown first %", percent(found["first_shown"])),
    ]
    return [
        *([left_out] if found["not_judged"] else []),
        *([equal] if found["identical"] else []),
        rates_table(found["pairs"]),
        elo_table(found["elo"]),
        table(("the judge", ""), bias),
    ]
