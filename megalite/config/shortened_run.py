"""A first try that is shorter than its run file: what is shaped for more steps gives way, and it is said."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalite.settings.section import COUNT, INDEX
from megalite.settings.validation import show
from megalite.settings.values import Kind


def shorten(document: dict[str, Any], overrides: Sequence[tuple[str, ...]]) -> list[str]:
    """Fit a run file's document to the `train.steps` and `train.stop_after` of the command line; return what changed.

    A run file is a whole: where two of its settings disagree, one of them is a mistake, and that stays an error. But
    ``train.steps=20`` on the command line is a try, and means the file's settings as far as they go: a stop and traced
    steps beyond the end are left out, a warm-up and a final decay that are longer shrink in proportion. What the
    command line states itself stays as well. Values of a wrong kind are left for the validation.
    """
    train = document.get("train")
    if not isinstance(train, dict):
        return []
    return list(_shortened(train, _Typed(overrides)))


class _Typed:
    """Which keys below `train` were given on the command line, whole or in part."""

    def __init__(self, overrides: Sequence[tuple[str, ...]]) -> None:
        self._overrides = overrides

    def __call__(self, *key: str) -> bool:
        full = ("train", *key)
        return any(given[: len(full)] == full[: len(given)] for given in self._overrides)


def _shortened(train: dict[str, Any], typed: _Typed) -> Iterator[str]:
    steps, stop = _read(COUNT, train.get("steps")), _read(COUNT, train.get("stop_after"))
    if steps is None:
        return
    if typed("steps") and stop is not None and stop > steps and not typed("stop_after"):
        yield f"note: train.stop_after={stop} of the run file is beyond train.steps={steps}, and is left out"
        stop = train["stop_after"] = None
    if (typed("steps") or typed("stop_after")) and not typed("trace_steps"):
        name, last = ("steps", steps) if stop is None else ("stop_after", stop)
        yield from _without_late_traces(train, name, last)
    schedule = train.get("schedule")
    if typed("steps") and isinstance(schedule, dict):
        shape_is_typed = typed("schedule", "warmup_steps") or typed("schedule", "decay_steps")
        yield from () if shape_is_typed else _with_shorter_schedule(train, schedule, steps)


def _without_late_traces(train: dict[str, Any], name: str, last: int) -> Iterator[str]:
    traced = train.get("trace_steps")
    if not isinstance(traced, list):
        return
    late = [step for step in traced if (_read(COUNT, step) or 0) > last]
    if late:
        train["trace_steps"] = [step for step in traced if step not in late]
        yield f"note: train.trace_steps={show(late)} of the run file is beyond train.{name}={last}, and is left out"


def _with_shorter_schedule(train: dict[str, Any], schedule: Mapping[str, Any], steps: int) -> Iterator[str]:
    warmup = _read(INDEX, schedule.get("warmup_steps", 0) or 0)
    decay = _read(COUNT, schedule.get("decay_steps")) if schedule.get("decay_steps") is not None else 0
    if warmup is None or decay is None or warmup + decay <= steps:
        return
    # Of a decay at least one step stays, since a schedule with a decay has one.
    shorter_decay = max(1, steps * decay // (warmup + decay)) if decay else 0
    shorter = {"warmup_steps": steps - shorter_decay, **({"decay_steps": shorter_decay} if decay else {})}
    train["schedule"] = {**schedule, **shorter}
    for key, before in (("warmup_steps", warmup), ("decay_steps", decay)):
        if shorter.get(key, before) != before:
            yield f"note: train.schedule.{key}={shorter[key]}, not {before} as in the run file: train.steps={steps}"


def _read(kind: Kind, value: object) -> Any:
    """Return a number; None where it is missing, or of another kind."""
    try:
        return kind.read(value)
    except ValueError:
        return None
