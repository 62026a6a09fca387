"""Generated texts on the console or in a file: one as it is made, several one by one, with a bar beside a file."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalite.cli.progress import count_progress

if TYPE_CHECKING:
    from megalite.generation.request import Job
    from megalite.generation.sequence import Continuation

Hearer = Callable[["Continuation", str], object]
"""What is told of every token: its row, and the text that became certain."""


def nobody(row: "Continuation", piece: str) -> None:
    """Hear what a token has added to a row, and say nothing of it."""


@contextmanager
def audience(job: "Job", as_json: bool, output: Path | None) -> Iterator[Hearer]:
    """Yield what is told of every token: it shows one text as it comes, and several one by one as they end."""
    first, *others = job.prompts
    with _writer(output) as write:
        if not (others or as_json or output is not None):
            write(first.text)
            yield lambda row, piece: write(piece)
            write("\n")
            return
        form = _as_json if as_json else _as_text
        # A bar and texts on one terminal would write over each other.
        with _token_count(job) if output is not None or not sys.stdout.isatty() else nullcontext(nobody) as count:
            whole = _InOrder(lambda row: write(form(row, len(job.prompts))))

            def hear(row: "Continuation", piece: str) -> None:
                count(row, piece)
                if row.reason is not None:
                    whole.add(row)

            yield hear


@contextmanager
def _writer(output: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield what writes text: to the console at once, or into a file that has its name when all is written."""
    from megalite.files import partial_path, publish, writing

    if output is None:
        yield partial(typer.echo, nl=False)
        return
    growing = partial_path(output)
    with writing(output, "give another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with growing.open("w", encoding="utf-8") as file:
                yield file.write
            publish(growing, output)
        finally:
            growing.unlink(missing_ok=True)


@contextmanager
def _token_count(job: "Job") -> Iterator[Hearer]:
    """Show a bar of the tokens made, of those that there may yet be."""
    most = job.limits.max_new_tokens
    done, total = 0, most * len(job.prompts)
    with count_progress("generating", "tokens") as tell:

        def count(row: "Continuation", piece: str) -> None:
            nonlocal done, total
            done += 1
            total -= most - len(row.tokens) if row.reason is not None else 0
            tell(done, total)

        yield count


class _InOrder:
    """Hands texts on in the order of their prompts, each as soon as those before it have ended."""

    def __init__(self, show: Callable[["Continuation"], object]) -> None:
        self._show = show
        self._waiting: dict[int, Continuation] = {}
        self._next = 0

    def add(self, row: "Continuation") -> None:
        self._waiting[row.number] = row
        while self._next in self._waiting:
            self._show(self._waiting.pop(self._next))
            self._next += 1


def _as_text(row: "Continuation", prompts: int) -> str:
    mark = "" if prompts == 1 else f"{'' if row.number == 0 else chr(10)}[{row.number + 1}/{prompts}]\n"
    return f"{mark}{row.prompt.text}{row.text}\n"


def _as_json(row: "Continuation", prompts: int) -> str:
    return json.dumps(row.record(), ensure_ascii=False) + "\n"


def summary(rows: Sequence["Continuation"], seconds: float) -> str:
    """Return the closing line."""
    tokens = sum(len(row.tokens) for row in rows)
    speed = f"{tokens:,} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s"
    return f"{speed}; ended by {rows[0].reason}" if len(rows) == 1 else f"{len(rows):,} prompts, {speed}"
