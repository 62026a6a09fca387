"""Read the share of each global batch that belongs to one rank of the data axis, as microbatches."""

from dataclasses import replace

import numpy as np

from megalite.data.collate import SampleMicrobatch, SampleRules
from megalite.data.order.streaming import Samples


class BatchReader:
    """Reads the share of each global batch that belongs to one rank of the data axis.

    A batch is dealt in slices of `micro_batch_size` to the data-parallel ranks in turn, so that the union over the
    ranks never depends on how many there are.
    """

    def __init__(
        self, samples: Samples, rules: SampleRules, *, micro_batch_size: int, data_rank: int, data_size: int
    ) -> None:
        self._samples, self._rules, self._micro = samples, rules, micro_batch_size
        self._data_rank, self._data_size = data_rank, data_size

    def slices(self, batch: range) -> list[range]:
        """Return the samples of each of this rank's microbatches of a global batch."""
        first, stride = batch.start + self._data_rank * self._micro, self._micro * self._data_size
        return [range(start, start + self._micro) for start in range(first, batch.stop, stride)]

    def microbatches(self, batch: range) -> list[SampleMicrobatch]:
        """Read this rank's microbatches of a global batch."""
        return [self._rules.microbatch(self._samples, indices) for indices in self.slices(batch)]

    def padded_microbatches(self, batch: range) -> list[SampleMicrobatch]:
        """Read this rank's microbatches of any number of samples, as many microbatches on every rank of the data axis.

        Rows that no sample is left for repeat the first one, and nothing of them counts; where there are any on some
        rank, `loss_mask` says which targets count on every rank.
        """
        rows = self._micro * self._data_size
        padded = range(batch.start, batch.start + -(-len(batch) // rows) * rows)
        if padded == batch:
            return self.microbatches(batch)
        read = []
        for indices in self.slices(padded):
            microbatch = self._rules.microbatch(self._samples, [i if i < batch.stop else batch.start for i in indices])
            loss_mask = (
                np.ones(microbatch.targets.shape, bool) if microbatch.loss_mask is None else microbatch.loss_mask
            )
            loss_mask[[i >= batch.stop for i in indices]] = False
            read.append(replace(microbatch, loss_mask=loss_mask))
        return read
