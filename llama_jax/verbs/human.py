"""The verb that compares models by people or by a model: compare."""

import json
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.verbs.arguments import Json, call

AnswerFiles = Annotated[tuple[str, ...], arg(metavar="ANSWERS.jsonl...")]


def compare(argv: Sequence[str]) -> None:
    """The actions of `llama-jax compare`; see llama_jax.evaluation.human_sheet and what stands beside it."""
    actions = {"answer": _answer, "sheet": _sheet, "tally": _tally, "judge": _judge}
    if argv and argv[0] in actions:
        call(actions[argv[0]], f"compare {argv[0]}", argv[1:])
        return
    text = """Compare the answers of models, by people (pages to rate on, and what their ratings come to) or by a model.

A file of answers has a row for each prompt: {"prompt": ..., "answer": ...}, and `id` and `category` where they are known.

Examples:
  llama-jax compare answer runs/mine-sft prompts.jsonl --out ours.jsonl
  llama-jax compare sheet ours.jsonl theirs.jsonl --out study
  llama-jax compare tally study ratings-*.json
  llama-jax compare judge ours.jsonl theirs.jsonl --judge Llama-2-70b-chat-hf --out judged"""
    tyro.extras.subcommand_cli_from_dict(actions, args=argv, prog="llama-jax compare", description=text)


def _answer(
    checkpoint: Annotated[str, arg(metavar="CHECKPOINT")],
    prompts: Annotated[str, arg(metavar="PROMPTS.jsonl")],
    /,
    *,
    out: str,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_new_tokens: int = 512,
    seed: int = 0,
    plain: bool = False,
    rows: int = 32,
    int8: bool = False,
    mesh: str | None = None,
) -> None:
    """Have a model answer a file of prompts, to be compared; what is stopped goes on when it is started again.

    Examples:
      llama-jax compare answer runs/mine-sft prompts.jsonl --out ours.jsonl
      llama-jax compare answer Llama-2-7b-chat-hf prompts.jsonl --out theirs.jsonl --int8

    Args:
      checkpoint: A model of any form that was tuned on dialogues.
      prompts: Rows with `prompt`, a text, or `dialogue`, a list of turns; `id` and `category` stay where they are there.
      out: The file to write: the same rows, each with its answer.
      temperature: Divides the logits; 0 always takes the likeliest token.
      top_p: Draw from the likeliest tokens that together hold this probability; 1 for all.
      max_new_tokens: Of an answer; the paper's human evaluation has 1000 for open models.
      seed: Of the answers.
      plain: Prompt and completion as plain text, instead of Llama 2's chat format.
      rows: Prompts that are answered at once.
      int8: Keep the weights in 8 bits, half the memory of bfloat16.
      mesh: Devices to lie on, such as auto or tensor=4; one if not given.
    """
    from llama_jax.evaluation.model_answers import AnswerConfig, answer_prompts

    config = AnswerConfig(
        checkpoint, prompts, out, temperature, top_p, max_new_tokens, seed, plain, rows=rows, int8=int8, mesh=mesh
    )
    print(f"{answer_prompts(config)} answers in {out}")


def _sheet(answers: AnswerFiles, /, *, out: str, safety: bool = False, raters: int = 3, seed: int = 0) -> None:
    """Write a page for each rater, that opens in a browser from the file, and the key that says whose answers it shows.

    Send OUT/sheets/rater-N.html to the raters, and keep OUT/key.json from them. Each sends back what the page exports.

    Examples:
      llama-jax compare sheet ours.jsonl theirs.jsonl --out study
      llama-jax compare sheet ours.jsonl --safety --out safety-study

    Args:
      answers: A file of answers for each model, to the same prompts.
      out: The folder to write.
      safety: Have single answers rated on the paper's five points for safety, instead of pairs on its seven.
      raters: How many people rate everything.
      seed: Of sides and orders.
    """
    from llama_jax.evaluation.answer_files import read_answers
    from llama_jax.evaluation.human_sheet import HELPFULNESS, SAFETY, write_sheets

    _check_some(answers)
    print(write_sheets(read_answers(answers), out, SAFETY if safety else HELPFULNESS, raters, seed))


def _tally(
    folder: Annotated[str, arg(metavar="DIR")],
    ratings: Annotated[tuple[str, ...], arg(metavar="RATINGS.json...")],
    /,
    *,
    as_json: Json = False,
) -> None:
    """Show what the raters' files come to: wins or violations with 95 % intervals, agreement, bias, ratings of the models.

    Examples:
      llama-jax compare tally study ratings-*.json
      llama-jax compare tally study ratings-*.json --json

    Args:
      folder: What compare sheet wrote, with key.json.
      ratings: The files that raters' pages exported.
      as_json: Print JSON.
    """
    from llama_jax.evaluation.human_tally import read_key, read_ratings, tally, tally_sections

    key = read_key(folder)
    found = tally(key, read_ratings(ratings, key))
    print(json.dumps(found) if as_json else "\n\n".join(tally_sections(found)))


def _judge(
    answers: AnswerFiles,
    /,
    *,
    judge: str,
    out: str,
    batch_size: int = 32,
    int8: bool = False,
    mesh: str | None = None,
    as_json: Json = False,
) -> None:
    """Have a chat model compare the answers, each pair in both orders; what is stopped goes on when it is started again.

    Examples:
      llama-jax compare judge ours.jsonl theirs.jsonl --judge Llama-2-70b-chat-hf --out judged

    Args:
      answers: A file of answers for each model, to the same prompts.
      judge: A checkpoint of a model that was tuned in Llama 2's chat format.
      out: The folder to write, with judgements.jsonl.
      batch_size: Questions that are saved together.
      int8: Keep the judge's weights in 8 bits, half the memory of bfloat16.
      mesh: Devices for it to lie on, such as auto or tensor=4; one if not given.
      as_json: Print JSON.
    """
    from llama_jax.evaluation.pairwise_judge import JudgeConfig, judge_answers, judge_sections, llama_judge

    def load():
        from llama_jax.generation.llama import Llama
        from llama_jax.text.chat import Llama2Chat

        return llama_judge(Llama.load(judge, mesh=mesh, int8=int8), Llama2Chat())

    _check_some(answers)
    found = judge_answers(JudgeConfig(answers, judge, out, batch_size), load)
    print(json.dumps(found) if as_json else "\n\n".join(judge_sections(found)))


def _check_some(answers: tuple[str, ...]) -> None:
    if not answers:
        raise UserError("no file of answers given; name one for each model, such as ours.jsonl theirs.jsonl")
