"""What a start is doing, told from its first second: a line that is rewritten on a terminal, plain lines elsewhere."""

import sys
from typing import TextIO

CLEAR = "\r\x1b[K"
"""Takes the cursor to the start of the line and removes what stands in it."""


def announce(text: str) -> None:
    """Tell what is being done now.

    Where stdout is a terminal the line is written there without an end, over the one before it. Elsewhere it is a
    line of stderr: stdout is left to what the run says of itself.
    """
    if _is_terminal(sys.stdout):
        sys.stdout.write(f"{CLEAR}megalite: {text[:70]} ...")
        sys.stdout.flush()
    else:
        sys.stderr.write(f"megalite: {text}\n")
        sys.stderr.flush()


def end_announcement() -> None:
    """Make room for a line that stays: remove the announcement that a terminal may show."""
    if _is_terminal(sys.stdout):
        sys.stdout.write(CLEAR)
        sys.stdout.flush()


def clear_for_stderr() -> None:
    """The same before a line on stderr, where that is a terminal as well; nothing where no announcement can be."""
    if _is_terminal(sys.stdout) and _is_terminal(sys.stderr):
        sys.stdout.flush()
        sys.stderr.write(CLEAR)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # it is closed
        return False
