"""How the tensors of two models differ, as a table for a message."""

from collections.abc import Iterable, Mapping, Sequence

_SHOWN = 30


def shape_differences(
    wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str, str]]:
    """Return a row for each name whose shapes are not the same: the name, the wanted shape, the one that is held."""

    def shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
        return " x ".join(map(str, shapes[name])) if name in shapes else "missing"

    names = sorted(name for name in {*wanted, *held} if wanted.get(name) != held.get(name))
    return [(name, shown(wanted, name), shown(held, name)) for name in names]


def difference_table(rows: Sequence[tuple[str, str, str]], wanted: str, held: str) -> str:
    """Return rows under the headings `wanted` and `held`, some of them where there are many; ends with a line end."""
    more = [(f"and {len(rows) - _SHOWN:,} more", "", "")] if len(rows) > _SHOWN else []
    return _aligned([("", wanted, held), *rows[:_SHOWN], *more])


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)
