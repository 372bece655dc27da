"""Dialogues to ids, with a mask of the answers (paper 3.1): Llama 2's format to the id, Llama 3's, and plain pairs.

Loss falls on answers alone, so the encoder says which tokens are theirs; nobody searches a text for them afterwards.
Our choice: an answer's tokens are all that generation must produce after `encode_prompt`: whatever token holds a
character behind the prompt, and the id that ends the turn. For Llama 2 that includes the space on either side of the
answer, which the paper's loss on "answer tokens" leaves open: a model never trained to write the second one would not
know how to get from its last word to EOS.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

# Our choice: the content of the reference's default (be helpful, safe and honest), in words of our own. Off unless
# asked for, as in the reference since it was found to cause refusals of harmless questions.
DEFAULT_SYSTEM_PROMPT = (
    "Help as well as you can, and be respectful, honest and safe. Give nothing that is harmful, against the law or "
    "prejudiced. If a question makes no sense, say why instead of answering it. If you do not know something, say so "
    "and make nothing up."
)


class Message(NamedTuple):
    """What one side says in one turn."""

    role: Role
    content: str


Dialogue = tuple[Message, ...]


class Encoded(NamedTuple):
    """The ids of a dialogue and, for each, whether it is trained: part of an answer or the id that ends one."""

    ids: list[int]
    answer_mask: list[bool]


class BadDialogue(UserError):
    """A dialogue that cannot be encoded; `reason` is a few words to count it under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Template(Protocol):
    """How a dialogue becomes ids."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts that no message may hold, because they would pass for the template's own."""
        ...

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        """Encodes messages of good order; one that ends with the user is left open for an answer."""
        ...


@dataclass(frozen=True)
class Llama2Chat:
    """The reference's format: tags in plain text, and BOS and EOS around each pair of turns.

    A pair is one text, encoded by itself: `[INST] question [/INST] answer ` with its trailing space. The system
    message stands inside the first question.
    """

    begin: str = "[INST]"
    end: str = "[/INST]"
    begin_system: str = "<<SYS>>\n"
    end_system: str = "\n<</SYS>>\n\n"

    @property
    def tags(self) -> tuple[str, ...]:
        return self.begin, self.end, self.begin_system.strip(), self.end_system.strip()

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        system, pairs = _pairs(messages)
        if system is not None:
            question, answer = pairs[0]
            pairs[0] = f"{self.begin_system}{system}{self.end_system}{question}", answer
        return _joined(
            _pair(
                tokenizer,
                f"{self.begin} {question.strip()} {self.end}",
                None if answer is None else f" {answer.strip()} ",
            )
            for question, answer in pairs
        )


@dataclass(frozen=True)
class Llama3Chat:
    """Llama 3's format: a header of special ids before each turn, and a special id after it.

    The ids are Llama 3's own; our tokenizer is SentencePiece, whose special ids are given here instead.
    """

    bos: int = 128_000
    start_header: int = 128_006
    end_header: int = 128_007
    end_of_turn: int = 128_009

    @property
    def tags(self) -> tuple[str, ...]:
        return ()  # its marks are ids, which no text becomes

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        parts = [_control(self.bos)]
        for role, content in messages:
            answers = role == "assistant"
            ids = [*tokenizer.encode(content.strip(), bos=False), self.end_of_turn]
            parts += [self._header(tokenizer, role), Encoded(ids, [answers] * len(ids))]
        if messages[-1].role == "user":
            parts.append(self._header(tokenizer, "assistant"))
        return _joined(parts)

    def _header(self, tokenizer: Tokenizer, role: Role) -> Encoded:
        name, gap = (tokenizer.encode(text, bos=False) for text in (role, "\n\n"))
        return _control(self.start_header, *name, self.end_header, *gap)


