"""Straggler detection: find ranks that take longer than the ranks with the same pipeline stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from megalite.parallel.layout import ParallelLayout

WINDOW = 20
"""The number of steps that are averaged: a single step may be slow for many reasons."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that takes `factor` times as long as the median of the `peers` ranks with the same stages.

    Both times are seconds of computation per step, without waits for other ranks.
    """

    rank: int
    seconds: float
    median: float
    peers: int

    @property
    def factor(self) -> float:
        return self.seconds / self.median


class StragglerDetector:
    """Compares the compute times of ranks with the same pipeline stages; a rank without peers is never a straggler."""

    def __init__(self, layout: ParallelLayout, factor: float) -> None:
        self._factor, self._steps = factor, 0
        self._totals = [0.0] * layout.world_size
        self._groups = layout.groups(*(axis for axis in layout.names if axis != "pipeline"))

    def update(self, seconds: Sequence[float]) -> list[Straggler]:
        """Add every rank's compute time in a step; return the stragglers if the step completes a window."""
        self._steps += 1
        self._totals = [total + added for total, added in zip(self._totals, seconds, strict=True)]
        if self._steps < WINDOW:
            return []
        means = [total / WINDOW for total in self._totals]
        self._steps, self._totals = 0, [0.0] * len(self._totals)
        found = []
        for group in self._groups:
            # The low median: of two ranks, the faster is the reference.
            median = median_low([means[rank] for rank in group])
            found += [
                Straggler(rank, means[rank], median, len(group))
                for rank in group
                if means[rank] > self._factor * median > 0
            ]
        return found
