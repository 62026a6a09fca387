"""Which pipeline rank holds which stages."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["activation", "gradient"]

Shape = Literal["loop", "v"]
"""How the model's stages wind over the ranks: around and around, or down and back up."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`num_ranks` pipeline ranks with `virtual_stages` stages each, ``num_ranks * virtual_stages`` in all.

    A ``loop`` goes around the ranks, once for each virtual stage (arXiv:2104.04473). A ``v`` goes down the ranks and
    back up, so that the first rank holds both ends of the model and the last both sides of the turn (arXiv:2401.10241);
    it has two virtual stages. Two neighbours on one rank exchange no message.

    >>> [Placement(2, 2).rank_of(stage) for stage in range(4)], [Placement(2, 2, "v").rank_of(s) for s in range(4)]
    ([0, 1, 0, 1], [0, 1, 1, 0])

    Raises ValueError for fewer than one rank or virtual stage, and for a ``v`` without exactly two virtual stages.
    """

    num_ranks: int
    virtual_stages: int = 1
    shape: Shape = "loop"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.virtual_stages < 1:
            raise ValueError(f"a pipeline needs at least one rank and one stage on each, not {self}")
        if self.shape == "v" and self.virtual_stages != 2:
            raise ValueError(f"a v has two virtual stages, one down and one up, not {self.virtual_stages}")

    @property
    def num_stages(self) -> int:
        """Number of stages over all ranks."""
        return self.num_ranks * self.virtual_stages

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage; raise ValueError for one outside ``0..num_stages - 1``."""
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage {stage} is not in 0..{self.num_stages - 1}")
        way, along = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - along if self.shape == "v" and way == 1 else along

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, ascending; raise ValueError for a rank outside ``0..num_ranks - 1``."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not in 0..{self.num_ranks - 1}")
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def crosses(self, stage: int, other: int) -> bool:
        """Return whether what passes between two stages passes between two ranks."""
        return self.rank_of(stage) != self.rank_of(other)
