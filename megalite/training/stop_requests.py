"""Stop requests by signal, file or time limit; all ranks agree on a request in an all-reduce that a step has anyway."""

import signal
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalite.monitoring.run_folder import STOP

MAX_MINUTES = "train.max_minutes"

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = (*(number.name for number in _SIGNALS), STOP, MAX_MINUTES)
"""The sources of stop requests."""


class StopRequests:
    """The stop requests that this rank received, and the request on which all ranks agreed.

    Each step all-reduces the `local_flags` of all ranks together with the loss, and passes the sum to `synchronize`. So
    every rank stops after the same step, whichever rank received the request.
    """

    def __init__(self, file: Path | None = None, minutes: float | None = None, *, since: float = 0.0) -> None:
        """Stop at the existence of `file`, which only one rank watches, or after `minutes` from now.

        A file that is older than `since`, in seconds since 1970, is a request to an earlier start and is ignored.
        """
        self.agreed: str | None = None
        """The request, one of `REASONS`, for which all ranks stop after this step; None without a request."""
        self._file, self._since = file, since
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._received: set[str] = set()

    @contextmanager
    def signal_handlers(self) -> Iterator[None]:
        """Handle signals as stop requests inside the context. In another thread than the main one signals are not
        handled, since Python allows it there alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def local_flags(self) -> list[float]:
        """Return a flag for each of `REASONS`: 1 where this rank received the request, else 0."""
        if self._file is not None and (made := _made(self._file)) is not None and made >= self._since:
            self._received.add(STOP)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._received.add(MAX_MINUTES)
        return [float(reason in self._received) for reason in REASONS]

    def synchronize(self, counts: Sequence[float]) -> None:
        """Set `agreed` from the sum of all ranks' `local_flags`."""
        if self.agreed is None:
            self.agreed = next((reason for reason, count in zip(REASONS, counts, strict=True) if count), None)

    def discard(self) -> None:
        """Remove the stop file, if there is one."""
        if self._file is not None and _made(self._file) is not None:
            self._file.unlink()

    def discard_stale_file(self) -> Path | None:
        """Remove and return the stop file if it is a request to an earlier start."""
        if self._file is None or (made := _made(self._file)) is None or made >= self._since:
            return None
        self._file.unlink()
        return self._file

    def _receive(self, number: int, frame: object) -> None:
        self._received.add(signal.Signals(number).name)


def _made(file: Path) -> float | None:
    """Return the modification time of a file; None where it does not exist or is a folder."""
    try:
        status = file.lstat()
    except OSError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_mtime
