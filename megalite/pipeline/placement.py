"""Which pipeline rank holds which stages."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Placement:
    num_ranks: int
    virtual_stages: int = 1
    shape: Literal["loop", "v"] = "loop"

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.virtual_stages

    def rank_of(self, stage: int) -> int:
        chunk, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.shape == "v" and chunk % 2 else place

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)
