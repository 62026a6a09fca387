"""The parallel layout: rank numbers to coordinates on the axes of tensor, pipeline and data parallelism, and back.

Pure arithmetic with the standard library alone. Process groups, the dry run and tests all use it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Axis = Literal["pipeline", "data", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "tensor")
"""Slowest-varying first. Neighbouring ranks share a node and differ along ``tensor``, which communicates most."""
_MAX_RANGES = 8
"""How many ranges of ranks a message names before it leaves out those in the middle."""


@dataclass(frozen=True, slots=True)
class MeshCoordinate:
    """The indices of one rank along the three axes of the mesh."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The sizes of the three axes, and the mapping between ranks and coordinates.

    ``rank = (pipeline * data_size + data) * tensor_size + tensor``

    >>> layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    >>> layout.coordinate(5)
    MeshCoordinate(pipeline=1, data=0, tensor=1)
    >>> layout.groups("data")
    ((0, 2), (1, 3), (4, 6), (5, 7))
    """

    tensor: int
    pipeline: int
    data: int

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ValueError(f"the {axis} axis needs at least one rank, not {self.size(axis)}")

    def size(self, axis: Axis) -> int:
        """Number of ranks along one axis."""
        return {"pipeline": self.pipeline, "data": self.data, "tensor": self.tensor}[axis]

    @property
    def world_size(self) -> int:
        """Number of ranks in the whole mesh."""
        return self.pipeline * self.data * self.tensor

    def coordinate(self, rank: int) -> MeshCoordinate:
        """Return the coordinate of `rank`; raise ValueError outside ``0 <= rank < world_size``."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in 0..{self.world_size - 1}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return MeshCoordinate(pipeline=pipeline, data=data, tensor=tensor)

    def rank(self, at: MeshCoordinate) -> int:
        """Return the rank at a coordinate; the inverse of `coordinate`."""
        return (at.pipeline * self.data + at.data) * self.tensor + at.tensor

    def coordinates(self) -> Iterator[MeshCoordinate]:
        """Every coordinate, in the order of ranks."""
        return (self.coordinate(rank) for rank in range(self.world_size))

    def groups(self, *axes: Axis) -> tuple[tuple[int, ...], ...]:
        """Return the groups of ranks that differ along `axes` only, each in the order of ranks.

        With 2 x 2 x 2 ranks, ``groups("tensor")`` is ``((0, 1), (2, 3), (4, 5), (6, 7))`` and
        ``groups("pipeline", "tensor")`` is ``((0, 1, 4, 5), (2, 3, 6, 7))``.
        """
        fixed = [axis for axis in AXES if axis not in axes]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, at in enumerate(self.coordinates()):
            groups.setdefault(tuple(getattr(at, axis) for axis in fixed), []).append(rank)
        return tuple(tuple(ranks) for ranks in groups.values())

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Return ascending integers as text of ranges; of many ranges, only the first two and the last.

    >>> format_ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    words = ["-".join(map(str, ends)) for ends in ranges]
    if len(words) > _MAX_RANGES:
        words = [*words[:2], "...", words[-1]]
    return ", ".join(words)


def name_ranks(numbers: Sequence[int]) -> str:
    """Return ``rank 3`` or ``ranks 0-1, 5`` for ascending rank numbers, for a message.

    >>> name_ranks([3]), name_ranks([0, 1, 5])
    ('rank 3', 'ranks 0-1, 5')
    """
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {format_ranges(numbers)}"
