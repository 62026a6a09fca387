"""Regions of global tensors, and the regions that a range of a flattened local parameter covers. No torch.

ZeRO flattens parameters and cuts them into even shares, at any element. A checkpoint stores regions of global tensors.
A range of elements of a row-major tensor covers a few regions: the rest of its first row, whole rows, and the start of
its last row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megalite.parallel.sharding import LocalShard


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangular region of a tensor: its first index and its length along each dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, slices: Sequence[slice]) -> "Region":
        """Return the region of an index of plain slices."""
        return cls(tuple(part.start for part in slices), tuple(part.stop - part.start for part in slices))

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


@dataclass(frozen=True, slots=True)
class FlatRegion:
    """The elements from `start` on of a flat range are `region` of the global tensor `name`, in row-major order."""

    name: str
    global_shape: tuple[int, ...]
    region: Region
    start: int


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


def global_regions(
    shards: Iterable[LocalShard], local_shape: tuple[int, ...], start: int, stop: int
) -> Iterator[FlatRegion]:
    """Return the regions of global tensors that elements `start` to `stop` of a local parameter cover, without padding.

    `FlatRegion.start` is relative to element `start`.
    """
    local_regions = list(flat_range_regions(local_shape, start, stop))
    for shard in shards:
        target = Region.of(shard.target)
        origin = tuple(local.start - source.start for local, source in zip(shard.target, shard.source, strict=True))
        for local in local_regions:
            common = local.intersect(target) if target.numel else None
            if common is not None:
                at = sum(offset * prod(local_shape[dim + 1 :]) for dim, offset in enumerate(common.offset))
                yield FlatRegion(shard.spec.name, shard.spec.global_shape, common.relative_to(origin), at - start)
