"""A conversation with a model (paper 3.1's chat format): who said what, what of it still fits, and the next answer.

Every answer is that of a fresh generation from the whole conversation as the template encodes it. The keys and values of
what was said are kept, so that an answer's first word waits for the new message to be read, and for no older one.
Our choices, where the reference says nothing or stops:
- An answer is what the model said without the white space around it, and ends where one of the template's tags begins:
  a model that goes on with the user's next turn is cut off, and its conversation stays one that can be encoded.
- What no longer fits is forgotten from its oldest turn on; the system prompt stays. A quarter of the context, or
  max_new_tokens if that is less, is kept free for the answer.
- An answer that is interrupted stays in the history as far as it was given out; if nothing was, its question goes too.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.errors import UserError
from llama_jax.generation.cache import Kept
from llama_jax.text.chat import Dialogue, Message, Template, check_dialogue, encode_prompt
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.run_folder import write_whole

if TYPE_CHECKING:
    from llama_jax.generation.llama import Llama

Turn = tuple[str, str]  # a question and its answer


class Chat:
    """A conversation under way; `Llama.chat` begins one."""

    def __init__(
        self,
        llama: "Llama",
        template: Template,
        system: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
    ):
        """Begins an empty conversation.

        Args:
          llama: the model that answers; `chat.llama` from then on.
          template: how a dialogue becomes ids; it must be the one that the model was trained with.
          system: stands before the whole conversation; none if None or empty.
          max_new_tokens: of an answer; if none, only EOS and the end of the context stop it.
          temperature: as in `Llama.generate`, like top_p and top_k.
          seed: the same seed and the same calls give the same conversation; each answer draws with a seed of its own.

        Raises:
          UserError: a setting out of range, or a system prompt that holds one of the template's tags.
        """
        self.llama, self._template, self._seed = llama, template, seed
        self._context = llama.model.config.context_length
        self._settings = {
            "max_new_tokens": self._context if max_new_tokens is None else max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }
        llama.stream("", **self._settings)  # computes nothing until it is read, but refuses wrong settings now
        self._turns: list[Turn] = []
        self._drawn = 0
        self._kept = Kept()
        self.system = system

    @property
    def system(self) -> str | None:
        """The system prompt; another one, or None, holds from the next answer on. Raises UserError as the constructor."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text:
            check_dialogue([Message("system", text), Message("user", "")], self._template, last="user")
        self._system = text or None

    @property
    def history(self) -> Dialogue:
        """The whole conversation, forgotten turns too, the system prompt first."""
        return self._messages(self._turns)

    @property
    def forgotten(self) -> int:
        """How many turns, a question with its answer each, the model no longer saw at the last: the oldest of `history`."""
        return self._fitting(self._turns[:-1], self._turns[-1][0])[0] if self._turns else 0

    @property
    def context(self) -> tuple[int, int]:
        """How many tokens of the context the conversation takes, and how many there are."""
        seen = self._messages(self._turns[self.forgotten :])
        ids = self._template.encode(self.llama.tokenizer, seen).ids if self._turns else []
        return min(len(ids), self._context), self._context

    def send(self, text: str) -> str:
        """Says something and gives the whole answer. Raises UserError as `stream`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Says something and gives the answer piece by piece; the history grows as the pieces are taken.

        Raises:
          UserError: at once, and nothing is changed: the text holds one of the template's tags, or does not fit the
            context together with the system prompt.
        """
        return self._answer(len(self._turns), text)

    def regenerate(self) -> str:
        """Gives another answer to the last question, in place of the old one. Raises UserError before the first."""
        return "".join(self.stream_again())

    def stream_again(self) -> Iterator[str]:
        """As `regenerate`, piece by piece; the old answer goes when the first piece comes."""
        if not self._turns:
            raise UserError("there is no answer yet to give again; say something first")
        return self._answer(len(self._turns) - 1, self._turns[-1][0])

    def reset(self) -> None:
        """Begins anew with the same system prompt; the answers draw on, so that the same question may get another."""
        self._turns = []

    def save(self, path: str | Path) -> None:
        """Writes the conversation as one line of JSON; with its "messages" it is a line of training data, too.

        Raises:
          UserError: it cannot be written there.
        """
        messages = [{"role": role, "content": content} for role, content in self.history]
        saved = {"messages": messages, "answers_drawn": self._drawn}
        try:
            write_whole(Path(path), (json.dumps(saved, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write the conversation to {path} ({error.strerror}); name another file") from error

    def load(self, path: str | Path) -> None:
        """Goes on with a saved conversation in place of this one; the settings, the seed among them, stay as they are.

        With the settings that it was saved under, the next answer is the one it would have got.

        Raises:
          UserError: no such file, or not a conversation that this template can encode; this one is then unchanged.
        """
        messages, drawn = _read(Path(path))
        check_dialogue([*messages, Message("user", "")], self._template, last="user")
        has_system = messages[:1] != [] and messages[0].role == "system"
        said = [message.content for message in messages[has_system:]]
        self._system = messages[0].content if has_system else None
        self._turns = list(zip(said[::2], said[1::2], strict=True))
        self._drawn = drawn

    def _answer(self, place: int, question: str) -> Iterator[str]:
        """Answers a question that follows the first `place` turns, and puts it and its answer there."""
        turns = self._turns  # an answer still being read after `reset` or `load` goes on with the old conversation
        _, ids = self._fitting(turns[:place], question)
        if len(ids) >= self._context:
            raise UserError(
                f"the message{' and the system prompt take' if self._system else ' takes'} {len(ids)} tokens, and the "
                f"model's context of {self._context} must hold an answer too; shorten it"
            )
        # A seed of 32 bits for each answer, independent of the others'.
        seed = int(np.random.SeedSequence([self._seed & 0xFFFFFFFF, self._drawn]).generate_state(1)[0])
        self._drawn += 1
        pieces = self.llama.stream(ids, seed=seed, kept=self._kept, **self._settings)

        def said() -> Iterator[str]:
            answer = ""
            for piece in spoken(pieces, self._template.tags):
                answer += piece
                turns[place:] = [(question, answer)]
                yield piece
            turns[place:] = [(question, answer)]

        return said()

    def _fitting(self, before: list[Turn], question: str) -> tuple[int, list[int]]:
        """How many turns before a question must go to leave room for its answer, and the ids of the question and the others."""
        room = min(self._settings["max_new_tokens"], self._context // 4)

        def ids(forgotten: int) -> list[int]:
            messages = *self._messages(before[forgotten:]), Message("user", question)
            return encode_prompt(self.llama.tokenizer, messages, self._template)

        forgotten = bisect_left(range(len(before)), True, key=lambda n: len(ids(n)) + room <= self._context)
        return forgotten, ids(forgotten)

    def _messages(self, turns: Sequence[Turn]) -> Dialogue:
        system = [Message("system", self._system)] if self._system else []
        pairs = ((Message("user", question), Message("assistant", answer)) for question, answer in turns)
        return *system, *(message for pair in pairs for message in pair)


def spoken(pieces: Iterator[str], tags: Sequence[str]) -> Iterator[str]:
    """The same text in pieces, without the white space around it, and up to the first of the tags."""
    held, begun = "", False
    for piece in pieces:
        held = held + piece if begun else (held + piece).lstrip()
        end = min((at for tag in tags if (at := held.find(tag)) >= 0), default=None)
        if end is not None:
            held = held[:end]
            break
        # White space may turn out to be the last, and what begins a tag to be one.
        partial = max((n for tag in tags for n in range(1, len(tag)) if held.endswith(tag[:n])), default=0)
        if text := held[: len(held) - partial].rstrip():
            yield text
            held, begun = held[len(text) :], True
    if text := held.rstrip():
        yield text


def spoken_text(tokenizer: Tokenizer, template: Template, ids: Sequence[int], ended: bool) -> str:
    """What drawn tokens say, as `spoken` has it.

    Args:
      tokenizer: of the model.
      template: of the dialogue.
      ids: the drawn tokens; with the EOS that ended them, where `ended`.
      ended: whether the last of them is that.
    """
    stream = tokenizer.stream(continues=True)
    text = "".join(map(stream.push, ids[:-1] if ended else ids)) + stream.finish()
    return "".join(spoken(iter([text]), template.tags))


def _read(path: Path) -> tuple[list[Message], int]:
    """The messages in a file, and how many answers were drawn for them. Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read a conversation from {path} ({error.strerror})") from error
    try:
        saved = json.loads(content)
        messages = [Message(turn["role"], turn["content"]) for turn in saved["messages"]]
        drawn = saved.get("answers_drawn", 0)
        is_whole = all(isinstance(text, str) for message in messages for text in message) and drawn >= 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise UserError(
            f'{path} is no conversation; expected what /save writes: {{"messages": [{{"role": "user", "content": '
            '"..."}, {"role": "assistant", "content": "..."}]}'
        )
    return messages, int(drawn)
