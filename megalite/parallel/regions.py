"""Regions of tensors, and the regions that a range of a flattened tensor covers. No torch.

A shard, a chunk of a checkpoint and what is read of either are regions. A range of elements of a row-major tensor
covers a few: the rest of its first row, whole rows, and the start of its last row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangular region of a tensor: its first index and its length along each dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Region":
        """Return the region that is all of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements in the region."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index of slices."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: "Region") -> "Region | None":
        """Return the intersection with another region; None where it is empty."""
        starts = tuple(map(max, self.offset, other.offset))
        stops = tuple(map(min, self._stops, other._stops))
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Region(starts, shape) if min(shape, default=1) > 0 else None

    def relative_to(self, origin: tuple[int, ...]) -> "Region":
        """Return the region in coordinates relative to `origin`."""
        return Region(tuple(at - zero for at, zero in zip(self.offset, origin, strict=True)), self.shape)

    @property
    def _stops(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))


def flat_range_regions(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Cut elements `start` to `stop` of a row-major tensor into regions, in their order.

    >>> list(flat_range_regions((4, 3), 2, 10))
    [Region(offset=(0, 2), shape=(1, 1)), Region(offset=(1, 0), shape=(2, 3)), Region(offset=(3, 0), shape=(1, 1))]
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Region((start,), (stop - start,)) if shape else Region((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within(shape, first - 1, start, stop)
        return
    yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield Region((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _within(shape, last, last * row, stop)


def _within(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Region]:
    row = prod(shape[1:])
    for inner in flat_range_regions(shape[1:], start - index * row, stop - index * row):
        yield Region((index, *inner.offset), (1, *inner.shape))
