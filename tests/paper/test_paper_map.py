"""docs/paper.md has every table and figure of the paper once, with the commands that the program prints, which exist."""

import re
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.evaluation.paper_tables import COMMANDS, LAST_TABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text()
LAST_FIGURE = 33


def items(kind: str) -> dict[int, tuple[str, str]]:
    """Command and notes of each number; a row may stand for several."""
    found: dict[int, tuple[str, str]] = {}
    for line in PAGE.splitlines():
        if not (start := re.match(rf"\| {kind}s? (\d+)(?: to (\d+))?(?: \(appendix\))? \|", line)):
            continue
        _, _, command, notes = (cell.strip() for cell in line.strip("|").split("|"))
        first, last = int(start[1]), int(start[2] or start[1])
        assert not found.keys() & set(range(first, last + 1)), line
        assert not command or re.fullmatch(r"`[^`]+`", command), line
        found |= dict.fromkeys(range(first, last + 1), (command, notes))
    return found


@pytest.mark.parametrize(("kind", "last"), [("Table", LAST_TABLE), ("Figure", LAST_FIGURE)])
def test_every_item_is_there_once_with_a_command_or_a_reason(kind, last):
    found = items(kind)
    assert list(found) == list(range(1, last + 1))
    for number, (command, notes) in found.items():
        assert command or len(notes.split()) >= 4, f"{kind} {number} has neither command nor reason"


def test_the_page_names_the_commands_that_the_program_prints():
    assert {number: command.strip("`") for number, (command, _) in items("Table").items() if command} == COMMANDS


def test_every_command_exists():
    commands = re.findall(r"`((?:llama-jax|python) [^`]+)`", PAGE)
    named = {command.strip("`") for kind in ("Table", "Figure") for command, _ in items(kind).values() if command}
    assert named <= set(commands)
    for command in commands:
        if command.startswith("llama-jax"):
            assert command.split()[1] in cli.VERBS, command
        else:
            module = re.match(r"python -m (experiments\.\w+)", command)
            assert module and (ROOT / f"{module[1].replace('.', '/')}.py").is_file(), command
