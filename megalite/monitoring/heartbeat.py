"""What every rank is doing, in a small file of its own in the run's folder, and an end for a rank that does nothing."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

from megalite.files import filesystem_time, partial_path

FOLDER = "heartbeats"
BEAT_SECONDS = 1.0
"""A rank writes at most so often,"""
REST_SECONDS = 10.0
"""and at least so often, though nothing has changed."""
SILENT_SECONDS = 15.0
"""A rank that has written nothing for so long is stopped, gone, or cut off from the folder."""
BEATS_A_SECOND = 100.0
"""All ranks together write at most so many files a second: a folder on a shared disk bears no more."""
HEAD_START_SECONDS = 10.0
"""How much longer than a heart the process groups are to wait for a lost rank."""
_SHOWN = 8
_NEARLY = 0.9
"""Of the time between two beats: a thread wakes up a little early or late."""

Phase = Literal["start", "data", "compute", "update", "evaluate", "save"]
_ORDER: Sequence[str] = get_args(Phase)


class Progress:
    """Where a rank is; told by its work, at no cost, and read by its heart."""

    def __init__(self) -> None:
        self.at: tuple[int, Phase] = (0, "start")
        self.moved_at = time.monotonic()

    def enter(self, phase: Phase, step: int) -> None:
        """Take note that a phase of a step begins."""
        self.at = (step, phase)
        self.moved()

    def moved(self) -> None:
        """Take note that work inside the phase went on."""
        self.moved_at = time.monotonic()

    def seconds_still(self) -> float:
        """Return how long ago the rank last moved."""
        return time.monotonic() - self.moved_at


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last wrote: `time`, when it did, and `moved`, when its work last went on, are seconds since 1970, by
    the clock of the file system once they are read."""

    rank: int
    host: str
    pid: int
    step: int
    phase: Phase
    moved: float
    time: float

    def place(self) -> tuple[int, int]:
        """Return what is larger the further a rank has come."""
        return self.step, _ORDER.index(self.phase)

    def describe(self, now: float) -> str:
        """Say in words who and where the rank is, and for how long."""
        still = f"rank {self.rank} on {self.host}: {self.phase} of step {self.step:,} for {now - self.moved:.0f} s"
        return f"{still}, silent for {now - self.time:.0f} s" if self.is_silent(now) else still

    def is_silent(self, now: float) -> bool:
        return now - self.time > SILENT_SECONDS


def read_beats(run: Path, ranks: int) -> list[Beat]:
    """Return what the first `ranks` ranks of a run last wrote, those aside that wrote nothing.

    The ranks' hosts may have clocks that differ: when a rank wrote is the time of its file, which one clock gives to
    all, and what it says itself of a time counts from there.
    """
    beats = []
    for rank in range(ranks):
        path = run / FOLDER / f"rank_{rank}.json"
        with suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_bytes()))
            numbers = (beat.rank, beat.pid, beat.step, beat.moved, beat.time)
            if beat.phase in _ORDER and all(isinstance(number, int | float) for number in numbers):
                written = path.stat().st_mtime
                beats.append(replace(beat, time=written, moved=written - (beat.time - beat.moved)))
    return beats


def laggards(beats: Sequence[Beat], now: float) -> list[Beat]:
    """Return the ranks that hold the others up: those that are silent, else those that have not come as far.

    While ranks move, they are a second or a step apart, which means nothing: then those that have long stood still.
    """
    if silent := [beat for beat in beats if beat.is_silent(now)]:
        return silent
    newest = max((beat.moved for beat in beats), default=now)
    if now - newest < 3 * BEAT_SECONDS:
        return [beat for beat in beats if newest - beat.moved > REST_SECONDS]
    furthest = max(beat.place() for beat in beats)
    return [beat for beat in beats if beat.place() < furthest]


class Heart:
    """A thread that writes a rank's progress into the run's folder, and ends the rank where there is none.

    A rank in training that has not moved for `timeout` seconds shows the stacks of all its threads and who holds it
    up, and exits with status 1, so that its launcher ends the others: also one that does not move at all any more.
    """

    def __init__(self, run: Path, rank: int, ranks: int, progress: Progress, timeout: float) -> None:
        self._run, self._rank, self._ranks = run, rank, ranks
        self._progress, self._timeout = progress, timeout
        self._host = socket.gethostname()
        self._seconds = min(max(BEAT_SECONDS, ranks / BEATS_A_SECOND), REST_SECONDS / 2)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._written: tuple[tuple[int, Phase], float] | None = None
        self._written_at = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()

    def _live(self) -> None:
        self._beat()
        while not self._closed.wait(BEAT_SECONDS):
            changed = self._written != (self._progress.at, self._progress.moved_at)
            waited = time.monotonic() - self._written_at
            if (changed and waited >= self._seconds * _NEARLY) or waited >= REST_SECONDS:
                self._beat()
            if self._progress.at[1] != "start" and self._progress.seconds_still() > self._timeout:
                self._end()

    def _beat(self) -> None:
        at, moved_at = self._written = self._progress.at, self._progress.moved_at
        self._written_at = time.monotonic()
        now = time.time()
        beat = Beat(self._rank, self._host, os.getpid(), *at, moved=now - (self._written_at - moved_at), time=now)
        path = self._run / FOLDER / f"rank_{self._rank}.json"
        # Not flushed to the disk, which takes time, and worth nothing after a crash of the machine. A disk that is
        # full or away is a matter for those who cannot do without it.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(path)
            partial.write_bytes(json.dumps(asdict(beat)).encode() + b"\n")
            os.replace(partial, path)

    def _end(self) -> None:
        step, phase = self._progress.at
        mark = f"[rank {self._rank} on {self._host}] "
        words = f"no progress for train.timeout_seconds={self._timeout:g} in {phase} of step {step:,}; its stacks:"
        sys.stderr.write(f"{mark}{words}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        now, beats = filesystem_time(self._run / FOLDER), read_beats(self._run, self._ranks)
        found = sorted(laggards(beats, now), key=lambda beat: beat.time)
        lines = [f"held up by {beat.describe(now)}" for beat in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"and {len(found) - _SHOWN:,} more")
        if not found:
            lines.append(f"all {len(beats):,} ranks have come as far and none is silent")
        sys.stderr.write("".join(f"{mark}{line}\n" for line in lines))
        sys.stderr.flush()
        os._exit(1)