@dataclass(frozen=True)
class Plain:
    """Prompt, separator and completion as one text between BOS and EOS, nothing stripped; several pairs one by one.

    Our choice: a newline separates, as it is a token of its own, so that no token holds both question and answer (the
    paper's special token is not named). A system message goes before the first prompt, with a separator between.
    """

    separator: str = "\n"

    @property
    def tags(self) -> tuple[str, ...]:
        return ()

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        system, pairs = _pairs(messages)
        if system is not None:
            question, answer = pairs[0]
            pairs[0] = system + self.separator + question, answer
        return _joined(_pair(tokenizer, question + self.separator, answer) for question, answer in pairs)


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Template, answers: Literal["all", "last"] = "all"
) -> Encoded:
    """Encodes a finished dialogue for training, every answer of it trained, or the last alone (paper 3.3).

    Raises:
      BadDialogue: the roles are not ([system,] user, assistant, ... user, assistant), or a message holds one of the
        template's tags, such as [INST]. (The reference answers the latter with a fixed line instead.)
    """
    check_dialogue(messages, template, last="assistant")
    encoded = template.encode(tokenizer, messages)
    return encoded if answers == "all" else _last_answer(encoded)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: Template) -> list[int]:
    """Encodes a dialogue that waits for its answer: it ends with the user's turn.

    Raises:
      BadDialogue: as `encode_dialogue`, with the user last.
    """
    check_dialogue(messages, template, last="user")
    return template.encode(tokenizer, messages).ids


def shown(tokenizer: Tokenizer, encoded: Encoded, marks: tuple[str, str] = ("\x1b[32m", "\x1b[0m")) -> str:
    """The text of a dialogue as the model reads it, BOS and EOS spelled out, what is trained between marks (green)."""
    text = ""
    for trained, run in itertools.groupby(zip(*encoded, strict=True), key=lambda pair: pair[1]):
        stream = tokenizer.stream(continues=True)
        parts = [
            "<s>" if i == tokenizer.bos_id else "</s>" if i == tokenizer.eos_id else stream.push(i) for i, _ in run
        ]
        body = "".join(parts) + stream.finish()
        text += f"{marks[0]}{body}{marks[1]}" if trained else body
    return text


def with_system(messages: Sequence[Message], system: str = DEFAULT_SYSTEM_PROMPT) -> Dialogue:
    """Puts a system message first where there is none; an empty one changes nothing."""
    has_one = bool(messages) and messages[0].role == "system"
    return tuple(messages) if has_one or not system else (Message("system", system), *messages)


def check_dialogue(messages: Sequence[Message], template: Template, *, last: Role) -> None:
    """Raises BadDialogue for roles out of order or for one of the template's tags in a message."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or turns != expected or turns[-1] != last:
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise BadDialogue(
            "wrong roles",
            f"The roles of the dialogue are {shown or 'none'}. Expected user and assistant in turn, first the user "
            f"(after a system message, if any) and last the {last}.",
        )
    for number, message in enumerate(messages):
        for tag in template.tags:
            if tag in message.content:
                raise BadDialogue(
                    "tag in a message",
                    f"Message {number + 1} of the dialogue ({message.role}) holds {tag!r}, which the chat format uses "
                    "to tell whose turn it is. Remove it from the text.",
                )


def _pairs(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """Gives the system message and the pairs of question and answer, the last answer None if it is to come."""
    system = messages[0].content if messages[0].role == "system" else None
    turns: list[str | None] = [content for role, content in messages if role != "system"]
    turns += [None] * (len(turns) % 2)
    return system, list(zip(turns[::2], turns[1::2], strict=True))


def _pair(tokenizer: Tokenizer, prompt: str, answer: str | None) -> Encoded:
    """BOS, prompt and answer as one text, EOS; or BOS and the prompt alone."""
    if answer is None:
        return _control(*tokenizer.encode(prompt))
    ids, untrained = tokenizer.encode_continued(prompt, answer)
    mask = [False] * (1 + untrained) + [True] * (len(ids) - untrained + 1)
    return Encoded([tokenizer.bos_id, *ids, tokenizer.eos_id], mask)


def _control(*ids: int) -> Encoded:
    return Encoded(list(ids), [False] * len(ids))


def _last_answer(encoded: Encoded) -> Encoded:
    """The same ids, of whose answers only the last is trained: what stands behind the last untrained id, which is the
    last of that answer's prompt.
    """
    ids, mask = encoded
    behind = mask[::-1].index(False)
    return Encoded(ids, [False] * (len(ids) - behind) + [True] * behind)


def _joined(parts: Iterable[Encoded]) -> Encoded:
    ids, mask = [], []
    for part in parts:
        ids += part.ids
        mask += part.answer_mask
    return Encoded(ids, mask)
