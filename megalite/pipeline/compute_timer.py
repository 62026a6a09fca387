"""Compute timer: how long a rank computes in a step, without its waits for other ranks.

The duration of a step is the same on all ranks, since they wait for the slowest. The compute time shows which it is.
"""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class ComputeTimer(Protocol):
    """Sums the time in which a rank computes, without the time in which it waits for other ranks."""

    def measured(self) -> AbstractContextManager[None]:
        """Measure the computation inside the context."""
        ...

    def take(self) -> float:
        """Return the seconds measured since the last call."""
        ...


def compute_timer(device: torch.device) -> ComputeTimer:
    """Return the timer of a device, for use in the calling thread."""
    return DeviceTimer() if device.type == "cuda" else ThreadTimer()


class ThreadTimer:
    """CPU timer: the time in which this thread runs or waits for a core.

    On Linux it has both. On other systems it has the running time alone, so that a rank whose core is shared seems as
    fast as the others. Waits for other ranks are not counted, since the thread sleeps in them.
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


class DeviceTimer:
    """GPU timer: the time of a GPU's kernels between CUDA events, including the collectives of the tensor group."""

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
