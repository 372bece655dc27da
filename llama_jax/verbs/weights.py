"""The verbs about a model's weights: convert, verify and download."""

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.verbs.arguments import Json, call

Form = Literal["hf", "meta", "ours", "llama2c", "peft"]


def convert(argv: Sequence[str]) -> None:
    """See llama_jax.conversion.convert."""

    def run(
        src: Annotated[str, arg(metavar="SRC")],
        dst: Annotated[str, arg(metavar="DST")],
        /,
        *,
        to: Form,
        form: Annotated[Form | None, arg(name="from")] = None,
        dtype: Literal["float16", "bfloat16", "float32"] | None = None,
        shards: int = 1,
        llama2c_version: Literal[0, 1] = 1,
        tokenizer: str | None = None,
        norm_eps: float | None = None,
        context_length: int | None = None,
        fold_kv_heads: int | None = None,
        dry_run: bool = False,
        as_json: Json = False,
    ) -> None:
        """Convert a checkpoint between Hugging Face, Meta, llama2.c and our own form, exactly and in bounded memory.

        Adapters, of a run or in PEFT's form, are merged into their model, unless they are written as PEFT's.

        Every name, shape and dtype is checked before anything is written; DST appears whole or not at all.

        Examples:
          llama-jax convert Llama-2-7b-hf llama2-7b --to ours
          llama-jax convert runs/books books-hf --to hf --dtype bfloat16
          llama-jax convert llama-2-70b llama2-70b-hf --to hf --from meta
          llama-jax convert books-hf books-meta --to meta --shards 2
          llama-jax convert runs/mine mine-adapters --to peft

        Args:
          src: A run or one of its checkpoints, a Hugging Face, Meta or PEFT folder, a llama2.c file, or hub:ID.
          dst: The folder to write; it must not exist yet.
          to: The form to write.
          form: The form of SRC; recognised if not given.
          dtype: Cast the weights; as stored if not given.
          shards: Files of a Meta folder, as model parallelism splits the weights.
          llama2c_version: Version of the llama2.c file.
          tokenizer: A tokenizer.model to write instead of the one beside the weights.
          norm_eps: The epsilon of every RMSNorm, where the file has it wrong.
          context_length: Tokens the model was trained on, where the file does not say.
          fold_kv_heads: Fold key/value heads that are stored repeated back to so many.
          dry_run: Check SRC, say what it is, and touch nothing.
          as_json: Print what was done as JSON.
        """
        from llama_jax.conversion import convert as conversion
        from llama_jax.conversion.source import Overrides

        overrides = Overrides(norm_eps, context_length, fold_kv_heads)
        output = conversion.Output(shards, llama2c_version, dtype, tokenizer)
        report = conversion.convert(src, dst, to, form=form, output=output, overrides=overrides, dry_run=dry_run)
        print(json.dumps(report) if as_json else conversion.summary(report))

    call(run, "convert", argv)


def verify(argv: Sequence[str]) -> None:
    """See llama_jax.conversion.verify."""

    def run(
        a: Annotated[str, arg(metavar="A")],
        b: Annotated[str, arg(metavar="B")],
        /,
        *,
        prompt: str | None = None,
        tolerance: float = 1e-5,
        against_torch: bool = False,
        int8: bool = False,
        seed: int = 0,
        as_json: Json = False,
    ) -> None:
        """Compare two checkpoints of any form: weight by weight, and by their logits.

        Exits with 2 if they are further apart than the tolerance.

        Examples:
          llama-jax verify Llama-2-7b-hf llama2-7b
          llama-jax verify llama2-7b Llama-2-7b-hf --against-torch --prompt "The capital of France is" --tolerance 1e-4
          llama-jax verify llama2-7b llama2-7b --int8 --tolerance 0.1

        Args:
          a: The first checkpoint.
          b: The second.
          prompt: Compare the logits of this text; of random tokens if not given.
          tolerance: The largest relative difference of weights (root mean square) and of logits (largest) that passes.
          against_torch: Compute B's logits with Hugging Face transformers in PyTorch, in a process of its own.
          int8: Quantise A's matrices first, to see what that costs.
          seed: Of the random tokens.
          as_json: Print JSON.
        """
        import dataclasses

        from llama_jax.conversion import verify as verification

        verdict = verification.verify(a, b, prompt=prompt, against_torch=against_torch, int8=int8, seed=seed)
        print(json.dumps(dataclasses.asdict(verdict)) if as_json else verification.as_text(verdict))
        if beyond := verdict.beyond(tolerance):
            raise UserError(
                f"{a} and {b} differ by more than {tolerance:g} in {', '.join(beyond)}; --tolerance allows more"
            )

    call(run, "verify", argv)


def download(argv: Sequence[str]) -> None:
    """See llama_jax.conversion.download."""

    def run(
        repo_id: Annotated[str, arg(metavar="ID")],
        /,
        *,
        out: str | None = None,
        revision: str = "main",
        dry_run: bool = False,
        as_json: Json = False,
    ) -> None:
        """Fetch a checkpoint from the Hugging Face hub: configuration, tokenizer and weights, in one form and nothing else.

        What has arrived whole is not fetched again. For gated models accept the licence on the model's page, then log in
        with `hf auth login` or set HF_TOKEN.

        Examples:
          llama-jax download meta-llama/Llama-2-7b-hf
          llama-jax download meta-llama/Llama-2-7b-chat --out llama-2-7b-chat-meta
          llama-jax download TinyLlama/TinyLlama-1.1B-Chat-v1.0 --dry-run

        Args:
          repo_id: The model's id on the hub.
          out: The folder to write; by default one named after the model, here.
          revision: A branch, a tag or a commit.
          dry_run: List what would be fetched, and fetch nothing.
          as_json: Print the files and their bytes as JSON.
        """
        from llama_jax.conversion.download import download, find_files

        found = find_files(repo_id, revision)
        folder = None if dry_run else str(download(repo_id, out, revision, found))
        if as_json:
            files = [{"name": file.name, "bytes": file.nbytes} for file in found.files]
            print(json.dumps({"folder": folder, "commit": found.commit, "bytes": found.nbytes, "files": files}))
            return
        if dry_run:
            print("\n".join(f"{file.nbytes / 1e6:12,.1f} MB  {file.name}" for file in found.files))
        print(f"{'would fetch' if dry_run else folder}: {len(found.files)} files, {found.nbytes / 1e6:,.1f} MB")

    call(run, "download", argv)
