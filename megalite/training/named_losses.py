"""Reduction of named losses: their means over the loss group and sums over the stages, the same on every rank."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.json_collectives import gather_json
from megalite.parallel.mesh import Mesh


class NamedLosses:
    """Reduces the losses of one kind of stream, such as that of a training step.

    Stages have different losses, so the first reduction gathers the names of all ranks. Later ones are one all-reduce.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._names: list[str] | None = None

    def reduce(self, losses: Mapping[str, Tensor], flags: Sequence[float]) -> tuple[dict[str, float], list[float]]:
        """Return the losses of all stages by name, and in the same all-reduce the sums of `flags` over all ranks.

        Of the ranks of a stage that compute the same losses, one contributes them. Raises ValueError where a stage
        has a loss that no stage had in the first reduction. Collective.
        """
        if self._names is None:
            self._names = sorted({name for names in gather_json(list(losses), self._mesh) for name in names})
        if unknown := losses.keys() - self._names:
            raise ValueError(f"losses {sorted(unknown)} were not there in the first step, which had {self._names}")
        count = len(self._names)
        total = torch.tensor([0.0] * count + [*flags], dtype=torch.float64, device=self._mesh.device)
        if self._mesh.counts_loss:
            for name, loss in losses.items():
                total[self._names.index(name)] = loss
        dist.all_reduce(total)
        sums = total.tolist()
        means = (value / self._mesh.loss.size for value in sums[:count])
        return dict(zip(self._names, means, strict=True)), sums[count:]
