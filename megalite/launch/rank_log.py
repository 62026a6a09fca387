"""Per-rank log files: copies of a rank's stdout and stderr, which other launchers send to one shared console.

`launch_local` gives each rank its own log. Under other launchers each rank copies its Python streams to a file. Output
that C libraries write directly goes to the console alone: capturing it would take a pipe and another process, and a
rank's last lines would be lost with that process.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast


class _Tee:
    """A stream that also writes to a log; every other attribute is the stream's."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream = stream
        self._log: TextIO | None = log

    def write(self, text: str) -> int:
        """Write to the stream and the log; a log that fails is reported once and is not an error."""
        written = self._stream.write(text)
        if self._log is not None:
            try:
                self._log.write(text)
            except (OSError, ValueError) as error:
                self._log = None
                reason = error.strerror if isinstance(error, OSError) else error
                self._stream.write(f"megalite: the log of this rank cannot be written any more: {reason}\n")
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


def tee_to_log(path: Path, *, rank: int, stdout: bool) -> None:
    """From now on also append this process's stderr, and with `stdout` its stdout, to the file `path`.

    A file that cannot be written is reported on stderr and is not an error.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"--- {now}: rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
    except OSError as error:
        sys.stderr.write(f"megalite: warning: {path}: this rank has no log: {error.strerror}\n")
        return
    sys.stderr = cast(TextIO, _Tee(sys.stderr, log))
    if stdout:
        sys.stdout = cast(TextIO, _Tee(sys.stdout, log))
