"""The verbs of the command line: each takes the words behind its name and calls the part of llama_jax that does it.

Flags are the parameters of a function or the fields of a stage's config; the heavy parts are imported when a verb runs.
"""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.recipes import list_recipes, load_recipe

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

Json = Annotated[bool, arg(name="json")]
Form = Literal["hf", "meta", "ours", "llama2c", "peft"]
# A field that is a dataclass or None keeps what the recipe chose, instead of becoming a subcommand.
_PLAIN = (tyro.conf.AvoidSubcommands,)
Sources = Annotated[tuple[str, ...], arg(metavar="SOURCE...")]


def doctor(argv: Sequence[str]) -> int:
    """See llama_jax.doctor."""

    def run(*, as_json: Json = False) -> int:
        """Show what this machine has, what is missing, and the command that installs it.

        Exits with 2 if something required is missing or computes wrongly.

        Examples:
          llama-jax doctor
          llama-jax doctor --json > machine.json

        Args:
          as_json: Print JSON.
        """
        from llama_jax import doctor

        return doctor.run(as_json)

    return _call(run, "doctor", argv)


def pretrain(argv: Sequence[str]) -> None:
    """Loads the recipe, lets the flags override its fields, and runs the stage."""
    from llama_jax.stages.pretrain import PretrainConfig, run

    recipes = ", ".join(path.stem for path in list_recipes()) or "none here"
    text = f"""Pretrain a model (paper 2.2) from a recipe: a Python file, or the name of one in experiments/.

Recipes: {recipes}.

Every field of the recipe is a flag. A run that was interrupted goes on when it is started again with the same --out.

Examples:
  llama-jax pretrain experiments/tiny_end_to_end.py --out runs/tiny
  llama-jax pretrain experiments/tiny_end_to_end.py --data.sources "text:books/*.txt" --out runs/books
  llama-jax pretrain experiments/pretrain_7b.py --mesh fsdp=8 --optimizer.peak-lr 1e-4 --dry-run"""
    if "-h" in argv[:1] or "--help" in argv[:1]:
        tyro.cli(PretrainConfig, args=["--help"], prog="llama-jax pretrain RECIPE", description=text, config=_PLAIN)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"name the recipe first: llama-jax pretrain RECIPE [flags]. Recipes: {recipes}. (llama-jax pretrain --help)"
        )
    recipe = load_recipe(argv[0], PretrainConfig)
    run(
        tyro.cli(
            PretrainConfig,
            default=recipe,
            args=argv[1:],
            prog=f"llama-jax pretrain {argv[0]}",
            description=text,
            config=_PLAIN,
        )
    )


def generate(argv: Sequence[str]) -> None:
    """See llama_jax.generation.llama."""

    def run(
        checkpoint: Annotated[str, arg(metavar="CHECKPOINT")],
        prompt: Annotated[str, arg(metavar="PROMPT")] = "",
        /,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
        int8: bool = False,
        mesh: str | None = None,
    ) -> None:
        """Continue a text with a trained model. The continuation, and nothing else, goes to stdout as it is made.

        Examples:
          llama-jax generate runs/tiny "Once upon a time"
          llama-jax generate runs/tiny/checkpoints/400 "" --temperature 0 --max-new-tokens 50
          llama-jax generate Llama-2-7b-hf "The capital of France is" --int8
          llama-jax generate runs/tiny -- "--a prompt that begins with a dash"

        Args:
          checkpoint: A run (its newest checkpoint is taken) or one checkpoint, a Hugging Face or Meta folder, a llama2.c file.
          prompt: The text to continue; an empty one starts from BOS.
          max_new_tokens: Stop after this many tokens, or at EOS.
          temperature: Divides the logits; 0 always takes the likeliest token.
          top_p: Draw from the likeliest tokens that together hold this probability; 1 for all.
          top_k: Draw from this many likeliest tokens; 0 for all.
          seed: The same seed gives the same text.
          int8: Keep the weights in 8 bits, half the memory of bfloat16.
          mesh: Devices to lie on, such as auto or tensor=4; one if not given.
        """
        from llama_jax.generation.llama import Llama

        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
        }
        for piece in Llama.load(checkpoint, mesh=mesh, int8=int8).stream(prompt, **settings):
            print(piece, end="", flush=True)
        if sys.stdout.isatty():
            print()  # keeps the shell's prompt off the last line; a pipe or a file gets the text alone

    _call(run, "generate", argv)


