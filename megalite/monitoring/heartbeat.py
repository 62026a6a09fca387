"""Heartbeats: every rank writes its progress to a file in the run's folder; a rank without progress is ended."""

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
POLL_SECONDS = 1.0
"""How often the thread checks the rank's progress; also the shortest time between two heartbeats."""
MAX_QUIET_SECONDS = 10.0
"""The longest time between two heartbeats, if nothing has changed."""
SILENT_SECONDS = 15.0
"""A rank that has not written for this time is suspended, dead, or cut off from the folder."""
MAX_WRITES_PER_SECOND = 100.0
"""The largest number of heartbeats per second over all ranks, to limit the load on a shared file system."""
GROUP_EXTRA_SECONDS = 10.0
"""How much longer than the heartbeat thread the process groups wait for a lost rank."""
_SHOWN = 8
_NEARLY = 0.9
"""The fraction of the shortest time between heartbeats that suffices: a thread wakes up a little early or late."""

Phase = Literal["start", "data", "compute", "update", "evaluate", "save"]
_ORDER: Sequence[str] = get_args(Phase)


class Progress:
    """The step and phase of a rank; the rank's work updates it, the heartbeat thread reads it."""

    def __init__(self) -> None:
        self.at: tuple[int, Phase] = (0, "start")
        self.touched_at = time.monotonic()

    def enter(self, phase: Phase, step: int) -> None:
        """Record that a phase of a step begins."""
        self.at = (step, phase)
        self.touch()

    def touch(self) -> None:
        """Record progress within the phase."""
        self.touched_at = time.monotonic()

    def seconds_since_progress(self) -> float:
        """Return the seconds since the rank's last progress."""
        return time.monotonic() - self.touched_at


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The content of a rank's heartbeat file.

    `time` is when the rank wrote it and `moved` when its work last progressed, in seconds since 1970; `read_heartbeats`
    converts both to the clock of the file system.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: Phase
    moved: float
    time: float

    def progress_key(self) -> tuple[int, int]:
        """Return a sort key that grows with the rank's progress: step, then phase."""
        return self.step, _ORDER.index(self.phase)

    def describe(self, now: float) -> str:
        """Describe the rank, its phase and step, and the time since its last progress."""
        text = f"rank {self.rank} on {self.host}: {self.phase} of step {self.step:,} for {now - self.moved:.0f} s"
        return f"{text}, silent for {now - self.time:.0f} s" if self.is_silent(now) else text

    def is_silent(self, now: float) -> bool:
        return now - self.time > SILENT_SECONDS


def read_heartbeats(run: Path, ranks: int) -> list[Heartbeat]:
    """Return the heartbeats of the first `ranks` ranks of a run; ranks without a valid file are left out.

    The clocks of the ranks' hosts may differ. The time of a heartbeat is therefore the modification time of its file,
    by the file system's clock, and the rank's own times are converted relative to it.
    """
    heartbeats = []
    for rank in range(ranks):
        path = run / FOLDER / f"rank_{rank}.json"
        with suppress(OSError, ValueError, TypeError):
            beat = Heartbeat(**json.loads(path.read_bytes()))
            numbers = (beat.rank, beat.pid, beat.step, beat.moved, beat.time)
            if beat.phase in _ORDER and all(isinstance(number, int | float) for number in numbers):
                written = path.stat().st_mtime
                heartbeats.append(replace(beat, time=written, moved=written - (beat.time - beat.moved)))
    return heartbeats


def slow_ranks(heartbeats: Sequence[Heartbeat], now: float) -> list[Heartbeat]:
    """Return the ranks that delay the others: silent ranks, if any; otherwise the ranks with the least progress.

    As long as some rank progresses, a difference of a second or a step is normal: then only ranks without progress for
    a longer time are returned.
    """
    if silent := [beat for beat in heartbeats if beat.is_silent(now)]:
        return silent
    newest = max((beat.moved for beat in heartbeats), default=now)
    if now - newest < 3 * POLL_SECONDS:
        return [beat for beat in heartbeats if newest - beat.moved > MAX_QUIET_SECONDS]
    furthest = max(beat.progress_key() for beat in heartbeats)
    return [beat for beat in heartbeats if beat.progress_key() < furthest]


class HeartbeatThread:
    """A thread that writes a rank's heartbeats into the run's folder, and ends a rank that makes no progress.

    If a rank in training has made no progress for `timeout` seconds, the thread prints the stacks of all threads and
    the ranks that delay this rank, and exits with status 1, so that the launcher ends the other ranks, including
    suspended ones.
    """

    def __init__(self, run: Path, rank: int, ranks: int, progress: Progress, timeout: float) -> None:
        self._run, self._rank, self._ranks = run, rank, ranks
        self._progress, self._timeout = progress, timeout
        self._host = socket.gethostname()
        self._seconds = min(max(POLL_SECONDS, ranks / MAX_WRITES_PER_SECOND), MAX_QUIET_SECONDS / 2)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="heartbeat", daemon=True)
        self._written: tuple[tuple[int, Phase], float] | None = None
        self._written_at = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()

    def _loop(self) -> None:
        self._write()
        while not self._closed.wait(POLL_SECONDS):
            changed = self._written != (self._progress.at, self._progress.touched_at)
            waited = time.monotonic() - self._written_at
            if (changed and waited >= self._seconds * _NEARLY) or waited >= MAX_QUIET_SECONDS:
                self._write()
            if self._progress.at[1] != "start" and self._progress.seconds_since_progress() > self._timeout:
                self._end_rank()

    def _write(self) -> None:
        at, touched_at = self._written = self._progress.at, self._progress.touched_at
        self._written_at = time.monotonic()
        now = time.time()
        moved = now - (self._written_at - touched_at)
        beat = Heartbeat(self._rank, self._host, os.getpid(), *at, moved=moved, time=now)
        path = self._run / FOLDER / f"rank_{self._rank}.json"
        # The file is not flushed to the disk: that takes time, and after a crash of the machine a heartbeat has no use.
        # A full or missing disk is not an error here: metrics and checkpoints report it.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(path)
            partial.write_bytes(json.dumps(asdict(beat)).encode() + b"\n")
            os.replace(partial, path)

    def _end_rank(self) -> None:
        step, phase = self._progress.at
        prefix = f"[rank {self._rank} on {self._host}] "
        message = f"no progress for train.timeout_seconds={self._timeout:g} in {phase} of step {step:,}; its stacks:"
        sys.stderr.write(f"{prefix}{message}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        now, heartbeats = filesystem_time(self._run / FOLDER), read_heartbeats(self._run, self._ranks)
        found = sorted(slow_ranks(heartbeats, now), key=lambda beat: beat.time)
        lines = [f"held up by {beat.describe(now)}" for beat in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"and {len(found) - _SHOWN:,} more")
        if not found:
            lines.append(f"all {len(heartbeats):,} ranks are at the same step and phase, and none is silent")
        sys.stderr.write("".join(f"{prefix}{line}\n" for line in lines))
        sys.stderr.flush()
        os._exit(1)
