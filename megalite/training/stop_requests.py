"""Requests to stop a run: where they come from, and how its ranks agree on one without a message of its own."""

import signal
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalite.monitoring.run_folder import STOP

MAX_MINUTES = "train.max_minutes"

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = (*(number.name for number in _SIGNALS), STOP, MAX_MINUTES)
"""What may ask a run to stop."""


class StopRequests:
    """What this rank was asked, and what all ranks have agreed on.

    A rank sends `asked` along in a sum over all ranks that a step has anyway, and hands that sum to `agree`: thus
    every rank stops after the same step, whichever was asked.
    """

    def __init__(self, file: Path | None = None, minutes: float | None = None, *, since: float = 0.0) -> None:
        """Heed `file`, which is given to one rank alone, and a time of so many minutes from now.

        A file from before the time `since`, in seconds since 1970, was meant for an earlier start.
        """
        self.agreed: str | None = None
        """The one of `REASONS` for which every rank stops after this step; None as long as nobody was asked."""
        self._file, self._since = file, since
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._received: set[str] = set()

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Take signals that ask to stop for requests; to be entered in the main thread."""
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> list[float]:
        """Return a number for each of `REASONS`: 1 where this rank was asked to stop for it, 0 elsewhere."""
        if self._file is not None and (made := _made(self._file)) is not None and made >= self._since:
            self._received.add(STOP)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._received.add(MAX_MINUTES)
        return [float(reason in self._received) for reason in REASONS]

    def agree(self, counts: Sequence[float]) -> None:
        """Take note of the sum of all ranks' `asked`."""
        if self.agreed is None:
            self.agreed = next((reason for reason, count in zip(REASONS, counts, strict=True) if count), None)

    def discard(self) -> None:
        """Remove the file that asked, if there is one."""
        if self._file is not None and _made(self._file) is not None:
            self._file.unlink()

    def discard_stale(self) -> Path | None:
        """Remove and return the file where it was meant for an earlier start."""
        if self._file is None or (made := _made(self._file)) is None or made >= self._since:
            return None
        self._file.unlink()
        return self._file

    def _receive(self, number: int, frame: object) -> None:
        self._received.add(signal.Signals(number).name)


def _made(file: Path) -> float | None:
    """When a file was last touched; None where there is none, or a folder has its name."""
    try:
        status = file.lstat()
    except OSError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_mtime
