"""Errors in settings: each names where it stands, what was found, what is allowed and the nearest fix.

A reader collects a `Fault` for each error and reports them together, a line each.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from megalite.errors import UserError

Key = tuple[str | int, ...]

_LONGEST_SHOWN = 60


def show(value: object) -> str:
    """Return a value as its file writes it, short enough for one line."""
    if isinstance(value, Mapping):
        return "{...}"
    if isinstance(value, list | tuple):
        text = f"[{', '.join('[...]' if isinstance(item, list | tuple) else show(item) for item in value)}]"
    elif isinstance(value, str):
        text = repr(value)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def alternatives(values: Iterable[object]) -> str:
    """Return ``1, 2, 4 or 8``."""
    shown = [show(value) for value in values]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong: the key it concerns, and the words that follow the key in the message."""

    key: Key
    text: str


class FaultsError(ValueError):
    """Faults found together; a ValueError so that a pydantic validator can raise it."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(f"{'.'.join(map(str, fault.key))}{fault.text}" for fault in self.faults))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where settings were written, so that a message names the file and the key as the user knows them.

    All origins compare equal: where a value stands is no part of what it is.
    """

    file: str = field(default="run.yaml", compare=False)
    """Name of the file."""
    section: tuple[str, ...] = field(default=(), compare=False)
    """Where the settings stand in the run file: ``("deepspeed",)`` for the JSON."""
    own_file: bool = field(default=False, compare=False)
    """The settings have a file to themselves, whose keys do not repeat `section`."""
    overrides: tuple[tuple[str, ...], ...] = field(default=(), compare=False)
    """Keys given on the command line."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the reader made of settings that could not stand as they were; a line each, for the user."""

    def line(self, fault: Fault) -> str:
        """Return the message: where, the key, what is wrong with it."""
        key = tuple(map(str, fault.key))
        full = (*self.section, *key)
        typed = bool(key) and any(full[: len(given)] == given[: len(full)] for given in self.overrides)
        where = "command line" if typed else self.file
        return f"{where}: {'.'.join(key if self.own_file and not typed else full)}{fault.text}"


def report(lines: Sequence[str]) -> None:
    """Raise a UserError of one line a fault, each said once; return where there is none."""
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def validation_lines(error: ValidationError, *, below: int = 0, whole: str = "the file") -> list[str]:
    """Return ``where: what is wrong`` for each error that pydantic found, in its order.

    `below` is how many of the first parts of a place the user did not write; `whole` names the place that has no parts.
    """
    lines = []
    for found in error.errors(include_url=False):
        where = ".".join(map(str, found["loc"][below:])) or whole
        raised = found.get("ctx", {}).get("error") if found["type"] == "value_error" else None
        text = str(raised or found["msg"])
        lines.append(f"{where}{text}" if text.startswith(("=", " ")) else ": ".join(filter(None, (where, text))))
    return lines
