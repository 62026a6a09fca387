"""Kinds of values in run files and the DeepSpeed JSON: what a value may be, and how it is read."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from megalite.paths import expand
from megalite.settings.validation import alternatives, show


class Unfit(ValueError):
    """Raised by a `Kind`'s conversion that says itself what is wrong: its text follows the value in the message."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: the words of the message, and the conversion, which raises where the value is not that.

    Usable as pydantic metadata: ``steps: Annotated[int, whole(1)]``.
    """

    words: str
    convert: Callable[[Any], Any]
    json_schema: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What a JSON schema says of the value beside its type."""

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

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        given = [one for one in found.get("anyOf", ()) if one != {"type": "null"}]
        return {**(given[0] if len(given) == 1 else found), **self.json_schema}


def require(accepted: bool) -> None:
    if not accepted:
        raise ValueError


def whole(least: int, most: int | None = None) -> Kind:
    """An integer; 5e8 is one too, since people write bucket sizes so."""

    def convert(value: Any) -> int:
        require(isinstance(value, int | float) and not isinstance(value, bool) and value == int(value))
        require(value >= least and (most is None or value <= most))
        return int(value)

    words = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    return Kind(words, convert, _bounds(minimum=least, maximum=most))


def number(least: float | None = None, *, above: float | None = None, most: float | None = None) -> Kind:
    """A finite number within bounds; a string of digits is none."""

    def convert(value: Any) -> float:
        require(isinstance(value, int | float) and not isinstance(value, bool))
        require(abs(value) != float("inf") and value == value)
        require(least is None or value >= least)
        require(above is None or value > above)
        require(most is None or value <= most)
        return float(value)

    words = f"a number above {above:g}" if above is not None else f"a number of at least {least:g}"
    if most is not None:
        words = f"a number from {least:g} to {most:g}"
    return Kind(words, convert, _bounds(minimum=least, exclusiveMinimum=above, maximum=most))


def _bounds(**bounds: float | None) -> dict[str, float]:
    return {name: bound for name, bound in bounds.items() if bound is not None}


def choice(*values: str | int, other_names: Mapping[str, str] | None = None) -> Kind:
    """One of a few words or numbers.

    `other_names` are words of other trainers, with the value that each of them means: the message offers it, as it does
    a value that differs in capitals, hyphens or a slip.
    """
    words = alternatives(values)

    def convert(value: Any) -> str | int:
        if not isinstance(value, bool) and value in values:
            return values[values.index(value)]
        raise Unfit(f" is not {words}{nearest_value(value, values, other_names or {})}")

    return Kind(words, convert, {"enum": list(values)})


def nearest_value(value: object, values: Sequence[str | int], other_names: Mapping[str, str]) -> str:
    """Return ``; did you mean 'x'?`` for the value that another is meant for, and nothing where none is close."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    text = str(value).strip().lower()
    if text in other_names:
        return f"; did you mean {show(other_names[text])}?"
    same = {re.sub(r"[-_ ]", "", str(one)).lower(): one for one in values}
    close = get_close_matches(re.sub(r"[-_ ]", "", text), same, n=1, cutoff=0.8)
    return f"; did you mean {show(same[close[0]])}?" if close else ""


def path_text(value: Any) -> str:
    """Return a path's text with ``~`` and variables expanded; raise Unfit where one of them is not known."""
    require(isinstance(value, str) and bool(value.strip()))
    try:
        return expand(value)
    except ValueError as error:
        raise Unfit(str(error)) from None


def _flag(value: Any) -> bool:
    require(isinstance(value, bool))
    return value


def _text(value: Any) -> str:
    require(isinstance(value, str) and bool(value.strip()))
    return value


def _texts(value: Any) -> list[str]:
    require(isinstance(value, list))
    return [_text(item) for item in value]


def _betas(value: Any) -> list[float]:
    require(isinstance(value, list | tuple) and len(value) == 2)
    betas = [NOT_NEGATIVE.read(item) for item in value]
    require(max(betas) < 1)
    return betas


FLAG = Kind("true or false", _flag)
TEXT = Kind("a string", _text)
PATH_TEXT = Kind("a string", path_text)
TEXTS = Kind("a list of strings", _texts)
POSITIVE = number(above=0)
NOT_NEGATIVE = number(0)
BETAS = Kind("two numbers, each at least 0 and under 1", _betas)
