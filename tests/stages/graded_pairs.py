"""Preferences among answers of four grades, in which annotators err the more, the less the answers differ."""

import json
import random
from pathlib import Path

from tests.tiny_checkpoint import write_tiny_checkpoint

GRADED = (("dull", "bad", "poor"), ("fair", "plain", "usual"), ("good", "nice", "kind"), ("great", "grand", "superb"))
THINGS = ("tea", "car", "sky", "sea", "bus", "cat")
MISTAKES = (0.5, 0.25, 0.1, 0.0)  # of annotators, by the difference in grade


def rows(seed: int, count: int) -> list[dict]:
    """Answers of two grades; how often the better one is chosen depends on how much better it is."""
    generator = random.Random(seed)
    made = []
    while len(made) < count:
        grades = sorted(generator.randrange(4) for _ in range(2))
        worse, better = (f"a {generator.choice(GRADED[grade])} one" for grade in grades)
        if worse == better:
            continue
        strength = grades[1] - grades[0]
        chosen, rejected = (worse, better) if generator.random() < MISTAKES[strength] else (better, worse)
        prompt = f"{generator.choice(THINGS)} {generator.randrange(999)}?"
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "strength": strength})
    return made


def write(path: Path, made: list[dict]) -> str:
    """Writes rows as a file, and gives its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def write_base(folder: Path) -> Path:
    """A checkpoint whose tokenizer knows the words; context 128."""
    words = [f"{' '.join(row['prompt'] for row in rows(0, 40))} a {' '.join(sum(GRADED, ()))} one [INST] [/INST]\n"]
    return write_tiny_checkpoint(folder, words * 20, vocab_size=330, context=128)
