"""Read the batches of the next steps in a thread, while the present step computes."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``read(step)`` for the next `depth` steps in a thread, so that a training step does not wait for data."""

    def __init__(self, read: Callable[[int], T], *, depth: int, last: int) -> None:
        self._read, self._depth, self._last = read, depth, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead") if depth else None
        self._under_way: dict[int, Future[T]] = {}
        self.waited = 0.0
        """Seconds that the last `take` took."""

    def take(self, step: int) -> T:
        """Return what was read for `step`, and have the steps after it read; raises what the reading raised."""
        began = time.perf_counter()
        try:
            if self._thread is None:
                return self._read(step)
            for ahead in range(step, min(step + self._depth, self._last) + 1):
                if ahead not in self._under_way:
                    self._under_way[ahead] = self._thread.submit(self._read, ahead)
            return self._under_way.pop(step).result()
        finally:
            self.waited = time.perf_counter() - began

    def close(self) -> None:
        """Stop reading."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
