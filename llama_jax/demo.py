"""The whole pipeline on a laptop: the stages a pod runs, one after the other, on text that every Python carries."""

import dataclasses
import time
from pathlib import Path

import jax

from llama_jax.conversion.load import load_model
from llama_jax.data.pipeline import held_out_documents
from llama_jax.data.python_corpus import write_python_corpus
from llama_jax.evaluation.compression import compressor_bits_per_byte
from llama_jax.evaluation.report import write_report
from llama_jax.generation.llama import Llama
from llama_jax.parallel.mesh import make_mesh
from llama_jax.recipes import load_recipe
from llama_jax.stages import pretrain
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.training.held_out import make_held_out_loss
from llama_jax.training.metrics import format_duration, say

PROMPTS = ("def main(", "The for statement is used to", "import os\n")


def run(out: str, *, seed: int = 0, train_tokens: int = 0, dry_run: bool = False) -> None:
    """Corpus, tokenizer, pretraining, checkpoint, evaluation beside gzip and xz, samples, report.

    Args:
      out: the run's folder; a demo that was interrupted goes on there.
      seed: of initialisation and data order.
      train_tokens: to train on; the recipe's number if 0.
      dry_run: print the recipe and the memory, and touch nothing.
    """
    folder, began = Path(out), time.monotonic()
    corpus = folder / "corpus.jsonl"
    recipe: PretrainConfig = load_recipe("tiny_end_to_end", PretrainConfig)
    config = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sources=(f"jsonl:{corpus}",)),
        train_tokens=train_tokens or recipe.train_tokens,
        sample_prompts=PROMPTS,
        seed=seed,
        out=out,
        dry_run=dry_run,
    )
    if not dry_run and not corpus.exists():
        say("collecting the language reference, the docstrings and the sources of this Python ...")
        written = write_python_corpus(corpus)
        say(f"{written.documents} documents, {written.bytes / 1e6:.1f} MB")
    pretrain.run(config)
    if dry_run:
        return
    scores = evaluate(config)
    for name, bits in scores.items():
        say(f"{name:>12}  {bits:.3f} bits per byte, held-out documents")
    model, tokenizer = load_model(folder)
    say(f"{PROMPTS[1]} ...")
    for piece in Llama(model, tokenizer).stream(PROMPTS[1], max_new_tokens=60, temperature=0.6, top_p=0.9, seed=seed):
        print(piece, end="", flush=True)
    print()
    say(f"report: {write_report(folder, scores)}; in all {format_duration(time.monotonic() - began)}")


def evaluate(config: PretrainConfig) -> dict[str, float]:
    """Bits per byte of the held-out documents: the newest checkpoint's, restored from disk, and the compressors'."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, tokenizer = load_model(config.out, mesh)
        shape = {"rows": config.rows, "length": config.length}
        score = make_held_out_loss(config.data, tokenizer, mesh, config.compute, **shape)(model)
    text = "".join(held_out_documents(config.data, tokenizer)).encode()
    return {"llama_jax": score["eval/bits_per_byte"], **compressor_bits_per_byte(text)}
