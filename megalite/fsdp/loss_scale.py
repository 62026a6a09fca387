"""Loss scaling for fp16, dynamic or fixed (arXiv:1710.03740), with the counters that checkpoints store."""

from collections.abc import Mapping
from typing import Any

COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """The factor on the loss: halved after overflows, doubled after `loss_scale_window` steps without one.

    The rules and counters are those of DeepSpeed's scaler, so that a run can change the engine.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take the section ``fp16`` of a DeepSpeed JSON; a ``loss_scale`` other than 0 is fixed."""
        fixed = float(settings.get("loss_scale", 0))
        self.is_dynamic = fixed == 0
        self.cur_scale = fixed or 2.0 ** settings.get("initial_scale_power", 16)
        self.cur_iter, self.last_overflow_iter = 0, -1
        self._window = settings.get("loss_scale_window", 1000)
        self._smallest = float(settings.get("min_loss_scale", 1))
        self._hysteresis = self.cur_hysteresis = settings.get("hysteresis", 2)
        self._consecutive = settings.get("consecutive_hysteresis", False)

    def update(self, *, overflow: bool) -> None:
        """Take note of a step, and change the scale where it is dynamic."""
        if not self.is_dynamic:
            return
        if overflow:
            if self.cur_hysteresis == 1:
                self.cur_scale = max(self.cur_scale / 2, self._smallest)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            grows = (self.cur_iter - self.last_overflow_iter) % self._window == 0
            if self._consecutive or grows:
                self.cur_hysteresis = self._hysteresis
            if grows:
                self.cur_scale *= 2
        self.cur_iter += 1

    def counters(self) -> dict[str, float]:
        """Return what a checkpoint stores: the scale alone where it is fixed."""
        return {name: getattr(self, name) for name in (COUNTERS if self.is_dynamic else COUNTERS[:1])}

    def restore(self, counters: Mapping[str, float]) -> None:
        for name in self.counters().keys() & counters.keys():
            setattr(self, name, counters[name])
