"""Which samples each step trains on: batch size, its ramp-up, and samples that are passed over."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.config import TrainSection


@dataclass(frozen=True, slots=True)
class SkippedSamples:
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
        self, train: TrainSection, passed_over: Sequence[SkippedSamples] = (), *, after: int = 0, consumed: int = 0
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
