"""The tensor-parallel group: its ranks, its process group, and the settings of its layers."""

from dataclasses import dataclass

import torch.distributed as dist

from megalite.kernels.choice import NATIVE, Kernels
from megalite.parallel.sharding import Position


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The ranks that share a layer, and this rank's index among them; `process_group` may be None for one rank.

    With a plain rank and size beside the process group, modules can be built and initialised without any process group.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    """Sequence parallelism: outside tensor-parallel regions each rank holds ``[1, B*S / size, H]``, its share of the
    tokens. Always False in a group of one rank."""
    overlap: bool = False
    """Overlap the collectives of a layer's backward with its matrix products."""
    kernels: Kernels = NATIVE
    """How the layers of this group compute their matrix products and attention."""

    @property
    def position(self) -> Position:
        """This rank's place along the tensor axis, as shards are cut by it."""
        return {"tensor": (self.rank, self.size)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence_parallel", self.sequence_parallel and self.size > 1)
