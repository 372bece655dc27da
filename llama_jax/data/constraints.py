"""Instructions that a whole dialogue should hold, for ghost attention (paper 3.3): hobbies, languages, public figures.

An instruction combines constraints of different kinds. For sampling it stands in every question; for training in the
first alone, half the time in its short form. Our choices, where the paper says only "randomly": one constraint of every
number of kinds is equally likely, as is every value of a kind, and kinds come in any order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.chat import Dialogue, Message, Template, check_dialogue


@dataclass(frozen=True)
class Kind:
    """One thing that an instruction may ask for; `{}` stands for its value."""

    name: str
    long: str
    """The whole sentence."""
    short: str
    """The same in a few words."""
    values: tuple[str, ...]

    def __post_init__(self):
        """Raises UserError for what no instruction can be made of."""
        for form in (self.long, self.short):
            if form.count("{}") != 1:
                raise UserError(f"{self.name}: {form!r} should hold {{}} once, where the value goes")
        if not self.values or not all(isinstance(value, str) and value.strip() for value in self.values):
            raise UserError(f"{self.name}: expected a list of texts, and one at least, found {list(self.values)}")


# Our choice: the lists are not in the paper; those of hobbies and figures were written by its own model.
KINDS = (
    Kind(
        "hobby",
        "You enjoy {}, and your answers show it.",
        "Hobby: {}.",
        (
            *("tennis", "chess", "gardening", "cooking", "painting", "sailing", "fishing", "astronomy", "hiking"),
            *("cycling", "photography", "knitting", "dancing", "climbing", "surfing", "pottery", "magic tricks"),
            *("bird watching", "stamp collecting", "playing the piano"),
        ),
    ),
    Kind(
        "language",
        "Always answer in {}.",
        "Language: {}.",
        ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch", "Swedish", "Polish", "Japanese", "English"),
    ),
    Kind(
        "figure",
        "Always act as {} from now on.",
        "Figure: {}.",
        (
            *("Napoleon", "Albert Einstein", "Marie Curie", "William Shakespeare", "Cleopatra", "Julius Caesar"),
            *("Leonardo da Vinci", "Isaac Newton", "Charles Darwin", "Jane Austen", "Wolfgang Amadeus Mozart"),
            *("Ludwig van Beethoven", "Vincent van Gogh", "Frida Kahlo", "Joan of Arc", "Abraham Lincoln"),
            *("Nelson Mandela", "Mahatma Gandhi", "Florence Nightingale", "Socrates"),
        ),
    ),
)


@dataclass(frozen=True)
class Instruction:
    """What one dialogue should hold from its first turn to its last."""

    constraints: tuple[tuple[str, str], ...]
    """Kind and value of each."""
    text: str
    """In whole sentences, as every question has it for sampling."""
    short: str
    """In a few words."""
    shortened: bool
    """Whether training has the short form."""

    @property
    def given(self) -> str:
        """What the first question has for training."""
        return self.short if self.shortened else self.text


def draw_instruction(kinds: Sequence[Kind], most: int, seed: int, number: int) -> Instruction:
    """Draws a dialogue's instruction of up to `most` constraints; it depends on seed and number and on nothing else."""
    # By raw words: NumPy promises that these never change, unlike what its generators make of them.
    words = np.random.SeedSequence([seed & 0xFFFFFFFF, number]).generate_state(2 + 2 * len(kinds)).tolist()
    coin, count, orders, picks = words[0], words[1], words[2 : 2 + len(kinds)], words[2 + len(kinds) :]
    order = sorted(range(len(kinds)), key=lambda i: orders[i])[: 1 + count % min(most, len(kinds))]
    chosen = [(kinds[i], kinds[i].values[picks[i] % len(kinds[i].values)]) for i in order]
    return Instruction(
        tuple((kind.name, value) for kind, value in chosen),
        " ".join(kind.long.replace("{}", value) for kind, value in chosen),
        " ".join(kind.short.replace("{}", value) for kind, value in chosen),
        bool(coin % 2),
    )


