"""What a search for contamination has found so far, kept so that it goes on where it was stopped (paper A.6)."""

import dataclasses
import io
import math
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError
from llama_jax.evaluation.contamination_corpus import Found, Shard, join
from llama_jax.training.metrics import format_count, format_duration
from llama_jax.training.run_folder import write_whole

_WRITING = 0.05  # share of the time that may go into keeping what is done


class Progress:
    """Joins what shards hold of the samples, in one array however many shards there are, and keeps it in a file."""

    def __init__(self, path: Path, recipe: str, sample_tokens: int, shards: Sequence[Shard]):
        """Takes up what the file holds, if there is one.

        Args:
          path: of the file.
          recipe: what decides the result; a file that was begun with another one is none of this search.
          sample_tokens: of all samples together.
          shards: the whole corpus.

        Raises:
          UserError: the file cannot be read, or belongs to another search.
        """
        self._path, self._recipe = path, recipe
        self.longest = np.zeros(sample_tokens, np.int32)
        kept = _read(path, recipe) if path.exists() else join([])
        self.longest[kept.places] = kept.lengths
        self._done, self.documents, self.tokens = list(kept.shards), kept.documents, kept.tokens
        self.left = [shard for shard in shards if shard.number not in set(kept.shards)]
        self._shards, self._total = len(shards), sum(shard.last - shard.first for shard in shards)
        self._began, self._before = time.monotonic(), (kept.documents, kept.tokens)
        self._written, self._writing = -math.inf, 0.0

    def add(self, found: Found) -> None:
        """Joins what some shards hold, and writes it down; not after every shard where these pass faster than that."""
        self.longest[found.places] = np.maximum(self.longest[found.places], found.lengths)
        self._done += found.shards
        self.documents += found.documents
        self.tokens += found.tokens
        now = time.monotonic()
        if now - self._written > self._writing / _WRITING or len(self._done) == self._shards:
            places = np.flatnonzero(self.longest)
            _write(
                self._path,
                Found(tuple(self._done), self.documents, self.tokens, places, self.longest[places]),
                self._recipe,
            )
            self._written, self._writing = time.monotonic(), time.monotonic() - now

    def line(self) -> str:
        """How far it is, for people."""
        seconds = max(1e-9, time.monotonic() - self._began)
        documents, tokens = self.documents - self._before[0], self.tokens - self._before[1]
        left = seconds * (self._total - self.documents) / max(1, documents)
        return (
            f"{self.documents}/{self._total} documents {self.documents / self._total:.1%} {format_count(self.tokens)} tokens "
            f"{format_count(tokens / seconds)} tok/s, matches begin at {np.count_nonzero(self.longest)} of the samples' "
            f"{len(self.longest)} tokens, eta {format_duration(left)}"
        )


def _write(path: Path, found: Found, recipe: str) -> None:
    content = io.BytesIO()
    np.savez(content, recipe=np.array(recipe), **dataclasses.asdict(found))
    write_whole(path, content.getvalue())


def _read(path: Path, recipe: str) -> Found:
    try:
        with np.load(path) as file:
            kept = {name: file[name] for name in file.files}
        found = Found(*(kept[field.name] for field in dataclasses.fields(Found)))
        found = dataclasses.replace(
            found, shards=tuple(found.shards.tolist()), documents=int(found.documents), tokens=int(found.tokens)
        )
        earlier = str(kept["recipe"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to search anew, or name another --out") from error
    if earlier != recipe:
        raise UserError(f"{path} holds a search of other samples, sources or tokenizer; name another --out")
    return found
