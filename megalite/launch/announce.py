"""Progress messages of the start-up: one line that is rewritten on a terminal, plain lines elsewhere."""

import sys
from typing import TextIO

CLEAR = "\r\x1b[K"
"""Moves the cursor to the start of the line and erases the line."""


def announce(text: str) -> None:
    """Show the current step of the start-up.

    If stdout is a terminal, the text replaces the announcement before, without a line end. Otherwise it is a line on
    stderr, since stdout is for the run's own output.
    """
    if _is_terminal(sys.stdout):
        sys.stdout.write(f"{CLEAR}megalite: {text[:70]} ...")
        sys.stdout.flush()
    else:
        sys.stderr.write(f"megalite: {text}\n")
        sys.stderr.flush()


def clear_announcement() -> None:
    """Erase the announcement that a terminal may show, before a permanent line is printed on stdout."""
    if _is_terminal(sys.stdout):
        sys.stdout.write(CLEAR)
        sys.stdout.flush()


def clear_announcement_before_stderr() -> None:
    """Erase the announcement before a line is printed on stderr; does nothing unless both streams are terminals."""
    if _is_terminal(sys.stdout) and _is_terminal(sys.stderr):
        sys.stdout.flush()
        sys.stderr.write(CLEAR)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # the stream is closed
        return False
