"""A file for what a rank says, beside the console that it shares with others.

`launch_local` gives each rank a file of its own. Other launchers put what all ranks say on one console, or where their
own options say: here each rank's Python streams are written to a second place. What libraries in C write themselves
goes to the console alone: nothing of a rank's last words is to depend on another process.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast


class _Both:
    """A stream that keeps in a log what it passes on; in all else it is the stream."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream = stream
        self._log: TextIO | None = log

    def write(self, text: str) -> int:
        """Write to both; a log that takes no more is told once, and is no error."""
        written = self._stream.write(text)
        if self._log is not None:
            try:
                self._log.write(text)
            except (OSError, ValueError) as error:
                self._log = None
                reason = error.strerror if isinstance(error, OSError) else error
                self._stream.write(f"megalite: the log of this rank is not written any more: {reason}\n")
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._stream.flush()
        with suppress(OSError, ValueError):
            if self._log is not None:
                self._log.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_log(path: Path, *, rank: int, stdout: bool) -> None:
    """Write what this process says on stderr from now on, and with `stdout` on stdout too, to the end of a file also.

    A file that cannot be written is told, and is no error.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"--- {now}: rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
    except OSError as error:
        sys.stderr.write(f"megalite: warning: {path}: no log of this rank: {error.strerror}\n")
        return
    sys.stderr = cast(TextIO, _Both(sys.stderr, log))
    if stdout:
        sys.stdout = cast(TextIO, _Both(sys.stdout, log))
