"""Microbatch loader: reads the microbatches of a global batch and copies them to the device of this rank."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megalite.config import RunConfig
from megalite.data.batch_reader import BatchReader
from megalite.data.collate import SampleMicrobatch, SampleRules
from megalite.data.order.streaming import Samples
from megalite.model.dropout import DropoutStreams
from megalite.model.microbatch import Microbatch
from megalite.model.packing import PackedDocuments
from megalite.parallel.mesh import Mesh


class MicrobatchLoader:
    """Loads this rank's microbatches of each global batch of a set of samples."""

    def __init__(self, samples: Samples, rules: SampleRules, config: RunConfig, mesh: Mesh, *, trains: bool) -> None:
        """Read `samples` and collate them by `rules`; microbatches have dropout if `trains`."""
        self._config, self._mesh, self._trains = config, mesh, trains
        self._reader = BatchReader(
            samples,
            rules,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=mesh.batch.rank,
            data_size=mesh.batch.size,
        )

    def read(self, samples: range) -> list[SampleMicrobatch]:
        """Read this rank's microbatches of a global batch to host memory; safe in any thread."""
        return self._reader.microbatches(samples)

    def read_padded(self, samples: range) -> list[SampleMicrobatch]:
        """Read this rank's microbatches of any number of samples; padding rows are excluded from the loss."""
        return self._reader.padded_microbatches(samples)

    def num_loss_tokens(self, batch: Sequence[SampleMicrobatch]) -> float | None:
        """Return the number of tokens of the global batch that the loss includes; None without a loss mask.

        Collective over the loss group.
        """
        if batch[0].loss_mask is None:
            return None
        mine = sum(int(microbatch.loss_mask.sum()) for microbatch in batch if microbatch.loss_mask is not None)
        total = torch.tensor(mine, dtype=torch.float64, device=self._mesh.device)
        dist.all_reduce(total, group=self._mesh.loss.process_group)
        return float(total)

    def microbatches(self, batch: Sequence[SampleMicrobatch], num_loss_tokens: float | None) -> list[Microbatch]:
        """Copy a batch to the device, each tensor on the stages that need it; `num_loss_tokens` of the global batch."""
        # Losses and gradients are averaged over ranks, but the loss is a mean over all tokens of its mask.
        weight = None if num_loss_tokens is None else self._mesh.loss.size / max(num_loss_tokens, 1.0)
        model, seed, device = self._config.model, self._config.run.seed, self._mesh.device
        return [
            to_device(
                read,
                device,
                num_microbatches=len(batch),
                token_weight=weight,
                dropout=DropoutStreams.of(model, seed, read.samples, read.ids.shape[1], device)
                if self._trains
                else None,
                first_stage=self._mesh.has_first_stage,
                last_stage=self._mesh.has_last_stage,
            )
            for read in batch
        ]


def to_device(
    read: SampleMicrobatch,
    device: torch.device,
    *,
    num_microbatches: int = 1,
    token_weight: float | None = None,
    dropout: DropoutStreams | None = None,
    first_stage: bool = True,
    last_stage: bool = True,
) -> Microbatch:
    """Copy one of a step's `num_microbatches` to the device, without the tensors of stages that this rank lacks.

    `token_weight` is the weight in the loss of each token of the loss mask, where there is a mask.
    """

    def copy(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    packing = weights = None
    if read.cu_seqlens is not None or read.positions is not None:
        cu_seqlens, positions = (None if x is None else copy(x) for x in (read.cu_seqlens, read.positions))
        packing = PackedDocuments(cu_seqlens, positions)
    if read.loss_mask is not None and token_weight is not None and last_stage:
        weights = copy(read.loss_mask).to(torch.float32) * token_weight
    return Microbatch(
        ids=copy(read.ids) if first_stage else None,
        targets=copy(read.targets) if last_stage else None,
        packing=packing,
        loss_weights=weights,
        dropout=dropout,
        num_microbatches=num_microbatches,
    )
