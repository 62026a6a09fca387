"""Progress bars on stderr; where stderr is no terminal they are silent, and rich is not even imported."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs; yields a function to be told the bytes done and the bytes in all."""
    with _bar(description, in_bytes=True, shown="") as tell:
        yield lambda done, total: tell(done, total, "")


@contextmanager
def count_progress(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs; yields a function to be told how many are done and how many there are."""
    with _bar(description, in_bytes=False, shown=unit) as tell:
        yield lambda done, total: tell(done, total, unit)


@contextmanager
def token_progress(description: str) -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar while the body runs; yields a function to be told bytes done, bytes in all, and tokens made."""
    started = time.perf_counter()
    with _bar(description, in_bytes=True, shown="") as tell:
        yield lambda done, total, tokens: tell(
            done, total, f"{tokens / max(time.perf_counter() - started, 1e-9):,.0f} tokens/s"
        )


@contextmanager
def _bar(description: str, *, in_bytes: bool, shown: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function to be told what is done, what there is, and a word beside them.

    The bar is drawn when it is told something and has no thread of its own: the body may fork.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, word: None
        return
    from rich import progress
    from rich.console import Console

    amounts = (progress.DownloadColumn(), progress.TransferSpeedColumn()) if in_bytes else ()
    amounts = amounts or (progress.MofNCompleteColumn(),)
    columns = (
        *(progress.TextColumn(description), progress.BarColumn(), *amounts),
        *(progress.TextColumn("{task.fields[word]}"), progress.TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(description, total=None, word=shown)
        drawn = 0.0

        def tell(done: int, total: int, word: str) -> None:
            nonlocal drawn
            seconds = bar.tasks[0].elapsed or 0.0
            if seconds - drawn >= 0.1 or done >= total:
                drawn = seconds
                bar.update(task, completed=done, total=total, word=word, refresh=True)

        yield tell
