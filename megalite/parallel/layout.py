"""The parallel layout: an ordered list of named axes, and the ranks' coordinates along them.

What the ranks along an axis do together is its meaning, and groups of ranks are asked for by meaning: a new axis
declares its meanings here, and no user of the groups changes. Pure arithmetic with the standard library alone.
Process groups, the dry run and tests all use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

Meaning = Literal["batch", "gradient", "shard", "loss", "model"]
"""What the ranks along an axis do together:

- ``batch``: they read different samples;
- ``gradient``: their gradients are averaged, so each holds a copy of what the others hold;
- ``shard``: ZeRO divides the optimizer's state, and more at higher stages, over them;
- ``loss``: the loss of a step is averaged over them;
- ``model``: they hold one copy of the model together, and the norm of its gradients is summed over them.
"""
_MAX_RANGES = 8
"""How many ranges of ranks a message names before it leaves out those in the middle."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis of the mesh and its meanings.

    Ranks along an axis hold either parts of the model (``model``) or copies of it (``gradient``, with any of the other
    meanings); ranks that read different samples average their losses. Raises ValueError for other combinations.
    """

    name: str
    meanings: frozenset[Meaning]

    def __post_init__(self) -> None:
        if ("model" in self.meanings) == ("gradient" in self.meanings):
            raise ValueError(f"the {self.name} axis divides the model or repeats it: give it 'model' or 'gradient'")
        if "model" in self.meanings and len(self.meanings) > 1:
            raise ValueError(f"the {self.name} axis divides the model: it has no meaning beside 'model'")
        if "batch" in self.meanings and "loss" not in self.meanings:
            raise ValueError(f"ranks along the {self.name} axis read different samples: give it 'loss' too")


PIPELINE = Axis("pipeline", frozenset({"model"}))
DATA = Axis("data", frozenset({"batch", "gradient", "shard", "loss"}))
TENSOR = Axis("tensor", frozenset({"model"}))
AXES = (PIPELINE, DATA, TENSOR)
"""Slowest-varying first. Neighbouring ranks share a node and differ along ``tensor``, which communicates most."""


@dataclass(frozen=True, slots=True, init=False)
class ParallelLayout:
    """The axes with their sizes, and the mapping between ranks and coordinates.

    Axes vary from the slowest to the fastest: ``rank = (pipeline * data_size + data) * tensor_size + tensor``

    >>> layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    >>> layout.coordinate(5)
    {'pipeline': 1, 'data': 0, 'tensor': 1}
    >>> layout.groups("data")
    ((0, 2), (1, 3), (4, 6), (5, 7))
    >>> layout.groups_by("model")
    ((0, 1, 4, 5), (2, 3, 6, 7))
    >>> replica = Axis("replica", frozenset({"batch", "gradient", "loss"}))
    >>> print(ParallelLayout(tensor=2, data=4, replica=2, axes=(PIPELINE, replica, DATA, TENSOR)))
    tensor 2 x pipeline 1 x data 4 x replica 2
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]

    def __init__(
        self, tensor: int = 1, pipeline: int = 1, data: int = 1, *, axes: Sequence[Axis] = AXES, **others: int
    ) -> None:
        """Take the size of each axis by its name; `axes` gives their order, the slowest-varying first.

        Raises ValueError for a size below 1 or of an axis that is not in `axes`, and for a meaning that no axis has.
        """
        sizes = {"tensor": tensor, "pipeline": pipeline, "data": data, **others}
        object.__setattr__(self, "axes", tuple(axes))
        object.__setattr__(self, "sizes", tuple(sizes.get(axis.name, 1) for axis in axes))
        known = [axis.name for axis in axes]
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"the {name} axis needs at least one rank, not {size}")
            if name not in known and size > 1:
                raise ValueError(f"the layout has no {name} axis: its axes are {', '.join(known)}")
        for meaning in get_args(Meaning):
            if not self.names_of(meaning):
                raise ValueError(f"no axis of {', '.join(known)} has the meaning {meaning!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes as people read them: those that divide the model first, fastest-varying first."""
        inwards = self.axes[::-1]
        return tuple(axis.name for axis in sorted(inwards, key=lambda axis: "model" not in axis.meanings))

    def names_of(self, meaning: Meaning) -> tuple[str, ...]:
        """Return the names of the axes that have a meaning, slowest-varying first."""
        return tuple(axis.name for axis in self.axes if meaning in axis.meanings)

    def size(self, *names: str) -> int:
        """Number of ranks along one axis, or the product over several; raise KeyError for a name that is no axis'."""
        sizes = {axis.name: size for axis, size in zip(self.axes, self.sizes, strict=True)}
        return prod(sizes[name] for name in names)

    def group_size(self, meaning: Meaning) -> int:
        """Number of ranks in each group of a meaning."""
        return self.size(*self.names_of(meaning))

    @property
    def world_size(self) -> int:
        """Number of ranks in the whole mesh."""
        return prod(self.sizes)

    def resized(self, **sizes: int) -> "ParallelLayout":
        """Return the same axes with these sizes; an axis that is not named has one rank."""
        return ParallelLayout(axes=self.axes, **sizes)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the index of `rank` along each axis; raise ValueError outside ``0 <= rank < world_size``."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in 0..{self.world_size - 1}")
        inwards: list[int] = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            inwards.append(index)
        return {axis.name: index for axis, index in zip(self.axes, reversed(inwards), strict=True)}

    def index(self, rank: int, *names: str) -> int:
        """Return the index of `rank` among the ranks that differ from it along the named axes only."""
        at, index = self.coordinate(rank), 0
        for axis, size in zip(self.axes, self.sizes, strict=True):
            if axis.name in names:
                index = index * size + at[axis.name]
        return index

    def groups(self, *names: str) -> tuple[tuple[int, ...], ...]:
        """Return the groups of ranks that differ along the named axes only, each in the order of ranks.

        With 2 x 2 x 2 ranks, ``groups("tensor")`` is ``((0, 1), (2, 3), (4, 5), (6, 7))`` and
        ``groups("pipeline", "tensor")`` is ``((0, 1, 4, 5), (2, 3, 6, 7))``.
        """
        fixed = [axis.name for axis in self.axes if axis.name not in names]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinate(rank)
            groups.setdefault(tuple(at[name] for name in fixed), []).append(rank)
        return tuple(tuple(ranks) for ranks in groups.values())

    def groups_by(self, meaning: Meaning) -> tuple[tuple[int, ...], ...]:
        """Return the groups of ranks that differ along the axes of a meaning only, each in the order of ranks."""
        return self.groups(*self.names_of(meaning))

    def __str__(self) -> str:
        return " x ".join(f"{name} {self.size(name)}" for name in self.names)


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
