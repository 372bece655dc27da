"""Documents tokenised once and kept as arrays of ids, for corpora that are read often or by many machines.

A folder holds index.json (tokenizer, sources, shards) and for every shard NNNNN.tokens.npy (all ids, BOS and EOS
included; uint16 where the vocabulary allows it, else uint32) and NNNNN.ends.npy (int64, where each document ends).
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

INDEX = "index.json"
DEFAULT_SHARD_TOKENS = 1 << 26  # 134 MB of uint16; a writer holds one shard in memory


class TokenShards:
    """Token shards as documents: memory-mapped arrays of ids, read only where touched. Pickles without open files."""

    def __init__(self, folder: str | os.PathLike, tokenizer: Tokenizer):
        """Opens a folder; raises UserError if it is no complete set of shards, or made with another tokenizer."""
        self._folder = Path(folder)
        index = _read_index(self._folder)
        if index is None:
            raise UserError(
                f"No token shards in {folder} (no {INDEX}). Make them: `llama-jax tokenize --out {folder}`."
            )
        if not index["complete"]:
            raise UserError(
                f"The token shards in {folder} are not finished. Start the same `llama-jax tokenize` again."
            )
        if index["tokenizer_sha256"] != tokenizer.sha256:
            raise UserError(
                f"The token shards in {folder} were made with another tokenizer "
                f"(sha256 {index['tokenizer_sha256'][:12]}, vocabulary {index['vocab_size']}) "
                f"than this one ({tokenizer.sha256[:12]}, {tokenizer.vocab_size}). "
                "Use that tokenizer, or tokenise again: `llama-jax tokenize`."
            )
        self._documents = [shard["documents"] for shard in index["shards"]]
        self._tokens = [shard["tokens"] for shard in index["shards"]]
        self._ends = np.cumsum(self._documents)  # the number of the first document of the next shard
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Gives a document's ids, BOS to EOS, uint16 or uint32."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        if shard not in self._open:
            files = [self._folder / f"{shard:05}.{kind}.npy" for kind in ("tokens", "ends")]
            try:
                mode = "r" if self._tokens[shard] else None  # nothing cannot be mapped
                # A plain array over the map: memmap's own slicing costs more than the copy of a document.
                self._open[shard] = tuple(np.asarray(np.load(file, mmap_mode=mode)) for file in files)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"Cannot read shard {files[0]} ({error}). Tokenise again: `llama-jax tokenize`."
                ) from None
        tokens, ends = self._open[shard]
        place = index - int(self._ends[shard]) + self._documents[shard]
        return tokens[int(ends[place - 1]) if place else 0 : int(ends[place])]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}


def write_token_shards(
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    documents_from: Callable[[int], Iterator[np.ndarray]],
    total: int,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    say: Callable[[str], None] = print,
) -> dict:
    """Writes documents as shards of about `shard_tokens` ids and gives the index; goes on where it was interrupted.

    `documents_from(n)` gives the tokenised documents from number n to the last, `total`. A shard stands in the index
    once its files are whole. Raises UserError if `out` holds shards of other sources, tokenizer or size.
    """
    out = Path(out)
    recipe = {
        "sources": list(sources),
        "documents": total,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "shard_tokens": shard_tokens,
    }
    index = _resumed_index(out, recipe)
    if index["complete"]:
        say(f"{out} is complete already: {_summary(index)}")
        return index
    done = sum(shard["documents"] for shard in index["shards"])
    started, done_before = time.monotonic(), done
    waiting, tokens = [], 0
    for document in documents_from(done):
        waiting.append(document)
        tokens += len(document)
        if tokens >= shard_tokens:
            _write_shard(out, index, waiting)
            done += len(waiting)
            waiting, tokens = [], 0
            seconds = (time.monotonic() - started) / (done - done_before) * (total - done)
            say(f"{done}/{total} documents {done / total:.1%} {_summary(index)} eta {seconds / 60:.0f} min")
    if waiting:
        _write_shard(out, index, waiting)
    if not any(shard["tokens"] for shard in index["shards"]):
        raise UserError(f"Nothing to tokenise: all {total} documents of {', '.join(sources)} are empty.")
    index["complete"] = True
    _write_index(out, index)
    say(f"{out}: {_summary(index)}")
    return index


def _summary(index: dict) -> str:
    tokens = sum(shard["tokens"] for shard in index["shards"])
    return f"{len(index['shards'])} shards {tokens / 1e6:.2f}M tokens"


def _read_index(folder: Path) -> dict | None:
    try:
        return json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {folder / INDEX} ({error}). Remove the folder and tokenise again.") from None


def _resumed_index(out: Path, recipe: dict) -> dict:
    index = _read_index(out)
    if index is None:
        return {**recipe, "complete": False, "shards": []}
    changed = [f"{key} {index.get(key)!r}, now {value!r}" for key, value in recipe.items() if index.get(key) != value]
    if changed:
        raise UserError(f"{out} holds token shards of another recipe: {'; '.join(changed)}. Choose another --out.")
    return index


def _write_shard(out: Path, index: dict, documents: list[np.ndarray]) -> None:
    number, dtype = len(index["shards"]), np.dtype(index["dtype"])
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    tokens = np.concatenate(documents).astype(dtype)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind, array in (("tokens", tokens), ("ends", ends)):
            partial = out / f".{number:05}.{kind}.{os.getpid()}.npy"
            np.save(partial, array)
            os.replace(partial, out / f"{number:05}.{kind}.npy")
    except OSError as error:
        raise UserError(f"Cannot write token shards to {out} ({error.strerror}). Choose a writable --out.") from None
    index["shards"].append({"documents": len(documents), "tokens": len(tokens)})
    _write_index(out, index)


def _write_index(out: Path, index: dict) -> None:
    partial = out / f".{INDEX}.{os.getpid()}"
    partial.write_text(json.dumps(index, indent=1) + "\n")
    os.replace(partial, out / INDEX)
