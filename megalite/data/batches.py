"""From samples to the microbatches of one rank: which samples, by the step alone, and what of them counts."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Generic, NoReturn, TypeVar

import numpy as np

from megalite.config import RunConfig, TrainSection
from megalite.data.fim import FillInTheMiddle
from megalite.data.samples import Samples
from megalite.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Samples of the order that no step trains on, since the loss jumped there: so many, right after step `after`."""

    after: int
    samples: int


class BatchSchedule:
    """The samples of each step: neighbouring ranges of one order, whoever reads them, but for what is passed over.

    A ramp-up (Megatron's rule) begins with `start` sequences a step and adds `increment` each time another even share
    of its `samples` is consumed, until the batch is whole. The size follows from the samples that were consumed, not
    from the steps that it took: a run that goes on with other sizes goes on from its samples.
    """

    def __init__(
        self, train: TrainSection, passed_over: Sequence[PassedOver] = (), *, after: int = 0, consumed: int = 0
    ) -> None:
        """Lay out the steps after step `after`, by when so many samples were consumed; earlier ones are not known."""
        self.passed_over = tuple(passed_over)
        self._after, self._whole = after, train.global_batch_size
        self._ramp_ends = [consumed]
        ramp = train.batch_size_rampup
        if ramp is None:
            return
        share = ramp.samples / ((self._whole - ramp.start) // ramp.increment)
        while (size := ramp.start + ramp.increment * int(consumed / share)) < self._whole:
            consumed += size
            self._ramp_ends.append(consumed)

    def samples(self, step: int) -> range:
        """Return the samples that `step`, from 1 on, trains on."""
        shift = self.position(step - 1) - self.consumed(step - 1)
        return range(self.consumed(step - 1) + shift, self.consumed(step) + shift)

    def position(self, step: int) -> int:
        """Return where in the order the step after `step` begins."""
        return self.consumed(step) + sum(gap.samples for gap in self.passed_over if gap.after <= step)

    def consumed(self, step: int) -> int:
        """Return how many samples are consumed after `step`; raise ValueError where that is not known."""
        ramp, steps = len(self._ramp_ends) - 1, step - self._after
        if steps < 0:
            raise ValueError(f"step {step} lies before step {self._after}, after which the batches are known")
        return self._ramp_ends[min(steps, ramp)] + max(0, steps - ramp) * self._whole


@dataclass(frozen=True, slots=True)
class SampleMicrobatch:
    """One microbatch in host memory.

    `document_lengths` has for each row the tokens of its documents in turn; `positions` count from each document's
    first token; `counts` is true where the target counts. None: nothing asks for them.
    """

    ids: np.ndarray
    """int64 ``[B, S]``"""
    targets: np.ndarray
    """int64 ``[B, S]``"""
    document_lengths: tuple[tuple[int, ...], ...] | None = None
    positions: np.ndarray | None = None
    """int64 ``[B, S]``"""
    counts: np.ndarray | None = None
    """bool ``[B, S]``"""
    samples: tuple[int, ...] = ()
    """The number of each row in the order that it was read from."""


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What becomes of a sample on its way into a microbatch; the names are the run file's."""

    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    fim: FillInTheMiddle | None = None
    seed: int = 0
    vocab_size: int | None = None
    """Of the model; None: any id is taken."""

    @classmethod
    def of(cls, config: RunConfig, fim: FillInTheMiddle | None) -> "SampleRules":
        """Return the rules that a run file states."""
        data, seed = config.data, config.run.seed
        resets = data.reset_attention_mask, data.reset_position_ids, data.eod_mask_loss
        return cls(*resets, fim, seed, config.model.vocab_size)

    def microbatch(self, samples: Samples, indices: Sequence[int]) -> SampleMicrobatch:
        """Read the samples of one microbatch and lay them out.

        Raises UserError for a token id outside the vocabulary, as in a file that was damaged.
        """
        rows = np.array(indices, dtype=np.int64)
        tokens, counts = samples.tokens(rows), samples.loss_mask(rows)
        if self.vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            row, column = np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0]
            self._refuse(samples, int(rows[row]), int(tokens[row, column]))
        if counts is not None:
            counts = counts[:, 1:].astype(bool)
        if not (self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss or self.fim):
            return SampleMicrobatch(tokens[:, :-1], tokens[:, 1:], counts=counts, samples=tuple(indices))
        pieces = [[piece.length for piece in samples.pieces(int(row))] for row in rows]
        if self.fim:
            keys = (f"{self.seed} {row}".encode() for row in rows)
            tokens = np.stack(list(map(self.fim, tokens, pieces, keys)))
        lengths = tuple(_without_last_token(row) for row in pieces)
        if self.eod_mask_loss:
            counts = np.ones(tokens[:, 1:].shape, bool) if counts is None else counts
            for row, of_sample in zip(counts, pieces, strict=True):
                row[[end - 1 for end in accumulate(of_sample[:-1])]] = False
        return SampleMicrobatch(
            tokens[:, :-1],
            tokens[:, 1:],
            document_lengths=lengths if self.reset_attention_mask else None,
            positions=np.stack([_positions(row) for row in lengths]) if self.reset_position_ids else None,
            counts=counts,
            samples=tuple(indices),
        )

    def _refuse(self, samples: Samples, sample: int, token: int) -> NoReturn:
        prefixes = sorted({str(piece.prefix) for piece in samples.pieces(sample)})
        allowed = f"a vocabulary of {self.vocab_size} allows 0 to {(self.vocab_size or 0) - 1}"
        raise UserError(
            f"{', '.join(prefixes)}: sample {sample} holds token id {token}; {allowed}; look for damage with `megalite "
            f"inspect {prefixes[0]}`"
        )


def _without_last_token(lengths: list[int]) -> tuple[int, ...]:
    """Return the documents of a sample's inputs: the last token is a target only."""
    return (*lengths[:-1], lengths[-1] - 1) if lengths[-1] > 1 else tuple(lengths[:-1])


def _positions(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.arange(length) for length in lengths])


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
        rank, `counts` says what counts on every rank.
        """
        rows = self._micro * self._data_size
        padded = range(batch.start, batch.start + -(-len(batch) // rows) * rows)
        if padded == batch:
            return self.microbatches(batch)
        read = []
        for indices in self.slices(padded):
            microbatch = self._rules.microbatch(self._samples, [i if i < batch.stop else batch.start for i in indices])
            counts = np.ones(microbatch.targets.shape, bool) if microbatch.counts is None else microbatch.counts
            counts[[i >= batch.stop for i in indices]] = False
            read.append(replace(microbatch, counts=counts))
        return read


class ReadAhead(Generic[T]):
    """Calls ``read(step)`` for the next `depth` steps in a thread, so that a training step does not wait for data."""

    def __init__(self, read: Callable[[int], T], *, depth: int, last: int) -> None:
        self._read, self._depth, self._last = read, depth, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead") if depth else None
        self._under_way: dict[int, Future[T]] = {}
        self.waited = 0.0
        """Seconds that the last `take` took."""

    def take(self, step: int) -> T:
        """Return what was read for `step`, and have the steps after it read; raises what the reading raised."""
        began = time.perf_counter()
        try:
            if self._thread is None:
                return self._read(step)
            for ahead in range(step, min(step + self._depth, self._last) + 1):
                if ahead not in self._under_way:
                    self._under_way[ahead] = self._thread.submit(self._read, ahead)
            return self._under_way.pop(step).result()
        finally:
            self.waited = time.perf_counter() - began

    def close(self) -> None:
        """Stop reading."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
