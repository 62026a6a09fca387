"""Export of timelines in the Trace Event Format, for Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing)."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    ReduceGradients,
    Send,
)
from megalite.pipeline.timeline.spans import Span, Timeline

_FORWARD = 1000.0
"""Microseconds per forward for timelines whose unit is a forward, since a trace has no other unit of time."""

_CATEGORIES: dict[type[Instruction], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward input",
    BackwardWeight: "backward weights",
    ReduceGradients: "reduction",
}


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """Return the timelines as JSON in the Trace Event Format: a process per timeline, with a thread per rank.

    Every span is a complete event (``"ph": "X"``) with the name of its instruction (``2F0``), and the stage and the
    microbatch in its ``args``. Times are microseconds since the first span; in a timeline whose unit is a forward, a
    forward takes a millisecond. Messages and reductions overlap with compute and with each other, which the format does
    not allow within a thread, so they are on additional threads of their rank.
    """
    events = [event for at, (name, it) in enumerate(timelines.items(), start=1) for event in _process(at, name, it)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


class _Thread(NamedTuple):
    """A thread of a rank: lane 0 holds its compute, the other lanes its messages and reductions."""

    rank: int
    lane: int

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f", communication {self.lane}" if self.lane else "")


def _process(pid: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    placed = _threads(timeline)
    tids = {thread: tid for tid, thread in enumerate(sorted(set(placed.values())), start=1)}
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}}
    for thread, tid in tids.items():
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": str(thread)}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    origin = min((span.start for span in timeline.spans), default=0.0)
    scale = 1e6 if timeline.unit == "seconds" else _FORWARD
    for span, thread in placed.items():
        yield _event(span, origin, scale) | {"pid": pid, "tid": tids[thread]}


def _event(span: Span, origin: float, scale: float) -> dict[str, Any]:
    """Return the event of a span, in whole nanoseconds, so that rounding makes no adjacent spans overlap."""
    start, end = (round((time - origin) * scale, 3) for time in (span.start, span.end))
    instruction = span.instruction
    return {
        "name": str(instruction),
        "cat": _CATEGORIES.get(type(instruction), "send" if isinstance(instruction, Send) else "receive"),
        "ph": "X",
        "ts": start,
        "dur": round(end - start, 3),
        "args": {"stage": instruction.stage, "microbatch": instruction.microbatch},
    }


def _threads(timeline: Timeline) -> dict[Span, _Thread]:
    """Assign every span to the first thread of its rank on which no span overlaps it."""
    free_at: dict[_Thread, float] = {}
    placed: dict[Span, _Thread] = {}
    for span in sorted(timeline.spans, key=lambda span: (span.start, span.end)):
        lane = 0 if isinstance(span.instruction, Compute) else 1
        while lane and free_at.get(_Thread(span.rank, lane), span.start) > span.start:
            lane += 1
        placed[span] = thread = _Thread(span.rank, lane)
        free_at[thread] = span.end
    return placed
