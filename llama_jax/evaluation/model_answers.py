"""A model's answers to a file of prompts, as people or a judge compare them with another's (paper 3.4.2)."""

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax

from llama_jax.config import LlamaConfig
from llama_jax.conversion.convert import open_pinned
from llama_jax.data.dialogues import Rows, open_rows
from llama_jax.errors import UserError
from llama_jax.evaluation.answer_files import read_prompt
from llama_jax.evaluation.engine import ANSWERS, Answers, Engine
from llama_jax.evaluation.safety_model import answers_to
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import Sampling
from llama_jax.parallel import distributed
from llama_jax.text.chat import BadDialogue, Dialogue, Llama2Chat, Plain, Template, encode_prompt
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.run_folder import find_recipe, make_folder, without, write_recipe, write_rows

STAGE = "compare answer"


@dataclass(frozen=True)
class AnswerConfig:
    """Which model answers what, and how."""

    checkpoint: str
    """The model, of any form."""
    prompts: str
    """The file, whose rows are as `answer_files` reads them, without an answer."""
    out: str
    """The file that is written: the same rows, each with its answer."""
    temperature: float = 0.6
    """Divides the logits."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that together hold this probability."""
    max_new_tokens: int = 512
    """Of an answer."""
    seed: int = 0
    """Of the answers."""
    plain: bool = False
    """Prompt and completion as plain text, instead of in Llama 2's chat format."""
    rows: int = 32
    """Prompts that are answered at once."""
    int8: bool = False
    """Keep the weights in 8 bits."""
    mesh: str | None = None
    """Devices to lie on, such as auto or tensor=4; one if none."""


def answer_prompts(config: AnswerConfig) -> int:
    """Answers every prompt, going on where an earlier attempt stopped.

    Returns:
      the number of prompts.

    Raises:
      UserError: a row without a prompt, a prompt that leaves no room for its answer, or answers beside `out` that were begun
        with another recipe.
      Preempted: told to stop; what was answered is kept beside `out`.
    """
    distributed.initialize()
    template: Template = Plain() if config.plain else Llama2Chat()
    checkpoint, model, tokenizer = open_pinned(config.checkpoint)
    rows = open_rows(config.prompts)
    dialogues = _dialogues(rows, model, tokenizer, template, config.max_new_tokens)
    folder = Path(f"{config.out}.partial")
    if jax.process_index() == 0:
        found, kept = find_recipe(folder, STAGE, "auto"), folder / ANSWERS
        make_folder(folder)
        recipe = without(config, ("prompts", "out", "rows", "mesh")) | {"checkpoint": str(checkpoint)}
        has_answers = kept.exists() and kept.stat().st_size > 0  # without any, another recipe spoils nothing
        write_recipe(folder, STAGE, config, recipe, found if has_answers else None)
    llama = Llama.load(checkpoint, mesh=config.mesh, int8=config.int8)
    with closing(Answers(folder / ANSWERS)) as answers:
        engine = Engine(llama, answers, rows=config.rows, seed=config.seed)
        sampling = Sampling(config.temperature, config.top_p, 0)
        said = answers_to(engine, dialogues, template, sampling, config.max_new_tokens, "answering")
    if jax.process_index() == 0:
        write_rows(Path(config.out), (rows[index] | {"answer": text} for index, text in enumerate(said)))
        shutil.rmtree(folder)
    return len(said)


def _dialogues(
    rows: Rows, model: LlamaConfig, tokenizer: Tokenizer, template: Template, max_new_tokens: int
) -> list[Dialogue]:
    """The prompts of all rows, of which each leaves room for its answer."""
    dialogues, room = [], model.context_length - max_new_tokens
    for index in range(len(rows)):
        try:
            dialogue = read_prompt(rows[index], index).dialogue
            length = len(encode_prompt(tokenizer, dialogue, template))
        except BadDialogue as error:
            raise UserError(
                f"{rows.place(index)}: {error}; expected `prompt`, or `dialogue`, a list of turns"
            ) from None
        if length > room:
            raise UserError(
                f"{rows.place(index)}: the prompt has {length} tokens, and the model's context leaves {max(room, 0)} beside "
                f"an answer of {max_new_tokens}; lower --max-new-tokens, or leave it out"
            )
        dialogues.append(dialogue)
    return dialogues
