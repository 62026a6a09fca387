"""Which boxes of which global tensors a flat stretch of a local parameter is: pure arithmetic, no torch.

ZeRO cuts parameters, laid flat, wherever an even share ends. A checkpoint speaks of global tensors, and of boxes in
them. A stretch of a row-major tensor is a few boxes: the rest of its first row, whole rows, the start of its last.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megalite.parallel.sharding import PlacedShard


@dataclass(frozen=True, slots=True)
class Box:
    """A box within a tensor: its least corner and its extent, a number for each dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, region: Sequence[slice]) -> "Box":
        """Return the box that an index of plain slices is."""
        return cls(tuple(part.start for part in region), tuple(part.stop - part.start for part in region))

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """Return what both share, None where that is nothing."""
        starts = tuple(map(max, self.offset, other.offset))
        stops = tuple(map(min, self._stops, other._stops))
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, shape) if min(shape, default=1) > 0 else None

    def relative_to(self, origin: tuple[int, ...]) -> "Box":
        """Return the box in coordinates that begin at `origin`."""
        return Box(tuple(at - zero for at, zero in zip(self.offset, origin, strict=True)), self.shape)

    @property
    def _stops(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class FlatBox:
    """Elements `start` and on of a flat stretch, which are `box` of the global tensor `name`, in row-major order."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    start: int


def stretch_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut elements `start` to `stop` of a row-major tensor into boxes, in their order.

    >>> list(stretch_boxes((4, 3), 2, 10))
    [Box(offset=(0, 2), shape=(1, 1)), Box(offset=(1, 0), shape=(2, 3)), Box(offset=(3, 0), shape=(1, 1))]
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within(shape, first - 1, start, stop)
        return
    yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _within(shape, last, last * row, stop)


def _within(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    row = prod(shape[1:])
    for inner in stretch_boxes(shape[1:], start - index * row, stop - index * row):
        yield Box((index, *inner.offset), (1, *inner.shape))


def global_boxes(
    shards: Iterable[PlacedShard], local_shape: tuple[int, ...], start: int, stop: int
) -> Iterator[FlatBox]:
    """Return where elements `start` to `stop` of a local parameter stand in its global tensors; padding is nowhere.

    `FlatBox.start` counts from element `start`.
    """
    stretches = list(stretch_boxes(local_shape, start, stop))
    for shard in shards:
        target = Box.of(shard.target)
        origin = tuple(local.start - world.start for local, world in zip(shard.target, shard.source, strict=True))
        for stretch in stretches:
            common = stretch.intersect(target) if target.numel else None
            if common is not None:
                at = sum(offset * prod(local_shape[dim + 1 :]) for dim, offset in enumerate(common.offset))
                yield FlatBox(shard.spec.name, shard.spec.global_shape, common.relative_to(origin), at - start)
