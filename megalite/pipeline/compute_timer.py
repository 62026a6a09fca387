"""How long a rank itself is at work. The ranks of a step all take as long, since they wait for the slowest of them."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class OwnTime(Protocol):
    """Adds up the time of what a rank computes, without that in which it waits for others."""

    def measured(self) -> AbstractContextManager[None]:
        """Stand around something that is computed."""
        ...

    def take(self) -> float:
        """Return the seconds since the last call."""
        ...


def own_time(device: torch.device) -> OwnTime:
    """Return the measure of a device; to be used in the thread that calls this."""
    return DeviceTime() if device.type == "cuda" else ThreadTime()


class ThreadTime:
    """The time in which this thread runs, or could and has to wait for a core.

    Linux counts both; elsewhere it is the first alone, and a rank whose core others take seems as fast as its peers.
    Neither has the waits for other ranks, in which the thread sleeps.
    """

    def __init__(self) -> None:
        self._file = _SCHEDSTAT.open("rb", buffering=0) if _SCHEDSTAT.exists() else None
        self._seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        began = self._now()
        yield
        self._seconds += self._now() - began

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _now(self) -> float:
        if self._file is None:
            return time.thread_time()
        running, waiting, _ = os.pread(self._file.fileno(), 64, 0).split()
        return 1e-9 * (int(running) + int(waiting))


class DeviceTime:
    """The time of a GPU's kernels, by events in its stream; the collectives of tensor ranks are among them."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._pairs.append((began, ended))

    def take(self) -> float:
        pairs, self._pairs = self._pairs, []
        if pairs:
            pairs[-1][1].synchronize()
        return 1e-3 * sum(began.elapsed_time(ended) for began, ended in pairs)