def sft(argv: Sequence[str]) -> None:
    """Takes a checkpoint or a recipe, lets the flags override its fields, and runs the stage."""
    from llama_jax.stages.sft import SFTConfig, run

    text = """Fine-tune a model on dialogues (paper 3.1), from a checkpoint of any form or from a recipe.

Loss falls on the answers alone. Rows may be messages, conversations, prompt/response, instruction/output, or transcripts
with Human: and Assistant:; --dry-run shows what was recognised and what is trained. A run that was interrupted goes on
when it is started again with the same --out.

Examples:
  llama-jax sft Llama-2-7b-hf --data mine.jsonl --out runs/mine
  llama-jax sft Llama-2-7b-hf --data mine.jsonl --train lora --nf4 --optimizer.peak-lr 2e-4 --rows 8 --out runs/mine
  llama-jax sft runs/books --data mine.jsonl --dry-run"""
    if "-h" in argv[:1] or "--help" in argv[:1]:
        tyro.cli(SFTConfig, args=["--help"], prog="llama-jax sft CHECKPOINT", description=text, config=_PLAIN)
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first: llama-jax sft CHECKPOINT --data FILE.jsonl (llama-jax sft --help)")
    is_recipe = argv[0].endswith(".py") or argv[0] in [path.stem for path in list_recipes()]
    config = load_recipe(argv[0], SFTConfig) if is_recipe else SFTConfig(checkpoint=argv[0])
    flags = ["--data.sources" if word == "--data" else word for word in argv[1:]]
    run(
        tyro.cli(
            SFTConfig, default=config, args=flags, prog=f"llama-jax sft {argv[0]}", description=text, config=_PLAIN
        )
    )


