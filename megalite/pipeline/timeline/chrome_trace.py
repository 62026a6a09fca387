"""Timelines as a trace that Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing) open."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megalite.pipeline.instructions import Backward, BackwardInput, BackwardWeight, Compute, Forward, Instruction, Send
from megalite.pipeline.timeline.spans import Span, Timeline

_FORWARD = 1000.0
"""Microseconds that stand for one forward where a timeline counts in forwards: a trace knows no other unit."""

_CATEGORIES: dict[type[Instruction], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward input",
    BackwardWeight: "backward weights",
}


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """Return the timelines as JSON in the Trace Event Format: a process for each, in it a thread for each rank.

    Every span is a complete event (``"ph": "X"``) named like its instruction (``2F0``), with the stage and the
    microbatch in its ``args``; times are microseconds from the first span on, and a forward of a timeline that counts
    in forwards is drawn as a millisecond. Sends and receives overlap what the rank computes and each other, which the
    format allows no thread to do: they stand on further threads of their rank, as many as it takes.
    """
    events = [event for at, (name, it) in enumerate(timelines.items(), start=1) for event in _process(at, name, it)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


class _Thread(NamedTuple):
    """Lane 0 of a rank is what it computes, the others its messages."""

    rank: int
    lane: int

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f", messages {self.lane}" if self.lane else "")


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
    """Return a span in whole nanoseconds, so that what ends where the next begins does not overlap it by rounding."""
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
    """Give every span a thread on which nothing overlaps it: of its rank's, the first that is free."""
    free_at: dict[_Thread, float] = {}
    placed: dict[Span, _Thread] = {}
    for span in sorted(timeline.spans, key=lambda span: (span.start, span.end)):
        lane = 0 if isinstance(span.instruction, Compute) else 1
        while lane and free_at.get(_Thread(span.rank, lane), span.start) > span.start:
            lane += 1
        placed[span] = thread = _Thread(span.rank, lane)
        free_at[thread] = span.end
    return placed
