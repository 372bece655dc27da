"""Recipes: Python files whose `config` is the whole description of a run."""

import difflib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import TypeVar

from llama_jax.errors import UserError

Config = TypeVar("Config")

# In a checkout, the recipes beside the package are found from any folder.
_CHECKOUT = Path(__file__).resolve().parent.parent / "experiments"


def load_recipe(name: str, expected: type[Config]) -> Config:
    """The value called `config` in a recipe.

    Args:
      name: path of a Python file, or the bare name of one in ./experiments.
      expected: the class that the config must have.

    Raises:
      UserError: there is no such file, it cannot be run, or its `config` is missing or of another class.
    """
    path = _find(name)
    module = _execute(path)
    config = getattr(module, "config", None)
    if config is None:
        raise UserError(f"{path} defines no `config`; a recipe ends in `config = {expected.__name__}(...)`")
    if not isinstance(config, expected):
        raise UserError(f"`config` in {path} is a {type(config).__name__}; this verb needs a {expected.__name__}")
    return config


def list_recipes() -> list[Path]:
    """The recipes in ./experiments and in the checkout this code runs from, sorted: the files there that set `config`."""
    folders = {Path("experiments").resolve(), _CHECKOUT}
    files = (path for folder in folders if folder.is_dir() for path in folder.glob("[!_]*.py"))
    return sorted(path for path in files if re.search(r"^config\b.*=", path.read_text(encoding="utf-8"), re.M))


def _find(name: str) -> Path:
    candidates = [Path(name), Path("experiments") / f"{name}.py", _CHECKOUT / f"{name}.py", _CHECKOUT.parent / name]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    nearby = {path.stem: path for path in (*sorted(Path(name).parent.glob("[!_]*.py")), *list_recipes())}
    close = difflib.get_close_matches(Path(name).stem, nearby, n=1)
    hint = f"did you mean {nearby[close[0]]}? " if close else ""
    found = f"recipes here: {', '.join(sorted(nearby))}" if nearby else "there are no recipes in ./experiments"
    raise UserError(f"no recipe at {name}; {hint}{found}")


def _execute(path: Path):
    # A recipe may derive from another one in its folder. Behind everything else, so that no recipe hides a library.
    for folder in (path.parent, path.parent.parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; a recipe's name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in a recipe look themselves up here
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_location(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _location(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
