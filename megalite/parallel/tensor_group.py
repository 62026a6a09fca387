"""The ranks of one tensor-parallel group, this rank's place among them, and how their layers compute."""

from dataclasses import dataclass

import torch.distributed as dist

from megalite.kernels.choice import NATIVE, Kernels


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The ranks that share a layer, and this rank's place among them; `process_group` may be None for one rank.

    Plain numbers beside the process group let modules be built, sized and initialised without any process.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    """Divide the tokens between sharded regions over the ranks; with one rank it means nothing."""
    overlap: bool = False
    """Let the collectives of a layer's backward run beside its products."""
    kernels: Kernels = NATIVE
    """How the layers of this group compute their products and attention."""

    @property
    def divides_tokens(self) -> bool:
        """Whether a rank holds a share of the tokens, ``[1, B*S / size, H]``, outside sharded regions."""
        return self.sequence_parallel and self.size > 1
