"""From samples to the microbatches of one rank: which samples, a function of the step alone."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Samples(Protocol):
    """Anything that gives sample i, from 0 on without end: token ids ``[S + 1]``, int64."""

    samples_per_epoch: int

    def sample(self, index: int) -> np.ndarray: ...


class BatchReader:
    """Reads the share of each global batch that belongs to one rank of the data axis.

    Global batch n holds samples ``n * global_batch_size`` to ``(n + 1) * global_batch_size - 1``. They are dealt in
    slices of `micro_batch_size` to the data-parallel ranks in turn, so that the union over the ranks never depends
    on how many there are.
    """

    def __init__(
        self, samples: Samples, *, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
    ) -> None:
        self._samples, self._global, self._micro = samples, global_batch_size, micro_batch_size
        self._data_rank, self._data_size = data_rank, data_size

    def microbatches(self, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids, targets), each ``[micro_batch_size, S]`` int64, of global batch number `batch`, from 0."""
        first = batch * self._global
        stride = self._micro * self._data_size
        for start in range(first + self._data_rank * self._micro, first + self._global, stride):
            tokens = np.stack([self._samples.sample(index) for index in range(start, start + self._micro)])
            yield tokens[:, :-1], tokens[:, 1:]
