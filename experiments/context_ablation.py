"""Twice the context at equal tokens (paper A.2.1, Tables 16 and 17: 2k against 4k), at toy scale.

Claim: on documents longer than the short context the long one predicts better, and read in short pieces it loses
nothing. The paper's own run: 150B tokens; long-context tasks rise from near zero, general ones stay.
Command: python -m experiments.context_ablation --source "text:books/*.txt" --out runs/context_ablation
Cost: twice tiny_end_to_end. Measured: see docs/experiments.md.
"""

from dataclasses import replace

import jax
import tyro

from experiments.tiny_end_to_end import config as parent
from llama_jax.cli import end_of
from llama_jax.conversion.load import load_model
from llama_jax.parallel.mesh import make_mesh
from llama_jax.stages import pretrain
from llama_jax.training.held_out import make_held_out_loss

LONG = parent.model.context_length
SHORT = LONG // 2
variants = {length: replace(parent, model=replace(parent.model, context_length=length)) for length in (SHORT, LONG)}
config = variants[LONG]


def main(source: str, out: str = "runs/context_ablation", train_tokens: int = parent.train_tokens) -> None:
    """Trains both and prints their held-out bits per byte, read in short and in long pieces.

    Args:
      source: what to train on, such as text:books/*.txt.
      out: the folder of both runs; an interrupted ablation goes on there.
      train_tokens: for each.
    """
    print("| trained on | read in pieces of | held-out bits per byte |\n|---|---|---|")
    for trained, recipe in variants.items():
        data = replace(recipe.data, sources=(source,))
        folder = f"{out}/{trained}"
        pretrain.run(replace(recipe, data=data, out=folder, train_tokens=train_tokens, sample_prompts=()))
        mesh = make_mesh(recipe.mesh)
        with jax.set_mesh(mesh):
            model, tokenizer = load_model(folder, mesh)
            for read in (SHORT, LONG):
                rows = recipe.batch_tokens // read
                loss = make_held_out_loss(data, tokenizer, mesh, recipe.compute, rows=rows, length=read)
                print(f"| {trained} | {read} | {loss(model)['eval/bits_per_byte']:.3f} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
