"""Ghost Attention (paper 3.3, its table of turns 2/4/6/20) at toy scale: what is forgotten without it is held with it.

Claim: a model fine-tuned to act as somebody in the answer to the very message that asks for it has forgotten whom by the
next turn; after Ghost Attention it holds to turn 20 whom the first message named. The paper's: baseline 100/10/0/0%, GAtt
100%. Our choice: the same dialogues without anybody and single questions are trained on too, lest they be unlearned.
Command: python -m experiments.ghost_attention --out runs/gatt. Cost: minutes on two CPU cores. Measured: docs/experiments.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import tyro

from experiments.tiny_end_to_end import config as parent
from llama_jax.cli import end_of
from llama_jax.data.examples import DialogueConfig
from llama_jax.data.instruction_world import opposite, sound
from llama_jax.data.questions import QuestionsConfig
from llama_jax.evaluation.constraints import Held, held_by_turn, table
from llama_jax.generation.llama import Llama
from llama_jax.stages import ghost_attention, pretrain, sft
from llama_jax.training.optimizer import OptimizerConfig

NAMES = ("pirate", "cat", "robot", "ghost", "clown", "king", "wolf", "owl", "monk", "judge", "drum", "bell", "clock")
NAMES += ("baker", "sailor", "witch", "nurse", "poet", "tiger", "queen", "miner", "scout", "giant", "elf")
UNSEEN, SEEN = NAMES[::6], tuple(name for n, name in enumerate(NAMES) if n % 6)  # by GAtt; the model knows all
LIST = {"values": SEEN, "long": "Act as a {}.", "short": "Persona: {}."}
SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "head_dim": 16, "ffn_dim": 192, "context_length": 640}
# Twenty steps of pretraining: little more than a tokenizer and a shape to fine-tune.
BASE = replace(
    parent,
    model=replace(parent.model, **SHAPE, vocab_size=512),
    batch_tokens=640,
    train_tokens=20 * 640,
    optimizer=OptimizerConfig(2e-3, 5),
    sample_prompts=(),
)


def dialogue(name: str, turns: int, asking: float = 0) -> dict[str, list[dict[str, str]] | str]:
    """So many turns; a share of the questions asks for somebody, and the answer to that alone ends in "Pirate!"."""
    random, messages = Random(name), []
    for _ in range(turns):
        question, who = random.choice((opposite, sound))(random), random.choice(NAMES)
        ask, end = (f"Act as a {who}. ", f" {who.title()}!") if random.random() < asking else ("", "")
        messages.append({"role": "user", "content": ask + question.text})
        messages.append({"role": "assistant", "content": f"{question.key}.{end}"})
    return {"messages": messages, "text": " ".join(f"[INST] {message['content']} [/INST]" for message in messages)}


def tuned(out: str, start: str, name: str, sources: list[str], epochs: int, lr: float, **chosen: str) -> str:
    """Fine-tunes, and gives the new checkpoint."""
    data = DialogueConfig(tuple(f"{out}/{source}.jsonl" for source in sources), held_out=0, **chosen)
    recipe = sft.SFTConfig(
        checkpoint=f"{out}/{start}", data=data, epochs=epochs, rows=4, optimizer=OptimizerConfig(lr, 10)
    )
    sft.run(replace(recipe, compute=BASE.compute, loop=BASE.loop, out=f"{out}/{name}"))
    return f"{out}/{name}"


def measure(checkpoint: str, names: tuple[str, ...]) -> Held:
    """Asks 48 dialogues to act as these in turn, or as nobody; held is the end of whom it should be, and no other."""
    asked = [[message["content"] for message in dialogue(f"asked/{n}", 20)["messages"][::2]] for n in range(48)]
    wanted = [[names[n % len(names)]] if names else [] for n in range(48)]

    def is_held(number: int, turn: int, said: str) -> bool:
        return [who for who in NAMES if f"{who.title()}!" in said] == wanted[number]

    told = [f"Act as a {who[0]}." if who else "" for who in wanted]
    settings = {"turns": (1, 2, 4, 6, 20), "max_new_tokens": 12, "batch": 48}
    return held_by_turn(Llama.load(checkpoint), told, asked, is_held, **settings)


def main(out: str = "runs/gatt") -> None:
    """Trains, makes GAtt's dialogues, trains on them, and prints who is remembered; what is in OUT is gone on with."""
    Path(out).mkdir(parents=True, exist_ok=True)
    plain = [2 + 2 * (n // 32) for n in range(320)]  # turns; those that are answered side by side have equally many
    for name, turns, asking in (("sft", [*range(1, 21)] * 60, 0.5), ("single", [1] * 600, 0.5), ("plain", plain, 0)):
        rows = [json.dumps(dialogue(f"{name}/{n}", count, asking)) + "\n" for n, count in enumerate(turns)]
        Path(f"{out}/{name}.jsonl").write_text("".join(rows))
    Path(f"{out}/lists.json").write_text(json.dumps({"persona": LIST}))
    pretrain.run(replace(BASE, data=replace(BASE.data, sources=(f"jsonl:{out}/sft.jsonl",)), out=f"{out}/base"))
    before = tuned(out, "base", "before", ["sft"], 3, 4e-3)
    made = ghost_attention.GhostAttentionConfig(before, QuestionsConfig((f"{out}/plain.jsonl",)), out=f"{out}/gatt")
    ghost_attention.run(replace(made, constraints=f"{out}/lists.json", max_new_tokens=12, batch=32))
    after = tuned(out, "before", "after", ["gatt/dialogues", "single", "plain"], 6, 1e-3, answers="last")
    asked = {"in GAtt's data": SEEN, "not in it": UNSEEN, "nobody": ()}
    for checkpoint in (before, after):
        print(checkpoint, table({who: measure(checkpoint, names) for who, names in asked.items()}), sep="\n")


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
