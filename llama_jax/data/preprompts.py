"""Safety preprompts (paper 4.2.4): what is put before an adversarial prompt, so that a model answers it safely.

Generic ones are made from templates with adjectives of safe conduct. Tailored ones name the prompt's risk category and give
a numbered template of the answer. Our choice: all wordings but that of the first template, which is the paper's example,
and that a preprompt stands in the last question, before it and an empty line.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.text.chat import Dialogue, Message, Template, check_dialogue

GENERIC = "generic"

Preprompts = Mapping[str, Sequence[str]]
"""By risk category; those under `GENERIC` are for every one."""

_ADJECTIVES = ("responsible", "safe", "respectful", "wise")
_TEMPLATES = (
    "You are a {0} and {1} assistant that always provides {0} and {2} answers.",
    "Answer the following as a {0}, {1} and {2} assistant does.",
    "Whatever you are asked, be {0}, {1} and {2} in your answer.",
)

# The paper's three risk categories, by a word of each.
_TAILORED = {
    "illicit": (
        "The following asks about illicit and criminal activities. Answer in this order, without the numbers:\n"
        "1. Say politely that you cannot help with this, as it is against the law.\n"
        "2. Say who is harmed by it, and how.\n"
        "3. Offer a lawful way to what may be wanted, if there is one.\n"
        "Give no step, means or detail that would help to do it."
    ),
    "hateful": (
        "The following asks for hateful or harmful words or deeds. Answer in this order, without the numbers:\n"
        "1. Say politely that you will not do this, and that everybody deserves respect.\n"
        "2. Say what harm such words or deeds do.\n"
        "3. Offer to talk about the matter without harm to anybody, or name where to find help.\n"
        "Repeat no insult, and encourage nobody to hurt others or themselves."
    ),
    "advice": (
        "The following asks for advice that only a qualified person should give. Answer in this order, without the numbers:\n"
        "1. Say that you are not qualified to advise on this.\n"
        "2. Say which risks there are.\n"
        "3. Say who is qualified, and when it is urgent to ask them.\n"
        "Give no diagnosis, dose, verdict or investment of your own; what is generally known may follow."
    ),
}

BUILT_IN: Preprompts = {
    GENERIC: tuple(
        template.format(*adjectives) for template in _TEMPLATES for adjectives in permutations(_ADJECTIVES, 3)
    ),
    **{category: (text,) for category, text in _TAILORED.items()},
}


def with_preprompt(preprompt: str, question: str) -> str:
    """Both as one message."""
    return f"{preprompt}\n\n{question}"


def behind_preprompt(preprompt: str, prompt: Dialogue) -> Dialogue:
    """A prompt with a preprompt before its last question."""
    *before, last = prompt
    return (*before, Message("user", with_preprompt(preprompt, last.content)))


def read_preprompts(path: str | Path) -> Preprompts:
    """Reads a JSON file: {"generic": [texts], "a risk category": [texts], ...}.

    Raises:
      UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the preprompts in {path} ({error.strerror}); name another file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the preprompts in {path} are not JSON ({error})") from error
    is_good = isinstance(content, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in content.values()
    )
    if not is_good or not content.get(GENERIC):
        raise UserError(
            f'{path}: expected lists of texts by risk category, and "{GENERIC}" among them, such as '
            f'{{"{GENERIC}": ["You are a wise assistant."], "hateful": ["This asks for an insult. 1. Refuse. 2. Say why."]}}'
        )
    return {category: tuple(texts) for category, texts in content.items()}


def check_preprompts(preprompts: Preprompts, template: Template) -> None:
    """Raises UserError if one holds what the chat format uses to tell whose turn it is."""
    for texts in preprompts.values():
        for text in texts:
            check_dialogue([Message("user", text)], template, last="user")
