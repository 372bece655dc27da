"""How words on the command line become a function's arguments or a config's fields."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import arg

Config = TypeVar("Config")
Json = Annotated[bool, arg(name="json")]
# A field that is a dataclass or None keeps what the recipe chose, instead of becoming a subcommand.
_NO_SUBCOMMANDS = (tyro.conf.AvoidSubcommands,)


def call(function: Callable, name: str, argv: Sequence[str]) -> Any:
    """Calls a function with the command line as its arguments; its docstring up to "Args:" is the help text."""
    description = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].rstrip()
    return tyro.cli(
        function,
        args=list(argv),
        prog=f"llama-jax {name}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def config_with_flags(config: Config, name: str, description: str, flags: Sequence[str]) -> Config:
    """The config with the fields that flags name overridden; every field is a flag."""
    return tyro.cli(
        type(config),
        default=config,
        args=list(flags),
        prog=f"llama-jax {name}",
        description=description,
        config=_NO_SUBCOMMANDS,
    )


def own_flags(flags_class: type[Config], name: str, description: str, words: Sequence[str]) -> tuple[Config, list[str]]:
    """The flags of a verb that has some beside those of a recipe, and the words that are left for the recipe."""
    return tyro.cli(
        flags_class,
        args=list(words),
        prog=f"llama-jax {name}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
        return_unknown_args=True,
    )


def show_fields(config_class: type, name: str, description: str) -> None:
    """Prints the help of a verb whose flags are the fields of a config, and exits."""
    tyro.cli(config_class, args=["--help"], prog=f"llama-jax {name}", description=description, config=_NO_SUBCOMMANDS)


def with_sources(flags: Sequence[str]) -> list[str]:
    """The flags with --data, alone or with = behind it, in full: --data.sources."""
    return [re.sub("^--data(?==|$)", "--data.sources", flag) for flag in flags]
