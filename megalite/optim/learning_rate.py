"""Learning-rate schedules: the rate of a step is a function of its number alone, also in a resumed run."""

import math

from megalite.config import OptimizerSection, ScheduleSection


def learning_rate(step: int, total_steps: int, schedule: ScheduleSection, optimizer: OptimizerSection) -> float:
    """Return the learning rate of `step` (1 to `total_steps`): linear warm-up to the peak, then decay to `min_lr`.

    No rate is 0, so that every step changes the weights: the first step of a warm-up has a share of the peak, and
    `min_lr` is a tenth of the peak by default.

    | schedule | after the warm-up |
    |---|---|
    | constant | the peak |
    | linear   | linear decay to `min_lr` at the last step |
    | cosine   | cosine decay (arXiv:1608.03983) |
    | wsd      | the peak, then linear decay over the last `decay_steps` (warm-up, stable, decay; arXiv:2404.06395) |
    """
    peak, low = optimizer.lr, schedule.lowest(optimizer.lr)
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    match schedule.name:
        case "constant":
            return peak
        case "wsd":
            decay = schedule.decay_steps
            assert decay is not None  # the configuration requires it
            done = max(0.0, (step - (total_steps - decay)) / decay)
            return peak + (low - peak) * done
        case "linear" | "cosine":
            done = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
            if schedule.name == "linear":
                return peak + (low - peak) * done
            return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))
