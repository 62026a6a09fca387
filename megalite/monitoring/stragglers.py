"""Which ranks take longer than their peers over the same work."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from megalite.parallel.layout import ParallelLayout

WINDOW = 20
"""Steps that are judged together: a single one may be slow for many reasons."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that takes `factor` times as long as the median of the `peers` ranks with the same stages.

    Both times are seconds a step at work, without waits for others.
    """

    rank: int
    seconds: float
    median: float
    peers: int

    @property
    def factor(self) -> float:
        return self.seconds / self.median


class StragglerWatch:
    """Compares ranks that hold the same pipeline stages, since others have other work. One without peers is usual."""

    def __init__(self, layout: ParallelLayout, factor: float) -> None:
        self._factor, self._steps = factor, 0
        self._totals = [0.0] * layout.world_size
        self._groups = layout.groups(*(axis for axis in layout.names if axis != "pipeline"))

    def count(self, seconds: Sequence[float]) -> list[Straggler]:
        """Take note of every rank's time at work in a step; return the stragglers of a window that ends with it."""
        self._steps += 1
        self._totals = [total + one for total, one in zip(self._totals, seconds, strict=True)]
        if self._steps < WINDOW:
            return []
        means = [total / WINDOW for total in self._totals]
        self._steps, self._totals = 0, [0.0] * len(self._totals)
        found = []
        for group in self._groups:
            # Of two ranks the faster says what is usual.
            median = median_low([means[rank] for rank in group])
            found += [
                Straggler(rank, means[rank], median, len(group))
                for rank in group
                if means[rank] > self._factor * median > 0
            ]
        return found
