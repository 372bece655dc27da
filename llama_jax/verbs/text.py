"""The verbs about text and its tokens: tokenizer and tokenize."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.verbs.arguments import Json, call

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

Sources = Annotated[tuple[str, ...], arg(metavar="SOURCE...")]


def tokenizer(argv: Sequence[str]) -> None:
    """The actions of `llama-jax tokenizer`; see llama_jax.text.tokenizer."""
    actions = {"train": _train_tokenizer, "encode": _encode, "decode": _decode, "info": _tokenizer_info}
    if argv and argv[0] in actions:
        call(actions[argv[0]], f"tokenizer {argv[0]}", argv[1:])
        return
    text = """Train a SentencePiece tokenizer, look into one, encode, decode.

Examples:
  llama-jax tokenizer train "text:books/*.txt" --vocab-size 8000 --out books.model
  llama-jax tokenizer encode books.model "Once upon a time" --json
  llama-jax tokenizer decode books.model 1 9038 2501
  llama-jax tokenizer info books.model"""
    tyro.extras.subcommand_cli_from_dict(actions, args=argv, prog="llama-jax tokenizer", description=text)


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

    call(run, "tokenize", argv)


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
