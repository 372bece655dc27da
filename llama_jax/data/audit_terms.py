"""The words that an audit of a corpus looks for (paper 4.1): pronouns, and descriptors of people on five axes.

The paper takes its descriptors from HolisticBias (arXiv 2205.09209), which is a data set of its own and not part of this
program. The lists below are a small choice that holds all that the paper's table names; the whole of HolisticBias can be read
from its descriptors.json.
"""

import json
import os
import re
import unicodedata
from collections.abc import Mapping

from llama_jax.errors import UserError

_THIRD_PERSON = {
    "she": ("she", "her", "hers", "herself"),
    "he": ("he", "him", "his", "himself"),
    "unspecified": ("they", "them", "their", "theirs", "theirself", "themself", "themselves"),
}
PRONOUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "gender": _THIRD_PERSON,
    "person": {
        "1st": ("I", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves"),
        "2nd": ("you", "your", "yours", "yourself", "yourselves"),
        "3rd": (*sum(_THIRD_PERSON.values(), ()), "it", "its", "itself"),
    },
}
NOT_PRONOUNS = frozenset({"US", "IT", "i"})
"""Spellings that are no pronouns. Our choice, where the paper is silent: case does not count, but for the country, the trade
and the letter, which is a variable, a numeral or a part of "i.e." more often than a speaker.
"""

AXES = ("gender_and_sex", "sexual_orientation", "nationality", "race_ethnicity", "religion")
"""The paper's five, in its order and with HolisticBias's names."""

DROPPED = ("straight", "white", "black")
"""Descriptors that the paper does not count, because they are used of other things more often than of people."""

_OWN = {
    "gender_and_sex": "female male feminine masculine transgender trans cisgender nonbinary non-binary intersex androgynous",
    "sexual_orientation": "gay lesbian lgbt lgbtq queer bisexual asexual pansexual homosexual heterosexual straight",
    "nationality": "american bangladeshi brazilian british canadian chinese cuban egyptian ethiopian filipino french german "
    "indian indonesian iranian italian japanese korean mexican nigerian pakistani russian spanish turkish vietnamese",
    "race_ethnicity": "african arab asian black caucasian european hispanic indigenous latin latina latino white",
    "religion": "agnostic atheist buddhist catholic christian hindu jewish mormon muslim pagan protestant religious "
    "secular sikh spiritual",
}
OWN_DESCRIPTORS: dict[str, tuple[str, ...]] = {axis: tuple(terms.split()) for axis, terms in _OWN.items()}

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text in order, as they are spelled: runs of letters and digits.

    Hyphens and apostrophes end a word ("It's" is two, "African-American" too); underscores do only at its ends.
    """
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)  # or an accent written apart would end a word
    words = _WORD.findall(text)
    return [bare for word in words if (bare := word.strip("_"))] if "_" in text else words


def normal(term: str) -> str:
    """A term as it is looked for: its words in lower case with spaces between, so that hyphens do not count."""
    return " ".join(words_of(term)).lower()


def one_axis_each(descriptors: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The descriptors in normal form, each on one axis alone.

    Our choice: what stands on several axes stays on the last of them. The paper drops such duplicates without saying where, and
    its table has lgbt, lgbtq and queer, which HolisticBias lists twice, under orientation and not under gender.
    """
    axis_of = {normal(term): axis for axis, terms in descriptors.items() for term in terms}
    return {
        axis: tuple(dict.fromkeys(term for term in map(normal, terms) if axis_of[term] == axis))
        for axis, terms in descriptors.items()
    }


def read_descriptors(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """Reads the descriptors of the five axes from a JSON file; other axes in it are left out.

    Args:
      path: an object with a list of descriptors for each axis, or HolisticBias's descriptors.json, which has lists by axis
        and bucket, of descriptors or of objects with a field of this name.

    Raises:
      UserError: the file cannot be read, is of another form, or lacks an axis.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--descriptors {path} cannot be read as JSON ({error}); expected {_FORM}") from None
    if not isinstance(found, dict) or (missing := [axis for axis in AXES if axis not in found]):
        what = f"it lacks {', '.join(missing)}" if isinstance(found, dict) else f"it holds a {type(found).__name__}"
        raise UserError(f"--descriptors {path}: {what}; expected {_FORM}")
    return {axis: tuple(_listed(found[axis], f"--descriptors {path}: {axis}")) for axis in AXES}


_FORM = f"an object with a list of descriptors for each of {', '.join(AXES)}, or HolisticBias's descriptors.json"


def _listed(entries: object, where: str) -> list[str]:
    lists = list(entries.values()) if isinstance(entries, dict) else [entries]
    if not lists or not all(isinstance(entry, list) and entry for entry in lists):
        raise UserError(f"{where} is no list of descriptors, or an empty one; expected {_FORM}")
    terms = [entry.get("descriptor") if isinstance(entry, dict) else entry for inner in lists for entry in inner]
    if bad := [term for term in terms if not isinstance(term, str) or not normal(term)]:
        raise UserError(f"{where} holds {bad[0]!r}, which is no word; expected {_FORM}")
    return terms
