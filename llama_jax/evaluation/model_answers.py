"""A model's answers to a file of prompts, as people or a judge compare them with another's (paper 3.4.2)."""

from pathlib import Path

from llama_jax.data.dialogues import open_rows
from llama_jax.errors import UserError
from llama_jax.evaluation.answer_files import read_prompt
from llama_jax.evaluation.kept_answers import ask_all
from llama_jax.evaluation.safety_config import Decoding
from llama_jax.evaluation.safety_model import make_answer
from llama_jax.generation.llama import Llama
from llama_jax.text.chat import BadDialogue, Template, encode_prompt
from llama_jax.training.run_folder import write_rows


def answer_prompts(
    llama: Llama, name: str, prompts: str, out: str, template: Template, decoding: Decoding, batch: int
) -> int:
    """Answers every prompt, going on where an earlier attempt stopped.

    Args:
      llama: the model.
      name: of its checkpoint; answers of another one are not gone on with.
      prompts: the file, whose rows are as `answer_files` reads them, without an answer.
      out: the file that is written: the same rows, each with its answer.
      template: the chat format.
      decoding: how the model answers.
      batch: prompts that are answered side by side.

    Returns:
      the number of prompts.

    Raises:
      UserError: a row without a prompt, or a prompt that leaves no room for its answer.
      Preempted: told to stop; what was answered is kept beside `out`.
    """
    rows, dialogues = open_rows(prompts), []
    room = llama.model.config.context_length - decoding.max_answer_tokens
    for index in range(len(rows)):
        try:
            dialogue = read_prompt(rows[index], index).dialogue
            length = len(encode_prompt(llama.tokenizer, dialogue, template))
        except BadDialogue as error:
            raise UserError(
                f"{rows.place(index)}: {error}; expected `prompt`, or `dialogue`, a list of turns"
            ) from None
        if length > room:
            raise UserError(
                f"{rows.place(index)}: the prompt has {length} tokens, and the model's context leaves {max(room, 0)} beside "
                f"an answer of {decoding.max_answer_tokens}; lower --max-new-tokens, or leave it out"
            )
        dialogues.append(dialogue)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.with_name(f"{path.name}.partial")
    recipe = {"model": name, "template": repr(template), "temperature": decoding.temperature, "top_p": decoding.top_p}
    recipe |= {"max_answer_tokens": decoding.max_answer_tokens, "seed": decoding.seed}
    said = ask_all(kept, recipe, dialogues, make_answer(llama, template, decoding), batch=batch)
    write_rows(path, (rows[index] | {"answer": text} for index, text in enumerate(said)))
    kept.unlink()
    return len(said)
