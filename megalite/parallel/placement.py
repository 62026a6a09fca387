"""The placement of pipeline stages: which pipeline rank holds which stages."""

from dataclasses import dataclass
from typing import Literal

MessageKind = Literal["activation", "gradient"]
"""What a message between two stages carries: an activation forward, or its gradient backward."""

Shape = Literal["loop", "v"]
"""The order in which stages are assigned to ranks: ``0 1 0 1`` (loop) or ``0 1 1 0`` (v)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`num_ranks` pipeline ranks with `virtual_stages` stages each, ``num_ranks * virtual_stages`` in all.

    A ``loop`` assigns stages to ranks 0 to p - 1, once for each virtual stage (arXiv:2104.04473). A ``v`` assigns them
    to ranks 0 to p - 1 and back to 0, so that the first rank holds the first and the last stage (arXiv:2401.10241); it
    has two virtual stages. Two neighbouring stages on one rank exchange no message.

    >>> [Placement(2, 2).rank_of(stage) for stage in range(4)], [Placement(2, 2, "v").rank_of(s) for s in range(4)]
    ([0, 1, 0, 1], [0, 1, 1, 0])

    Raises ValueError for fewer than one rank or virtual stage, and for a ``v`` without exactly two virtual stages.
    """

    num_ranks: int
    virtual_stages: int = 1
    shape: Shape = "loop"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.virtual_stages < 1:
            raise ValueError(f"a pipeline needs at least one rank and one stage per rank, not {self}")
        if self.shape == "v" and self.virtual_stages != 2:
            raise ValueError(f"a v placement has two virtual stages, not {self.virtual_stages}")

    @property
    def num_stages(self) -> int:
        """Number of stages over all ranks."""
        return self.num_ranks * self.virtual_stages

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage; raise ValueError for a stage outside ``0..num_stages - 1``."""
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage {stage} is not in 0..{self.num_stages - 1}")
        virtual_stage, index = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - index if self.shape == "v" and virtual_stage == 1 else index

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, ascending; raise ValueError for a rank outside ``0..num_ranks - 1``."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not in 0..{self.num_ranks - 1}")
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def crosses(self, stage: int, other: int) -> bool:
        """Return whether two stages are on different ranks, so that they exchange messages."""
        return self.rank_of(stage) != self.rank_of(other)
