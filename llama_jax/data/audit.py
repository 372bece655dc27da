"""What a corpus says, by document (paper 4.1): who is spoken of, in which languages, and how toxic it is.

Counts are sums of whole numbers over documents, so that neither their order nor the number of processes can change them.
"""

import hashlib
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing import parent_process

import numpy as np

from llama_jax.data.audit_terms import DROPPED, NOT_PRONOUNS, PRONOUNS, normal, one_axis_each, words_of
from llama_jax.data.sources import Documents
from llama_jax.data.text_classifiers import Identify, Score, open_languages, open_toxicity
from llama_jax.errors import UserError

UNKNOWN = "unknown"
LANGUAGE_THRESHOLD = 0.5
TOXIC = 0.5
TOXICITY_BINS = 10


@dataclass(frozen=True)
class AuditConfig:
    """What is looked for in each document."""

    descriptors: dict[str, tuple[str, ...]]
    """By axis."""
    languages: str = ""
    """A fastText model as `open_languages` takes it; none, and languages are not counted."""
    toxicity: str = ""
    """A classifier as `open_toxicity` takes it; none, and nothing is scored."""
    sample: float = 0.1
    """The share of the documents that are scored."""


@dataclass(frozen=True)
class Counts:
    """Of how many documents something is true."""

    documents: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    """That use any pronoun of a group or mention any descriptor of an axis, those that the paper drops aside."""
    with_dropped: Counter[str] = field(default_factory=Counter)
    """The same, by axis, with those that the paper drops."""
    members: Counter[str] = field(default_factory=Counter)
    """That use a pronoun or mention a descriptor, by GROUP/MEMBER."""
    languages: Counter[str] = field(default_factory=Counter)
    """By code, or `unknown`."""
    toxicity: Counter[str] = field(default_factory=Counter)
    """By tenth of the toxicity, from 0; together they are the documents that were scored."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def as_json(self) -> dict[str, int | dict[str, int]]:
        """As JSON can hold it, in an order that does not depend on that of the documents."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: dict(sorted(v.items())) if isinstance(v, Counter) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, int | dict[str, int]]) -> "Counts":
        """The inverse of `as_json`."""
        return cls(**{name: Counter(v) if isinstance(v, dict) else v for name, v in values.items()})


class Auditor:
    """Counts documents; its models are loaded when it is made."""

    def __init__(self, config: AuditConfig):
        """Loads what the config names; raises UserError where that is not possible."""
        self._terms = _Terms(config.descriptors)
        self._identify = open_languages(config.languages) if config.languages else None
        self._score = open_toxicity(config.toxicity) if config.toxicity else None
        self._sample = config.sample

    def count(self, documents: Iterable[str]) -> Counts:
        """Counts some documents; raises UserError if the classifier gives something else than probabilities."""
        counts, seen = Counts(), 0
        for text in documents:
            seen += 1
            mentions = self._terms.mentions(text)
            counts.members.update(f"{group}/{member}" for group, member in mentions)
            counts.groups.update({group for group, member in mentions if member not in DROPPED})
            counts.with_dropped.update({group for group, _ in mentions if group not in PRONOUNS})
            language = language_of(text, self._identify) if self._identify else None
            counts.languages.update([language] if language else [])
            # As the paper: of the English documents, where languages are known.
            if self._score and language in (None, "en") and in_sample(text, self._sample):
                toxicity = toxicity_of(text, self._score)
                counts.toxicity.update([] if toxicity is None else [str(toxicity_bin(toxicity))])
        return counts + Counts(documents=seen)


def language_of(text: str, identify: Identify) -> str:
    """The language of a text, or `unknown` where its probability is below one half."""
    language, probability = identify(text)
    return language if probability >= LANGUAGE_THRESHOLD else UNKNOWN


def toxicity_of(text: str, score: Score) -> float | None:
    """The mean toxicity of a text's lines; None where all are blank. Our choice: blank lines are not scored.

    Raises:
      UserError: the scores are not as many probabilities as there are lines.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    found = score(lines)
    try:
        scores = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"--toxicity gave {found!r:.100} for {len(lines)} lines; expected so many numbers") from None
    if scores.shape != (len(lines),):
        raise UserError(
            f"--toxicity gave an array of shape {scores.shape} for {len(lines)} lines; expected one number each"
        )
    if bad := [value for value in scores.tolist() if not 0 <= value <= 1]:
        raise UserError(f"--toxicity gave {bad[0]} for a line; expected a probability from 0 to 1")
    return math.fsum(scores.tolist()) / len(lines)


def toxicity_bin(toxicity: float) -> int:
    """Which tenth a toxicity lies in, from 0; the bins from 5 on are those of 0.5 and above."""
    return min(int(toxicity * TOXICITY_BINS), TOXICITY_BINS - 1)


def in_sample(text: str, share: float) -> bool:
    """Whether a document is one of the share that is scored: a matter of its text alone, not of its place."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class _Terms:
    """Pronouns and descriptors, by the words that they are found by."""

    def __init__(self, descriptors: Mapping[str, tuple[str, ...]]):
        pronouns = [(word, group, member) for group, of in PRONOUNS.items() for member, ws in of.items() for word in ws]
        terms = [(term, axis, term) for axis, of in one_axis_each(descriptors).items() for term in of]
        self._pronouns = _by_term((normal(word), group, member) for word, group, member in pronouns)
        self._words = _by_term(entry for entry in terms if " " not in entry[0])
        self._phrases = [(frozenset(term.split()), f" {term} ", (axis, term)) for term, axis, _ in terms if " " in term]

    def mentions(self, text: str) -> set[tuple[str, str]]:
        """The (group, member) of all that a text holds."""
        spelled = words_of(text)
        forms = set(spelled)
        words = {form.lower() for form in forms}
        found: set[tuple[str, str]] = set()
        for word in {form.lower() for form in forms - NOT_PRONOUNS} & self._pronouns.keys():
            found.update(self._pronouns[word])
        for word in words & self._words.keys():
            found.update(self._words[word])
        if phrases := [(phrase, mention) for parts, phrase, mention in self._phrases if parts <= words]:
            line = f" {' '.join(spelled).lower()} "
            found.update(mention for phrase, mention in phrases if phrase in line)
        return found


def _by_term(entries: Iterable[tuple[str, str, str]]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for term, group, member in entries:
        found.setdefault(term, []).append((group, member))
    return found


# What a worker process holds between two tasks, set once when it starts: ProcessPoolExecutor has no other place for it.
_worker: Callable[[int, int, int], Counts] | None = None


def start_worker(sources: Sequence[Documents], config: AuditConfig) -> None:
    """Makes this process ready for `count_part`; it ends with the process that started it, and leaves Ctrl-C to that."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the threads of all workers' models would share the cores
    _worker = part_counter(sources, Auditor(config))


def count_part(source: int, first: int, last: int) -> Counts:
    """Counts the documents from `first` to `last` (exclusive) of a source, in a worker process."""
    return _worker(source, first, last)


def part_counter(sources: Sequence[Documents], auditor: Auditor) -> Callable[[int, int, int], Counts]:
    """Gives what counts the documents from one number to another (exclusive) of the source of a number."""
    return lambda source, first, last: auditor.count(map(sources[source].__getitem__, range(first, last)))


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
