"""Paths among a verb's arguments and options: ``~`` and variables in all of them are expanded here.

A shell leaves what stands in quotes, and ``~`` after an equals sign, as it is typed: ``--output=~/corpus``.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from megalite.errors import UserError
from megalite.paths import expand


def expand_paths(app: typer.Typer) -> None:
    """Have every verb of an app, and of the apps within it, called with its paths expanded.

    A path that cannot be expanded is a UserError that names the argument.
    """
    for verb in app.registered_commands:
        if verb.callback is not None:
            verb.callback = _with_expanded_paths(verb.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            expand_paths(group.typer_instance)


def _with_expanded_paths(verb: Callable[..., Any]) -> Callable[..., Any]:
    names = {name: _shown(name, parameter) for name, parameter in inspect.signature(verb).parameters.items()}

    @wraps(verb)
    def called(**given: Any) -> Any:
        return verb(**{name: _expanded(value, names[name]) for name, value in given.items()})

    return called


def _expanded(value: Any, name: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_expanded(each, name) for each in value)
    if not isinstance(value, Path):
        return value
    try:
        return Path(expand(str(value)))
    except ValueError as error:
        raise UserError(f"{name}={str(value)!r}{error}") from None


def _shown(name: str, parameter: inspect.Parameter) -> str:
    """Return what the user knows a parameter by: the metavar of an argument, the name of an option."""
    for told in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(told, typer.models.ArgumentInfo):
            return str(told.metavar or name.upper())
        if isinstance(told, typer.models.OptionInfo) and told.param_decls:
            return told.param_decls[0]
    return f"--{name.replace('_', '-')}"