def chat(argv: Sequence[str]) -> None:
    """See llama_jax.generation.terminal."""

    def run(
        checkpoint: Annotated[str, arg(metavar="CHECKPOINT")],
        /,
        *,
        system: str | None = None,
        default_system_prompt: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
        int8: bool = False,
        mesh: str | None = None,
        plain: bool = False,
    ) -> None:
        """Talk with a fine-tuned model in the terminal, in Llama 2's chat format; /help lists what else can be typed.

        On a pipe, each line is a message, and the answers, and nothing else, go to stdout.

        Examples:
          llama-jax chat runs/mine-sft
          llama-jax chat Llama-2-7b-chat-hf --int8 --system "Answer in French."
          printf 'Hello!\\nAnd you?\\n' | llama-jax chat runs/mine-sft --temperature 0

        Args:
          checkpoint: A run (its newest checkpoint is taken) or one checkpoint, a Hugging Face or Meta folder, a llama2.c file.
          system: The system prompt, which stands before the whole conversation; none if not given.
          default_system_prompt: Ask for helpful, safe and honest answers, in the manner of the paper's default prompt.
          max_new_tokens: Stop an answer after this many tokens; only EOS and the end of the context do if not given.
          temperature: Divides the logits; 0 always takes the likeliest token.
          top_p: Draw from the likeliest tokens that together hold this probability; 1 for all.
          top_k: Draw from this many likeliest tokens; 0 for all.
          seed: The same seed gives the same conversation.
          int8: Keep the weights in 8 bits, half the memory of bfloat16.
          mesh: Devices to lie on, such as auto or tensor=4; one if not given.
          plain: Prompt and completion without tags, for a model that was not trained on dialogues in this format.
        """
        from llama_jax.generation.llama import Llama
        from llama_jax.generation.terminal import converse
        from llama_jax.text.chat import DEFAULT_SYSTEM_PROMPT, Llama2Chat, Plain

        if default_system_prompt and system is not None:
            raise UserError("--system and --default-system-prompt are both given; keep one")
        llama = Llama.load(checkpoint, mesh=mesh, int8=int8)
        conversation = llama.chat(
            DEFAULT_SYSTEM_PROMPT if default_system_prompt else system,
            template=Plain() if plain else Llama2Chat(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        converse(conversation)

    _call(run, "chat", argv)


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

    _call(run, "convert", argv)


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

    _call(run, "verify", argv)


def tokenize(argv: Sequence[str]) -> None:
    """See llama_jax.data.documents."""

    def run(
        sources: Sources,
        /,
        *,
        tokenizer: str,
        out: str,
        workers: int = 0,
        dry_run: bool = False,
        as_json: Json = False,
    ) -> None:
        """Turn text into token shards once, so that later runs read ids instead of tokenising again.

        What was interrupted goes on when it is started again. Train from the shards with --data.sources tokens:FOLDER.

        Examples:
          llama-jax tokenize "text:books/*.txt" --tokenizer books.model --out books.tokens
          llama-jax tokenize tfds:tiny_shakespeare jsonl:notes.jsonl.zst --tokenizer books.model --out mixed.tokens

        Args:
          sources: tfds:NAME[:SPLIT], text:FILES, jsonl:FILES or hf:NAME; in quotes where they hold a star.
          tokenizer: A SentencePiece model, or a folder with tokenizer.model.
          out: The folder to write.
          workers: Processes that tokenise beside the one that writes.
          dry_run: Count the documents and touch nothing.
          as_json: Print the shards' index as JSON.
        """
        from llama_jax.data import documents
        from llama_jax.data.sources import open_source
        from llama_jax.text.tokenizer import Tokenizer

        loaded = Tokenizer.load(tokenizer)
        if dry_run:
            counts = {spec: len(open_source(spec, loaded)) for spec in _some(sources)}
            _print_counts(counts, f"would write token shards to {out}", as_json)
            return
        index = documents.tokenize(_some(sources), loaded, out, workers=workers, say=_say)
        if as_json:
            print(json.dumps(index))

    _call(run, "tokenize", argv)


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

    _call(run, "download", argv)


def demo(argv: Sequence[str]) -> None:
    """See llama_jax.demo."""

    def run(*, out: str = "runs/demo", seed: int = 0, train_tokens: int = 0, dry_run: bool = False) -> None:
        """Run the whole pipeline in under 10 minutes on 2 cores, without a download, and write a report.

        Text that every Python carries -> tokenizer -> pretraining -> checkpoint -> held-out bits per byte beside gzip
        and xz -> samples -> report.md.

        Examples:
          llama-jax demo
          llama-jax demo --out runs/again --seed 1

        Args:
          out: The run's folder.
          seed: Of initialisation and data order.
          train_tokens: Train on so many tokens instead of the recipe's.
          dry_run: Say what would be done, and touch nothing.
        """
        from llama_jax import demo

        demo.run(out, seed=seed, train_tokens=train_tokens, dry_run=dry_run)

    _call(run, "demo", argv)


def tokenizer(argv: Sequence[str]) -> None:
    """The actions of `llama-jax tokenizer`; see llama_jax.text.tokenizer."""
    actions = {"train": _train_tokenizer, "encode": _encode, "decode": _decode, "info": _tokenizer_info}
    if argv and argv[0] in actions:
        _call(actions[argv[0]], f"tokenizer {argv[0]}", argv[1:])
        return
    text = """Train a SentencePiece tokenizer, look into one, encode, decode.

Examples:
  llama-jax tokenizer train "text:books/*.txt" --vocab-size 8000 --out books.model
  llama-jax tokenizer encode books.model "Once upon a time" --json
  llama-jax tokenizer decode books.model 1 9038 2501
  llama-jax tokenizer info books.model"""
    tyro.extras.subcommand_cli_from_dict(actions, args=argv, prog="llama-jax tokenizer", description=text)


def _train_tokenizer(
    sources: Sources,
    /,
    *,
    out: str,
    vocab_size: int = 32_000,
    dry_run: bool = False,
    as_json: Json = False,
) -> None:
    """Train a tokenizer with the paper's settings: BPE, single digits, unknown characters as bytes, nothing normalised.

    Examples:
      llama-jax tokenizer train "text:books/*.txt" --vocab-size 8000 --out books.model
      llama-jax tokenizer train tfds:tiny_shakespeare:train --vocab-size 2000 --out shakespeare.model

    Args:
      sources: tfds:NAME[:SPLIT], text:FILES, jsonl:FILES or hf:NAME; in quotes where they hold a star.
      out: The model file to write.
      vocab_size: Pieces, control and byte pieces included.
      dry_run: Count the documents and touch nothing.
      as_json: Print size, special ids and checksum as JSON.
    """
    from llama_jax.data.sources import open_source
    from llama_jax.text.tokenizer import Tokenizer

    if shards := [spec for spec in _some(sources) if spec.startswith("tokens:")]:
        raise UserError(f"{shards[0]} holds ids, and a tokenizer is trained on text; name the text they were made from")
    opened = {spec: open_source(spec, None) for spec in sources}
    if dry_run:
        counts = {spec: len(documents) for spec, documents in opened.items()}
        _print_counts(counts, f"would train {vocab_size} pieces and write {out}", as_json)
        return
    texts = (documents[i] for documents in opened.values() for i in range(len(documents)))
    trained = Tokenizer.train(texts, out, vocab_size=vocab_size)
    _say(f"{out}: {trained.vocab_size} pieces")
    if as_json:
        print(json.dumps(_facts(trained)))


def _encode(
    model: Annotated[str, arg(metavar="MODEL")],
    text: Annotated[str, arg(metavar="TEXT")],
    /,
    *,
    bos: bool = True,
    eos: bool = False,
    as_json: Json = False,
) -> None:
    """Print the ids of a text.

    Examples:
      llama-jax tokenizer encode books.model "Once upon a time"

    Args:
      model: A SentencePiece model, or a folder with tokenizer.model.
      text: The text.
      bos: Begin with BOS.
      eos: End with EOS.
      as_json: Print a JSON list.
    """
    from llama_jax.text.tokenizer import Tokenizer

    ids = Tokenizer.load(model).encode(text, bos=bos, eos=eos)
    print(json.dumps(ids) if as_json else " ".join(map(str, ids)))


def _decode(
    model: Annotated[str, arg(metavar="MODEL")],
    ids: Annotated[tuple[int, ...], arg(metavar="ID...")],
    /,
    *,
    as_json: Json = False,
) -> None:
    """Print the text of ids.

    Examples:
      llama-jax tokenizer decode books.model 1 9038 2501

    Args:
      model: A SentencePiece model, or a folder with tokenizer.model.
      ids: Token ids.
      as_json: Print a JSON string.
    """
    from llama_jax.text.tokenizer import Tokenizer

    text = Tokenizer.load(model).decode(ids)
    print(json.dumps(text, ensure_ascii=False) if as_json else text)


def _tokenizer_info(model: Annotated[str, arg(metavar="MODEL")], /, *, as_json: Json = False) -> None:
    """Show a tokenizer's size, special ids and checksum.

    Examples:
      llama-jax tokenizer info books.model --json

    Args:
      model: A SentencePiece model, or a folder with tokenizer.model.
      as_json: Print JSON.
    """
    from llama_jax.text.tokenizer import Tokenizer

    facts = _facts(Tokenizer.load(model))
    print(json.dumps(facts) if as_json else "\n".join(f"{name:<12}{value}" for name, value in facts.items()))


def _facts(tokenizer: "Tokenizer") -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "sha256")}


def _some(sources: tuple[str, ...]) -> tuple[str, ...]:
    if not sources:
        raise UserError("no source given; name at least one, such as text:corpus.txt")
    return sources


def _print_counts(counts: dict[str, int], what_next: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"documents": counts}))
        return
    print("\n".join(f"{spec}: {count} documents" for spec, count in counts.items()))
    print(what_next)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _call(function: Callable, name: str, argv: Sequence[str]) -> Any:
    """Calls a function with the command line as its arguments; its docstring up to "Args:" is the help text."""
    description = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].rstrip()
    return tyro.cli(
        function,
        args=list(argv),
        prog=f"llama-jax {name}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
