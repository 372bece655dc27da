"""How much samples of one prompt differ, by temperature, for factual and for creative prompts (paper 5.1, Figure 21).

Claim: with RLHF, Self-BLEU of factual prompts hardly falls any more as the temperature rises, while that of creative
prompts still does; a model before RLHF loses its agreement on both. The paper's setting is the default: 10 prompts of
each kind, 25 samples, temperatures 0.1 to 1.5. Our choice: nothing but the temperature shapes the distribution (top-p 1).
Command: python -m experiments.temperature_rescaling --plain Llama-2-7b-hf --chat runs/mine-sft runs/mine-rlhf
Cost: 7,500 samples a checkpoint. Measured: see docs/experiments.md, with a model of 260K parameters; RLHF not yet.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llama_jax.cli import end_of
from llama_jax.errors import UserError
from llama_jax.evaluation.diversity import self_bleu
from llama_jax.generation.llama import Llama
from llama_jax.text.chat import Llama2Chat, Message, encode_prompt
from llama_jax.training.metrics import say
from llama_jax.training.run_folder import make_folder, write_whole

PROMPTS = Path(__file__).with_name("data") / "temperature_prompts.jsonl"
TEMPERATURES = tuple(round(0.1 * n, 1) for n in range(1, 16))


@dataclass(frozen=True)
class Settings:
    """What the samples of one temperature depend on, beside the checkpoint."""

    prompts: tuple[str, ...]
    samples: int
    max_new_tokens: int
    seed: int
    chat: bool


def draw(llama: Llama, settings: Settings, temperature: float, batch: int) -> list[list[str]]:
    """Samples of each prompt, each with a seed of its own: the same at every temperature, whatever the batch is."""
    ids: list[str | Sequence[int]] = list(settings.prompts)
    if settings.chat:
        asked = ((Message("user", prompt),) for prompt in settings.prompts)
        ids = [encode_prompt(llama.tokenizer, dialogue, Llama2Chat()) for dialogue in asked]
    rows = [prompt for prompt in ids for _ in range(settings.samples)]
    shape = {"max_new_tokens": settings.max_new_tokens, "temperature": temperature, "top_p": 1.0}
    texts: list[str] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        seeds = [settings.seed + start + i for i in range(len(part))]
        texts += [completion.text for completion in llama.generate(part, seed=seeds, **shape)]
    return [texts[start : start + settings.samples] for start in range(0, len(texts), settings.samples)]


def sample(checkpoint: str, folder: Path, settings: Settings, temperatures: Sequence[float], batch: int) -> None:
    """Writes the samples of every temperature into the folder, but for those that are there already.

    Raises:
      UserError: those were drawn from another checkpoint or with other settings.
    """
    began = json.loads(json.dumps({"checkpoint": str(Path(checkpoint).resolve()), **asdict(settings)}))
    make_folder(folder)
    about = folder / "settings.json"
    if about.exists() and json.loads(about.read_text()) != began:
        raise UserError(f"{folder} holds samples of another checkpoint or other settings; name another --out")
    write_whole(about, json.dumps(began, indent=2).encode())
    missing = [t for t in temperatures if not (folder / "samples" / f"{t}.json").exists()]
    llama = Llama.load(checkpoint) if missing else None
    for temperature in missing:
        texts = draw(llama, settings, temperature, batch)
        write_whole(folder / "samples" / f"{temperature}.json", json.dumps(texts, indent=1).encode())
        say(f"{checkpoint}: temperature {temperature} of {temperatures[-1]} done")


def score(folder: Path, kinds: Sequence[str], temperatures: Sequence[float]) -> dict[str, list[float]]:
    """For each kind of prompt its mean Self-BLEU at each temperature."""
    curves: dict[str, list[float]] = {kind: [] for kind in kinds}
    for temperature in temperatures:
        texts = json.loads((folder / "samples" / f"{temperature}.json").read_text())
        scores = [self_bleu(of_prompt) for of_prompt in texts]
        for kind, curve in curves.items():
            own = [value for value, its in zip(scores, kinds, strict=True) if its == kind]
            curve.append(sum(own) / len(own))
    return curves


def plot(curves: dict[str, list[float]], temperatures: Sequence[float], path: Path) -> None:
    """Draws every curve against the temperature into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(temperatures, curve, "--" if name.endswith("creative") else "-", marker="o", markersize=3, label=name)
    axes.set(xlabel="temperature", ylabel="Self-BLEU of the samples", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def main(
    plain: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHECKPOINT")] = (),
    chat: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHECKPOINT")] = (),
    out: Path = Path("runs/temperature_rescaling"),
    prompts: Path = PROMPTS,
    samples: int = 25,
    temperatures: tuple[float, ...] = TEMPERATURES,
    max_new_tokens: int = 128,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Samples, scores, and prints the table; what an interrupted run has drawn stays.

    Args:
      plain: checkpoints that continue the prompts as text.
      chat: checkpoints that are asked them in Llama 2's chat format.
      out: the folder for samples and for self_bleu.png.
      prompts: a .jsonl file of rows with `kind` and `prompt`.
      samples: of each prompt at each temperature.
      temperatures: at which to sample.
      max_new_tokens: of a sample.
      batch: samples drawn at once.
      seed: of the samples.
    """
    if not plain and not chat:
        raise UserError("name checkpoints, with --plain (continue the prompts) or --chat (asked in the chat format)")
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    curves: dict[str, list[float]] = {}
    for number, checkpoint in enumerate((*plain, *chat)):
        texts = tuple(row["prompt"] for row in rows)
        settings = Settings(texts, samples, max_new_tokens, seed, chat=number >= len(plain))
        folder = out / f"{number}-{Path(checkpoint).name}"
        sample(checkpoint, folder, settings, temperatures, batch)
        own = score(folder, kinds, temperatures)
        name = f"{Path(checkpoint).name} {'chat' if settings.chat else 'plain'}"
        curves |= {f"{name}, {kind}": own[kind] for kind in sorted(own)}
    plot(curves, temperatures, out / "self_bleu.png")
    print(f"| temperature | {' | '.join(curves)} |\n|{'---|' * (len(curves) + 1)}")
    for place, temperature in enumerate(temperatures):
        print(f"| {temperature} | {' | '.join(f'{curve[place]:.1f}' for curve in curves.values())} |")


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
