"""Progress bars on stderr; silent where stderr is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def byte_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs; yields a function to be told the bytes done and the bytes in all."""
    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def count_progress(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs; yields a function to be told how many are done and how many there are."""
    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def token_progress(description: str) -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar while the body runs; yields a function to be told bytes done, bytes in all, and tokens made.

    The bar is drawn when it is told something and has no thread of its own: the body may fork.
    """
    console = Console(stderr=True)
    columns = (
        *(TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        *(TextColumn("{task.fields[speed]}"), TimeRemainingColumn()),
    )
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=None, speed="")
        drawn = 0.0

        def tell(done: int, total: int, tokens: int) -> None:
            nonlocal drawn
            seconds = bar.tasks[0].elapsed or 0.0
            if seconds - drawn >= 0.1 or done == total:
                drawn = seconds
                speed = f"{tokens / seconds:,.0f} tokens/s" if seconds else ""
                bar.update(task, completed=done, total=total, speed=speed, refresh=True)

        yield tell
