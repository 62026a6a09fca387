"""What the sections of the run file are built from: kinds of values, and the section itself."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, PlainSerializer, model_validator
from pydantic.fields import FieldInfo

from megalite.paths import escape
from megalite.settings.validation import Fault, FaultsError
from megalite.settings.values import FLAG, NOT_NEGATIVE, PATH_TEXT, POSITIVE, Kind, number, path_text, whole


def _path(value: Any) -> Path:
    return value if isinstance(value, Path) else Path(path_text(value))


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+", value):
        raise ValueError
    return value


def _counts(value: Any) -> list[int]:
    return [whole(1).read(item) for item in (value if isinstance(value, list | tuple) else (None,))]


def _count_or_auto(value: Any) -> int | str:
    return value if value == "auto" else COUNT.read(value)


def _dropout(value: Any) -> float:
    probability = number(0, most=1).read(value)
    if probability == 1.0:
        raise ValueError
    return probability


PATH = Kind("a path", _path)
COUNTS = Kind("a list of integers of at least 1", _counts)
COUNT = whole(1)
COUNT_OR_AUTO = Kind("an integer of at least 1, or 'auto'", _count_or_auto)
INDEX = whole(0)
NAME = Kind("a name of letters, digits, '.', '_' and '-'", _name)

SHARE = number(0, most=1)
DROPOUT = Kind("a number from 0 to below 1", _dropout)

Count = Annotated[int, COUNT]
Index = Annotated[int, INDEX]
Flag = Annotated[bool, FLAG]
PositiveNumber = Annotated[float, POSITIVE]
Number = Annotated[float, NOT_NEGATIVE]
FilePath = Annotated[Path, PATH, PlainSerializer(escape, str, when_used="json")]
PathText = Annotated[str, PATH_TEXT, PlainSerializer(escape, str, when_used="json")]
"""Written so that a path reads back as it is."""
Share = Annotated[float, SHARE]
Dropout = Annotated[float, DROPOUT]
Name = Annotated[str, NAME]


class Section(BaseModel, frozen=True, extra="forbid"):
    """A section of the run file: a key that is not a field is an error, and null means not given."""

    def faults(self) -> Iterator[Fault]:
        """Find what is wrong between the section's own keys; `Fault.key` is relative to the section."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in fields_of(cls)}

    @model_validator(mode="after")
    def _raise_faults(self) -> "Section":
        if found := list(self.faults()):
            raise FaultsError(found)
        return self


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the keys that stand for them."""
    return {info.alias or name: info for name, info in section.model_fields.items() if name != "origin"}


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a field's annotation names, outermost first."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def divisors(size: int) -> list[int]:
    """Return what divides `size`, from 1 on."""
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]
