"""The model's side of the safety benchmarks: texts and dialogues in, continuations, log-probabilities and answers out.

What is too long for the model's context loses its beginning, so much that the continuation has its room; BOS stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.errors import UserError
from llama_jax.evaluation.engine import Engine
from llama_jax.evaluation.safety_config import Decoding
from llama_jax.evaluation.safety_paper_values import PaperModel, nearest_model
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import Sampling
from llama_jax.text.chat import Message, Template, encode_prompt

Dialogue = Sequence[Message]


@dataclass(frozen=True)
class SafetyModel:
    """A model as the benchmarks need it; any functions will do. The last argument of those that ask it says for what, beside
    the progress."""

    name: str
    """Of its checkpoint."""
    paper: PaperModel
    """Whose numbers stand beside its."""
    generate: Callable[[Sequence[str], str], list[str]]
    """The continuation of each prompt."""
    log_probs: Callable[[Sequence[str], Sequence[str], str], list[float]]
    """The log-probability, in nats, of each continuation behind its prompt."""
    answer: Callable[[Sequence[Dialogue], str], list[str]]
    """The next answer of each dialogue."""
    count_cut: Callable[[Sequence[str]], int] = lambda prompts: 0
    """How many prompts lose their beginning."""
    count_cut_pairs: Callable[[Sequence[str], Sequence[str]], int] = lambda prompts, continuations: 0
    """How many prompts do before their continuations."""
    has_room: Callable[[Dialogue], bool] = lambda dialogue: True
    """Whether the context holds a dialogue and an answer of full length."""
    seed: int = 0
    """Of all that is drawn, examples too."""


def make_safety_model(
    engine: Engine, name: str, *, is_chat: bool, template: Template, decoding: Decoding
) -> SafetyModel:
    """A model of this project.

    Args:
      engine: asks the model.
      name: of the checkpoint.
      is_chat: whether it is to be compared with the paper's chat models or with its base models.
      template: in which it reads dialogues.
      decoding: how it answers.
    """
    llama, sampling = engine.llama, Sampling(decoding.temperature, decoding.top_p, 0)

    def generate(prompts: Sequence[str], what: str) -> list[str]:
        ids = [_ids(llama, prompt, decoding.max_new_tokens)[0] for prompt in prompts]
        return engine.complete(ids, max_new_tokens=decoding.max_new_tokens, sampling=sampling, what=what)

    def log_probs(prompts: Sequence[str], continuations: Sequence[str], what: str) -> list[float]:
        pairs = [_pair(llama, *pair) for pair in zip(prompts, continuations, strict=True)]
        scores = engine.score([before for before, _, _ in pairs], [said for _, said, _ in pairs], what)
        return [score.log_prob for score in scores]

    def answer(dialogues: Sequence[Dialogue], what: str) -> list[str]:
        return answers_to(engine, dialogues, template, sampling, decoding.max_answer_tokens, what)

    def has_room(dialogue: Dialogue) -> bool:
        return len(encode_prompt(llama.tokenizer, dialogue, template)) + decoding.max_answer_tokens <= engine.context

    return SafetyModel(
        name,
        nearest_model(llama.model.config.n_params, is_chat),
        generate,
        log_probs,
        answer,
        lambda prompts: sum(_ids(llama, prompt, decoding.max_new_tokens)[1] for prompt in prompts),
        lambda prompts, texts: sum(_pair(llama, *pair)[2] for pair in zip(prompts, texts, strict=True)),
        has_room,
        engine.seed,
    )


def answers_to(
    engine: Engine,
    dialogues: Sequence[Dialogue],
    template: Template,
    sampling: Sampling,
    max_new_tokens: int,
    what: str,
) -> list[str]:
    """The next answer of each dialogue, as in a conversation: up to the first of the template's tags, and no space around it.

    Args:
      engine: asks the model.
      dialogues: each ends with the user's turn, and leaves room for an answer.
      template: in which the model reads them.
      sampling: how to draw.
      max_new_tokens: of an answer.
      what: for the line that shows progress.

    Raises:
      UserError: a dialogue that cannot be encoded, or a setting out of range.
      Preempted: told to stop; what was answered is kept.
    """
    prompts = [encode_prompt(engine.llama.tokenizer, dialogue, template) for dialogue in dialogues]
    settings = {"max_new_tokens": max_new_tokens, "stops": template.tags, "sampling": sampling}
    return [text.strip() for text in engine.complete(prompts, **settings, what=what)]


def _ids(llama: Llama, prompt: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """BOS and a prompt's tokens, at most as many as leave room for the continuation; and whether any were cut."""
    room = llama.model.config.context_length - max_new_tokens - 1
    if room < 1:
        raise UserError(
            f"--safety.decoding.max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{llama.model.config.context_length} tokens; lower it"
        )
    ids = llama.tokenizer.encode(prompt, bos=False)
    return [llama.tokenizer.bos_id, *ids[-room:]], len(ids) > room


def _pair(llama: Llama, prompt: str, continuation: str) -> tuple[list[int], list[int], bool]:
    """Prompt, BOS first, and continuation as tokens, parted where `Llama.score` parts texts; and whether any were cut."""
    whole = llama.tokenizer.encode(prompt + continuation, bos=False)
    start = len(llama.tokenizer.encode(prompt.rstrip(), bos=False))
    first = max(0, len(whole) - llama.model.config.context_length)  # BOS is before them, and the last is only predicted
    if first > start:
        raise UserError(
            f"an answer has {len(whole) - start} tokens and the model's context {llama.model.config.context_length}: "
            f"{continuation[:80]!r}..."
        )
    return [llama.tokenizer.bos_id, *whole[first:start]], whole[start:], first > 0
