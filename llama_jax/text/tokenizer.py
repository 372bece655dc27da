"""The tokenizer of paper section 2.2: SentencePiece BPE with split digits and bytes for unknown characters.

The same trainer settings as Llama 1 and 2, read from their released model. One text cannot be told from another by
this scheme, as in the reference: U+2581 ("▁") is SentencePiece's mark for a space and decodes to a space.
"""

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from llama_jax.errors import UserError

PAPER_TRAINER_FLAGS = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "input_sentence_size": 200_000_000,
    "max_sentence_length": 4192,  # bytes
    "max_sentencepiece_length": 16,  # characters
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
}
FILE_NAME = "tokenizer.model"
_LONGEST_LINE = 1024  # characters; at most 4 bytes each, so that no line exceeds max_sentence_length and is left out
_TRAINING_THREADS = 16  # recorded in the model file: a constant, so that equal text gives equal bytes everywhere


class Tokenizer:
    """Text to ids and back, by one SentencePiece model; equal to the reference on every text."""

    def __init__(self, model_bytes: bytes, name: str = FILE_NAME):
        """Builds from the bytes of a SentencePiece model, called `name` in messages. Raises UserError if unreadable."""
        self.model_bytes = model_bytes
        self._name = name
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError:
            raise UserError(
                f"{name} is not a SentencePiece model ({len(model_bytes)} bytes). "
                f"Expected the {FILE_NAME} of a Llama 1 or 2 model or one made by `llama-jax tokenizer`."
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{name} has no BOS or no EOS piece; documents could not be told apart. Train with both.")

    def __reduce__(self):
        return Tokenizer, (self.model_bytes, self._name)  # data workers receive the bytes, not the C++ object

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a model file, or the tokenizer.model in a folder. Raises UserError where there is none."""
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        try:
            return cls(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(
                f"No tokenizer at {file} ({error.strerror}). Give a {FILE_NAME}, or make one: `llama-jax tokenizer`."
            ) from None

    @classmethod
    def train(cls, texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 32_000) -> "Tokenizer":
        """Trains on texts with the paper's flags, writes the model to `path` (a file name), and returns it.

        Texts are cut into lines, as the reference's were: so a newline is no part of any piece and stays a byte.
        Our choice: longer lines than the trainer accepts (4192 bytes) are cut, not dropped.
        Raises UserError if the texts are empty or cannot give `vocab_size` pieces (saying how many they can give).
        """
        lines = _Lines(texts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                num_threads=_TRAINING_THREADS,
                minloglevel=2,
                **PAPER_TRAINER_FLAGS,
            )
        except Exception as error:
            if lines.error is not None:
                raise lines.error from None
            raise _training_error(error, vocab_size, lines.count) from error
        tokenizer = cls(model.getvalue(), str(path))
        tokenizer.save(path)
        return tokenizer

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the model to a file, or as tokenizer.model into an existing folder; never leaves half a file."""
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(self.model_bytes)
            os.replace(partial, file)
        except OSError as error:
            raise UserError(
                f"Cannot write the tokenizer to {file} ({error.strerror}). Choose a writable --out."
            ) from None
        return file

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the model's bytes, in hexadecimal: what checkpoints and token shards are checked against."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Gives the ids of a text, with BOS before and EOS after it if asked; "<s>" in the text is ordinary text.

        Raises UserError if the text holds half of a surrogate pair, which is no character.
        """
        try:
            # As bytes: a str with an unpaired surrogate would fail inside SentencePiece without saying why.
            ids = self._processor.encode(text.encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text holds an unpaired surrogate, U+{ord(text[error.start]):04X}, at character {error.start}. "
                "Expected Unicode text: replace it, for example by U+FFFD."
            ) from None
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_continued(self, text: str, continuation: str) -> tuple[list[int], int]:
        """Encodes two texts as one, and says how many of the ids hold nothing of the second.

        An id that holds characters of both counts as the second's. No BOS and no EOS.
        Raises UserError as `encode`, and for a model that changes its text, so that its ids' places are not known.
        """
        ids = self.encode(text + continuation, bos=False)
        lengths = self._lengths[ids]
        if self.unk_id in ids:  # whose text the id does not tell
            pieces = self._processor.encode(text + continuation, out_type=str)
            unknown = [i == self.unk_id for i in ids]
            lengths[unknown] = [_length(piece) for piece, which in zip(pieces, unknown, strict=True) if which]
        dummy = int(lengths.sum()) - _length(text + continuation)  # the space that the model puts first
        if ids and dummy not in (0, 1):
            raise UserError(
                f"{self._name} does not keep its text as it is ({dummy:+} bytes), so that no id's place in it is known. "
                "Use a tokenizer with the identity normaliser, such as Llama 2's or one of `llama-jax tokenizer`."
            )
        ends = np.cumsum(lengths)
        return ids, int(np.searchsorted(ends, _length(text) + dummy, side="right")) if text else 0

    def decode(self, ids: Iterable[int]) -> str:
        """Gives the text of ids: control ids and one leading space fall away, broken UTF-8 becomes U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            self._check(i)
        return self._processor.decode(ids)

    def pieces(self) -> list[tuple[str, float]]:
        """Every piece with its score, in the order of ids; "\u2581" stands for a space."""
        p = self._processor
        return [(p.id_to_piece(i), p.get_score(i)) for i in range(self.vocab_size)]

    def stream(self, *, continues: bool = False) -> "StreamingDecoder":
        """Gives a decoder that takes one id at a time; `continues` after other text keeps the leading space."""
        return StreamingDecoder(self, continues)

    def _check(self, i: int) -> None:
        if not 0 <= i < self.vocab_size:
            raise UserError(
                f"Token id {i} is outside the vocabulary of {self._name} (0 to {self.vocab_size - 1}). "
                "Use the tokenizer that the model was trained with."
            )

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int64; not known for an unknown character."""
        return np.array([1 if isinstance(s, int) else len(s.encode()) for s in self._surfaces], np.int64)

    @functools.cached_property
    def _surfaces(self) -> list[str | int]:
        """What each id contributes to a text: a string, or for a byte piece its byte."""
        p = self._processor

        def surface(i: int) -> str | int:
            if p.is_control(i):
                return ""
            if p.is_byte(i):
                return int(p.id_to_piece(i)[3:5], 16)  # "<0x41>"
            return p.decode([i]) if p.is_unknown(i) else p.id_to_piece(i).replace("\u2581", " ")

        return [surface(i) for i in range(self.vocab_size)]


def _length(text: str) -> int:
    """The bytes of a text as SentencePiece has it: "\u2581" is its space."""
    return len(text.replace("\u2581", " ").encode())


class StreamingDecoder:
    """Turns ids into text as they come: no half characters, and all outputs joined equal `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._at_start = not continues
        self._bytes = b""  # byte pieces that do not make a whole character yet

    def push(self, token_id: int) -> str:
        """Takes the next id and gives the text that is now certain, often none. Raises UserError for an unknown id."""
        token_id = int(token_id)
        self._tokenizer._check(token_id)
        surface = self._tokenizer._surfaces[token_id]
        if isinstance(surface, int):
            self._at_start = False
            self._bytes += bytes([surface])
            return self._whole_characters(last=False)
        text = self._whole_characters(last=True)
        if self._at_start and surface:
            self._at_start = False
            if token_id != self._tokenizer.unk_id:
                surface = surface.removeprefix(" ")
        return text + surface

    def finish(self) -> str:
        """Gives what is left once no more ids come: U+FFFD for every byte of an unfinished character."""
        return self._whole_characters(last=True)

    def _whole_characters(self, last: bool) -> str:
        """Takes characters off the front of the waiting bytes; like SentencePiece, one U+FFFD for each broken byte."""
        text = ""
        while self._bytes:
            lead = self._bytes[0]
            size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            if len(self._bytes) < size and not last:
                break
            try:
                text += self._bytes[:size].decode()
            except UnicodeDecodeError:
                text, size = text + "\ufffd", 1
            self._bytes = self._bytes[size:]
        return text


class _Lines:
    """The lines of texts as the trainer wants them; remembers how many and which error ended them."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.count = 0
        self.error: UserError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    for start in range(0, len(line), _LONGEST_LINE):
                        self.count += 1
                        yield line[start : start + _LONGEST_LINE]
        except UserError as error:  # SentencePiece would turn it into an error of its own
            self.error = error


def _training_error(error: Exception, vocab_size: int, lines: int) -> Exception:
    """Turns SentencePiece's failure into a message with the remedy; others are returned as they are."""
    text = str(error)
    if lines == 0:
        return UserError("No text to train a tokenizer on: the sources hold no lines. Check --data.sources.")
    if found := re.search(r"value <= (\d+)", text):
        largest = int(found[1])
        return UserError(
            f"The text is too small for a vocabulary of {vocab_size}: it gives at most {largest} pieces. "
            f"Use --vocab-size {largest} or less, or more text."
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", text):
        return UserError(
            f"A vocabulary of {vocab_size} is too small: the bytes, control pieces and characters of the text alone "
            f"take {found[1]}. Use --vocab-size {found[1]} or more."
        )
    return error
