"""What the settings' readers share: kinds of values, faults in them, and where they stand.

A reader collects a `Fault` for each thing wrong and reports them together, a line each, in the form *where, what was
found, what is allowed, the nearest fix*.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from megalite.errors import UserError, if_near
from megalite.paths import expand

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


class Unfit(ValueError):
    """Raised by a `Kind`'s conversion that says itself what is wrong: its text follows the value in the message."""


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


# -------------------------------------------------------------------------------------------------- kinds of values


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: the words of the message, and the conversion, which raises where the value is not that.

    Usable as pydantic metadata: ``steps: Annotated[int, whole(1)]``.
    """

    words: str
    convert: Callable[[Any], Any]

    def read(self, value: object) -> Any:
        """Return the value in its own type; raise ValueError with the words that follow the key in a message."""
        try:
            return self.convert(value)
        except Unfit as error:
            raise ValueError(f"={show(value)}{error}") from None
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"={show(value)} is not {self.words}") from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))


def _require(accepted: bool) -> None:
    if not accepted:
        raise ValueError


def whole(least: int, most: int | None = None) -> Kind:
    """An integer; 5e8 is one too, since people write bucket sizes so."""

    def convert(value: Any) -> int:
        _require(isinstance(value, int | float) and not isinstance(value, bool) and value == int(value))
        _require(value >= least and (most is None or value <= most))
        return int(value)

    return Kind(f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}", convert)


def number(least: float | None = None, *, above: float | None = None, most: float | None = None) -> Kind:
    """A finite number within bounds; a string of digits is none."""

    def convert(value: Any) -> float:
        _require(isinstance(value, int | float) and not isinstance(value, bool))
        _require(abs(value) != float("inf") and value == value)
        _require(least is None or value >= least)
        _require(above is None or value > above)
        _require(most is None or value <= most)
        return float(value)

    if most is not None:
        return Kind(f"a number from {least:g} to {most:g}", convert)
    return Kind(f"a number above {above:g}" if above is not None else f"a number of at least {least:g}", convert)


def choice(*values: str | int) -> Kind:
    """One of a few words or numbers."""

    def convert(value: Any) -> str | int:
        _require(not isinstance(value, bool))
        return values[values.index(value)]

    return Kind(alternatives(values), convert)


def path_text(value: Any) -> str:
    """Return a path's text with ``~`` and variables expanded; raise Unfit where one of them is not known."""
    _require(isinstance(value, str) and bool(value.strip()))
    try:
        return expand(value)
    except ValueError as error:
        raise Unfit(str(error)) from None


def _flag(value: Any) -> bool:
    _require(isinstance(value, bool))
    return value


def _text(value: Any) -> str:
    _require(isinstance(value, str) and bool(value.strip()))
    return value


def _texts(value: Any) -> list[str]:
    _require(isinstance(value, list))
    return [_text(item) for item in value]


def _betas(value: Any) -> list[float]:
    _require(isinstance(value, list | tuple) and len(value) == 2)
    betas = [NOT_NEGATIVE.read(item) for item in value]
    _require(max(betas) < 1)
    return betas


FLAG = Kind("true or false", _flag)
TEXT = Kind("a string", _text)
PATH_TEXT = Kind("a string", path_text)
TEXTS = Kind("a list of strings", _texts)
POSITIVE = number(above=0)
NOT_NEGATIVE = number(0)
BETAS = Kind("two numbers, each at least 0 and under 1", _betas)


# --------------------------------------------------------------------------------------------------------------- files


def read_text(path: Path) -> str:
    """Return a file's text; raise UserError where it is missing, a folder, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        siblings = [entry.name for entry in folder.iterdir() if entry.suffix == path.suffix] if folder.is_dir() else []
        raise UserError(f"{path}: no such file{if_near(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the file is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from None
