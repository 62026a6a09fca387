"""Which steps of a run train with a learning rate of 0 under a scheduler of DeepSpeed's."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from megalite.settings.validation import Fault


def zero_rate_note(scheduler: Mapping[str, Any], steps: int) -> Fault | None:
    """Return the note that a run's first or last steps change no weight; None where every step has a rate above 0.

    `scheduler` is the JSON's section with every parameter that acts written out, `steps` is the number of the run's.
    """
    kind, params = scheduler["type"], scheduler["params"]
    first, last = _first_steps(kind, params), steps
    if kind == "WarmupDecayLR" and params["warmup_min_lr"] == 0:
        # DeepSpeed: step S has the rate of its count S - 2, and that of total_num_steps is 0.
        last = max(params["total_num_steps"], params["warmup_num_steps"], 2) + 1
    idle = [_span(1, min(first, steps))] * (first > 0) + [_span(last + 1, steps)] * (last < steps)
    if not idle:
        return None
    text = f"={kind!r} has a learning rate of 0 in {' and '.join(idle)}, as DeepSpeed has it: no weight"
    fix = "delete the section scheduler, for megalite's train.schedule, of which every step trains"
    if first and (key := _rate_of_the_first(kind)):
        fix = f"set {key} above 0, or {fix}"
    return Fault(("scheduler", "type"), f"{text} changes there; {fix}")


def _first_steps(kind: str, params: Mapping[str, Any]) -> int:
    """Return how many steps from the first on have a rate of 0.

    DeepSpeed: a scheduler sets its lowest rate when it is made, and counts from 0 after the first step, so that a
    warm-up has two steps of that rate, however short it is.
    """
    match kind:
        case "WarmupLR" | "WarmupDecayLR":
            return 2 if params["warmup_min_lr"] == 0 else 0
        case "WarmupCosineLR":
            return 2 if params["warmup_min_ratio"] == 0 else 1  # the first is 0 whatever the ratio
        case "OneCycle" if params["cycle_min_lr"] == 0:
            stairs = params.get("cycle_first_stair_count", 0)
            return ceil(params["cycle_first_step_size"] / stairs) if stairs else 1
    return 0


def _rate_of_the_first(kind: str) -> str | None:
    key = {"WarmupCosineLR": None, "OneCycle": "cycle_min_lr"}.get(kind, "warmup_min_lr")
    return key and f"scheduler.params.{key}"


def _span(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