def with_instruction(instruction: str, text: str) -> str:
    """An instruction and a question as one message. Our choice: the instruction first."""
    return f"{instruction} {text}"


def for_sampling(instruction: Instruction, questions: Sequence[str], replies: Sequence[str]) -> Dialogue:
    """A dialogue that waits for the answer behind `replies`: its instruction stands in every question so far."""
    told = [with_instruction(instruction.text, question) for question in questions[: len(replies) + 1]]
    return _in_turn(told, replies)


def for_training(
    instruction: Instruction, questions: Sequence[str], replies: Sequence[str], as_system: bool
) -> Dialogue:
    """The same dialogue with its replies, the instruction in the first turn alone, in the form that was drawn for it.

    Args:
      instruction: of the dialogue.
      questions: of it; those behind the last reply are left out.
      replies: what the model said.
      as_system: make the instruction the system message, which chat formats put into the first turn, and not a part of
        the first question.
    """
    asked = list(questions[: len(replies)])
    if as_system:
        return (Message("system", instruction.given), *_in_turn(asked, replies))
    return _in_turn([with_instruction(instruction.given, asked[0]), *asked[1:]], replies)


def read_kinds(path: str | Path) -> tuple[Kind, ...]:
    """Reads lists from a JSON file: an object with, by kind, a list of values, or an object of values, long and short.

    A kind that is not built in needs both forms: {"persona": {"values": ["a pirate"], "long": "Act as {}.", "short":
    "Persona: {}."}}. Kinds that the file does not name are not used.

    Raises:
      UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the constraints in {path} ({error.strerror}); name another file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the constraints in {path} are not JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path}: expected an object such as {{"hobby": ["tennis", "chess"], "language": ["French"]}}')
    try:
        return tuple(_read_kind(name, given) for name, given in content.items())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def kinds_as_json(kinds: Sequence[Kind]) -> bytes:
    """Lists as a file that `read_kinds` reads."""
    lists = {kind.name: {"values": kind.values, "long": kind.long, "short": kind.short} for kind in kinds}
    return json.dumps(lists, indent=2, ensure_ascii=False).encode()


def with_values(kinds: Sequence[Kind], values: Mapping[str, Sequence[str]]) -> tuple[Kind, ...]:
    """The kinds with other values where some are given."""
    return tuple(replace(kind, values=tuple(values.get(kind.name, kind.values))) for kind in kinds)


def check_kinds(kinds: Sequence[Kind], template: Template) -> None:
    """Raises UserError for a list whose values no message may hold, such as [INST]."""
    for kind in kinds:
        try:
            for text in (kind.long, kind.short, *kind.values):
                check_dialogue([Message("user", text)], template, last="user")
        except UserError as error:
            raise UserError(f"the constraints of kind {kind.name}: {error}") from None


def _in_turn(questions: Sequence[str], replies: Sequence[str]) -> Dialogue:
    """Questions and replies one after the other; the last question may wait for its reply."""
    pairs = zip(questions, [*replies, None][: len(questions)], strict=True)
    return tuple(
        message
        for question, reply in pairs
        for message in (Message("user", question), Message("assistant", reply))
        if message.content is not None
    )


def _read_kind(name: str, given: object) -> Kind:
    known = {kind.name: kind for kind in KINDS}.get(name)
    given = {"values": given} if isinstance(given, list) else given
    if not isinstance(given, dict) or not isinstance(given.get("values"), list):
        raise UserError(f"{name}: expected a list of values, or an object with values, long and short")
    forms = {form: given.get(form, known and getattr(known, form)) for form in ("long", "short")}
    if unknown := sorted(given.keys() - {"values", *forms}):
        raise UserError(f"{name}: {', '.join(unknown)} is none of values, long and short")
    for form, text in forms.items():
        if not isinstance(text, str):
            raise UserError(
                f'{name} is not built in ({", ".join(kind.name for kind in KINDS)} are), so it needs "{form}", a text '
                "with {} where the value goes"
            )
    return Kind(name, forms["long"], forms["short"], tuple(given["values"]))
