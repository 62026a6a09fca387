"""The interface of a stage: named tensors to the next stage, named losses, and the edges that both ends know.

An edge leads from a stage to the next one. Its named tensors have shapes and dtypes that are known before training, so
that a message needs no header and a receive can be posted before the tensors exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from megalite.parallel.json_collectives import gather_json
from megalite.parallel.mesh import Mesh


class StageOutput(NamedTuple):
    """The result of a stage's forward of one microbatch.

    `activations` go to the next stage; they are empty on the last stage. `losses` are scalars, and any stage may have
    some. The step's objective is the sum of all losses over stages and microbatches, so a stage scales each of them
    (`Microbatch.num_microbatches`). A loss is the same on every rank of a tensor group.
    """

    # Dicts in a tuple: DeepSpeed's ZeRO-3 finds tensors in these types only.
    activations: dict[str, Tensor]
    losses: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor on an edge. Its gradient is sent back, unless `requires_grad` is False."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = True

    @property
    def has_gradient(self) -> bool:
        return self.requires_grad and self.dtype.is_floating_point

    def as_json(self) -> list[Any]:
        return [self.shape, str(self.dtype).removeprefix("torch."), self.requires_grad]

    @classmethod
    def from_json(cls, found: list[Any]) -> Self:
        shape, dtype, requires_grad = found
        return cls(tuple(shape), getattr(torch, dtype), requires_grad)


Edge = Mapping[str, TensorSpec]
"""The tensors that a stage sends to the next stage, by name, in the order in which they are sent."""


def gradient_edge(edge: Edge) -> Edge:
    """Return the tensors that go back over an edge: the gradients of its differentiable tensors."""
    return {name: spec for name, spec in edge.items() if spec.has_gradient}


def exchange_edges(outgoing: Mapping[int, Edge], mesh: Mesh) -> dict[int, Edge]:
    """All-gather the edges that leave this rank's stages; return those of all stages, by the sending stage. Collective.

    Each edge is described by the stage that sends, so that stages need not know each other's code.
    """
    mine = {stage: {name: spec.as_json() for name, spec in edge.items()} for stage, edge in outgoing.items()}
    return {
        int(stage): {name: TensorSpec.from_json(spec) for name, spec in edge.items()}
        for edges in gather_json(mine, mesh)
        for stage, edge in edges.items()
    }


def add_losses(losses: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums of losses by name."""
    return {**losses, **{name: losses[name] + loss if name in losses else loss for name, loss in added.items()}}
