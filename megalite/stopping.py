"""Requests to stop a run: where they come from, and how its ranks agree on one without a message of its own."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP = "STOP"
"""A file of this name in the run's folder asks the run to stop."""
DONE = "DONE.json"
"""What a run leaves that went to its last step."""
STOPPED = "STOPPED.json"
"""What a run leaves that stopped before its last step since it was asked to."""
MAX_MINUTES = "train.max_minutes"

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = (*(number.name for number in _SIGNALS), STOP, MAX_MINUTES)
"""What may ask a run to stop."""


class StopRequests:
    """What this rank was asked, and what all ranks have agreed on.

    A rank sends `asked` along in a sum over all ranks that a step has anyway, and hands that sum to `agree`: thus
    every rank stops after the same step, whichever was asked.
    """

    def __init__(self, file: Path | None = None, minutes: float | None = None) -> None:
        """Heed `file`, which is given to one rank alone, and a time of so many minutes from now."""
        self.agreed: str | None = None
        """The one of `REASONS` for which every rank stops after this step; None as long as nobody was asked."""
        self._file = file
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
        if self._file is not None and self._file.exists():
            self._received.add(STOP)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._received.add(MAX_MINUTES)
        return [float(reason in self._received) for reason in REASONS]

    def agree(self, counts: Sequence[float]) -> None:
        """Take note of the sum of all ranks' `asked`."""
        if self.agreed is None:
            self.agreed = next((reason for reason, count in zip(REASONS, counts, strict=True) if count), None)

    def _receive(self, number: int, frame: object) -> None:
        self._received.add(signal.Signals(number).name)
