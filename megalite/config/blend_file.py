"""A file of weights and prefixes, as Megatron's ``--data-args-path`` takes it: ``30 data/books 70 data/web``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.config.text_file import read_text
from megalite.errors import UserError


def read_weights(path: Path) -> list[dict[str, Any]]:
    """Return the sources that a file lists, as the run file's `data.train` writes them.

    Weight and prefix follow each other, by spaces or lines; a weight is a number above 0 or ``auto``, ``#`` begins a
    comment. Prefixes are relative to the working directory, as in the run file.

    Raises UserError, with the line, for what is no such list.
    """
    words = list(_words(read_text(path)))
    sources = []
    for (line, weight), prefix in zip(words[::2], [*words[1::2], None][: len(words[::2])], strict=True):
        if prefix is None:
            raise UserError(f"{path}:{line}: {weight!r} stands alone at the end; write pairs: weight prefix")
        sources.append({"prefix": prefix[1], "weight": _weight(weight, path, line)})
    if not sources:
        raise UserError(f"{path}: lists no source; write pairs: weight prefix")
    return sources


def _words(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        yield from ((number, word) for word in line.partition("#")[0].split())


def _weight(word: str, path: Path, line: int) -> float | str:
    if word == "auto":
        return word
    try:
        weight = float(word)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{path}:{line}: {word!r} is no weight, a number above 0 or auto; write pairs: weight prefix")
    return weight
