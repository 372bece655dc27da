"""For how many turns a model holds an instruction that it was given in the first alone (paper 3.3's table of turns)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_jax.data.constraints import with_instruction
from llama_jax.errors import UserError
from llama_jax.generation.replies import reply_to
from llama_jax.text.chat import Llama2Chat, Message, Template

if TYPE_CHECKING:
    from llama_jax.generation.llama import Llama

# Of the paper's answers at these turns, those in which people found the instruction held: before and after GAtt. It does
# not say whether its turns are messages (turn 2 is then the first answer) or, as here, pairs of question and answer.
PAPER = {2: (1.0, 1.0), 4: (0.1, 1.0), 6: (0.0, 1.0), 20: (0.0, 1.0)}


@dataclass(frozen=True)
class Held:
    """How often an instruction was held, by turn."""

    held: dict[int, int]
    """Of the answers at a turn, those that hold it."""
    answers: dict[int, int]
    """Answers at a turn: dialogues that reached it before the context was full."""

    def share(self, turn: int) -> float | None:
        """Which share of the answers at a turn holds it; None if no dialogue reached it."""
        return self.held[turn] / self.answers[turn] if self.answers[turn] else None


def held_by_turn(
    llama: "Llama",
    instructions: Sequence[str],
    questions: Sequence[Sequence[str]],
    is_held: Callable[[int, int, str], bool],
    *,
    turns: Sequence[int] = tuple(PAPER),
    template: Template | None = None,
    as_system: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int = 0,
    batch: int = 16,
) -> Held:
    """Asks a model every question of every dialogue, its own answers between them, the instruction before the first.

    Args:
      llama: the model.
      instructions: one for each dialogue; an empty one is none.
      questions: of each dialogue; as many as the last turn, or more.
      is_held: says of dialogue, turn and answer whether the answer holds the instruction; both numbers as in `turns`
        and from 0 for dialogues.
      turns: those whose answers are judged; 1 is the one with the instruction.
      template: the format that the model was trained with; Llama 2's if none.
      as_system: give the instruction as the system message.
      max_new_tokens: of an answer; so many must be free in the context, or the dialogue ends there.
      temperature: as in `Llama.generate`, like top_p; by default the likeliest answer is taken.
      seed: of the answers, at temperatures above 0.
      batch: dialogues that are answered side by side.

    Raises:
      UserError: fewer questions than turns, or one that cannot be encoded.
    """
    last = max(turns)
    if len(instructions) != len(questions):
        raise UserError(f"{len(instructions)} instructions for {len(questions)} dialogues; expected one for each")
    for dialogue, asked in enumerate(questions):
        if len(asked) < last:
            raise UserError(f"dialogue {dialogue} has {len(asked)} questions, and turn {last} is asked about")
    held, answers = dict.fromkeys(turns, 0), dict.fromkeys(turns, 0)
    for first in range(0, len(questions), batch):
        going = {d: _begin(instructions[d], as_system) for d in range(first, min(first + batch, len(questions)))}
        for turn in range(1, last + 1):
            for dialogue, messages in going.items():
                told = instructions[dialogue] if turn == 1 and not as_system else ""
                question = questions[dialogue][turn - 1]
                messages.append(Message("user", with_instruction(told, question) if told else question))
            replies = reply_to(
                llama,
                list(going.values()),
                template or Llama2Chat(),
                seeds=[seed + dialogue * last + turn for dialogue in going],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
            )
            said = dict(zip(list(going), replies, strict=True))
            going = {d: messages for d, messages in going.items() if said[d].ended != "no room"}
            for dialogue, messages in going.items():
                messages.append(Message("assistant", said[dialogue].text))
                if turn in held:
                    answers[turn] += 1
                    held[turn] += bool(is_held(dialogue, turn, said[dialogue].text))
    return Held(held, answers)


def table(measured: dict[str, Held]) -> str:
    """Measurements, by name, of the same turns, beside the paper's, in Markdown."""
    turns = list(next(iter(measured.values())).held)
    names = [*measured, "paper, baseline", "paper, GAtt"]
    lines = ["| turn | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for turn in turns:
        shares = [*(held.share(turn) for held in measured.values()), *PAPER.get(turn, (None, None))]
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        lines.append(f"| {turn} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _begin(instruction: str, as_system: bool) -> list[Message]:
    return [Message("system", instruction)] if as_system and instruction else []
