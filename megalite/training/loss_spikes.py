"""Loss spike detection: a loss far above the median of the losses before it."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from megalite.config.sections import SpikeSection
from megalite.monitoring.step_report import Spike


class LossSpikeDetector:
    """Detects loss spikes: a loss above `factor` times the baseline, the median of the `window` losses before it.

    Spikes are part of the window as well, so that a loss that stays high becomes the baseline after half a window.
    Every rank has the same losses, and therefore the same result.
    """

    def __init__(self, rule: SpikeSection | None, losses: Sequence[float] = ()) -> None:
        """Start with the `losses` of the steps before; with `rule` None no loss is a spike."""
        self._rule = rule
        self._losses = deque(losses, maxlen=rule.window if rule is not None else 0)

    @property
    def losses(self) -> list[float]:
        """The losses of the window, the oldest first."""
        return list(self._losses)

    def update(self, loss: float) -> Spike | None:
        """Add the loss of a step to the window; return a `Spike` if it is one. A loss that is not finite is ignored."""
        if self._rule is None or not math.isfinite(loss):
            return None
        baseline = median(self._losses) if len(self._losses) == self._rule.window else math.inf
        self._losses.append(loss)
        return Spike(loss, baseline, self._rule) if loss > self._rule.factor * baseline else None
