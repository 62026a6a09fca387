"""Learning-rate schedules: the rate of a step as a function of its number alone, so that a resumed run agrees."""

import math

from megalite.config import OptimizerSection, ScheduleSection


def learning_rate(step: int, total_steps: int, schedule: ScheduleSection, optimizer: OptimizerSection) -> float:
    """Return the rate of `step` (1 to `total_steps`): linear warm-up to the peak, then down to `min_lr`.

    The first step of a warm-up has a share of the peak already, and `min_lr` is a tenth of the peak unless given: every
    step changes the weights, also the only step of a run.

    | schedule | after the warm-up |
    |---|---|
    | constant | stays at the peak |
    | linear   | falls evenly to `min_lr` at the last step |
    | cosine   | falls along half a cosine (arXiv:1608.03983) |
    | wsd      | stays, then falls evenly over the last `decay_steps` (warm-up, stable, decay; arXiv:2404.06395) |
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
