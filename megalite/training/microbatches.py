"""From samples to what the pipeline takes: the microbatches of a global batch, on the device of this rank."""

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


class Feed:
    """One set of samples, as this rank's pipeline takes it: of every global batch the part of its batch rank."""

    def __init__(self, samples: Samples, rules: SampleRules, config: RunConfig, mesh: Mesh, *, trains: bool) -> None:
        """Read `samples` by `rules`; dropout is drawn where it `trains`."""
        self._config, self._mesh, self._trains = config, mesh, trains
        self._reader = BatchReader(
            samples,
            rules,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=mesh.batch.rank,
            data_size=mesh.batch.size,
        )

    def read(self, samples: range) -> list[SampleMicrobatch]:
        """Read this rank's part of a global batch, in any thread."""
        return self._reader.microbatches(samples)

    def read_padded(self, samples: range) -> list[SampleMicrobatch]:
        """Read this rank's part of any number of samples; rows that fill up a microbatch do not count."""
        return self._reader.padded_microbatches(samples)

    def counted(self, batch: Sequence[SampleMicrobatch]) -> float | None:
        """Return how many targets of the global batch count; None where all do. Collective over the loss group."""
        if batch[0].counts is None:
            return None
        mine = sum(int(microbatch.counts.sum()) for microbatch in batch if microbatch.counts is not None)
        total = torch.tensor(mine, dtype=torch.float64, device=self._mesh.device)
        dist.all_reduce(total, group=self._mesh.loss.process_group)
        return float(total)

    def microbatches(self, batch: Sequence[SampleMicrobatch], counted: float | None) -> list[Microbatch]:
        """Put a batch onto the device, each part on the stages that take it; `counted` as `counted` returns it."""
        return [self._microbatch(microbatch, counted) for microbatch in batch]

    def _microbatch(self, read: SampleMicrobatch, counted: float | None) -> Microbatch:
        packing = weights = None
        if read.document_lengths is not None or read.positions is not None:
            positions = None if read.positions is None else self._to_device(read.positions)
            packing = PackedDocuments(read.document_lengths, positions)
        if read.counts is not None and counted is not None and self._mesh.has_last_stage:
            # Losses, and gradients with them, are averaged over ranks, and a mean over all that counts is asked for.
            weight = self._mesh.loss.size / max(counted, 1.0)
            weights = self._to_device(read.counts).to(torch.float32) * weight
        model, seed = self._config.model, self._config.run.seed
        return Microbatch(
            ids=self._to_device(read.ids) if self._mesh.has_first_stage else None,
            targets=self._to_device(read.targets) if self._mesh.has_last_stage else None,
            packing=packing,
            loss_weights=weights,
            dropout=DropoutStreams.of(model, seed, read.samples) if self._trains else None,
        )

    def _to_device(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self._mesh.device, non_blocking=True)
