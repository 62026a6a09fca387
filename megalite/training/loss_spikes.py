"""Jumps of the loss: which step has one, by the losses before it."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megalite.config.sections import SpikeSection


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss that is too high, in nats a token, beside the `usual` one."""

    loss: float
    usual: float
    rule: SpikeSection

    @property
    def drops_update(self) -> bool:
        """Whether the step is to leave the weights as they are."""
        return self.rule.action != "warn"

    @property
    def rolls_back(self) -> bool:
        """Whether the run is to go on from a checkpoint before it."""
        return self.rule.action == "rollback"


class SpikeWatch:
    """Tells a jump of the loss from its noise: a loss above `factor` times the median of the `window` before it.

    Jumps count among the losses that later ones are held against: a loss that stays high is usual after half a window.
    Every rank sees the same losses and so comes to the same.
    """

    def __init__(self, rule: SpikeSection | None, losses: Sequence[float] = ()) -> None:
        """Watch by `rule`, by which nothing is a jump where it is None, with the `losses` of the steps before."""
        self._rule = rule
        self._losses = deque(losses, maxlen=rule.window if rule is not None else 0)

    @property
    def losses(self) -> list[float]:
        """The losses that the next one is held against, the oldest first."""
        return list(self._losses)

    def look(self, loss: float) -> Spike | None:
        """Take note of a step's loss; return it where it is a jump. One that is no number is not."""
        if self._rule is None or not math.isfinite(loss):
            return None
        usual = median(self._losses) if len(self._losses) == self._rule.window else math.inf
        self._losses.append(loss)
        return Spike(loss, usual, self._rule) if loss > self._rule.factor * usual else None
