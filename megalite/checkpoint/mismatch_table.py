"""Tables of shape mismatches between two models, for error messages."""

from collections.abc import Iterable, Mapping, Sequence

_SHOWN = 30


def shape_mismatches(
    required: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str, str]]:
    """Return a row (name, required shape, found shape) for each tensor whose shapes differ."""

    def shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
        return " x ".join(map(str, shapes[name])) if name in shapes else "missing"

    names = sorted(name for name in {*required, *found} if required.get(name) != found.get(name))
    return [(name, shown(required, name), shown(found, name)) for name in names]


def mismatch_table(rows: Sequence[tuple[str, str, str]], required: str, found: str) -> str:
    """Return the rows under the headings `required` and `found`, at most 30 of them; the text ends with a line end."""
    more = [(f"and {len(rows) - _SHOWN:,} more", "", "")] if len(rows) > _SHOWN else []
    return _aligned([("", required, found), *rows[:_SHOWN], *more])


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)
