"""Python functions that a command names: FILE.py:NAME or MODULE:NAME."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import UserError


def load_function(spec: str, flag: str) -> Callable:
    """The function of that name.

    Args:
      spec: FILE.py:NAME or MODULE:NAME.
      flag: what it was named with, for messages.

    Raises:
      UserError: there is no such file, module or function.
    """
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name):
        raise UserError(f"{flag} {spec} names no function; expected FILE.py:NAME or MODULE:NAME")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UserError(f"{flag} {spec}: no file {place}; expected FILE.py:NAME or MODULE:NAME")
        found = importlib.util.spec_from_file_location("llama_jax_named_function", place)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # found, and something that it imports is missing
            raise UserError(f"{flag} {spec}: no module {place}; expected FILE.py:NAME or MODULE:NAME") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{flag} {spec}: {place} has no function {name}")
    return function
