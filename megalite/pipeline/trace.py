"""Timelines as a trace that Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing) open."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    Receive,
)
from megalite.pipeline.timeline import Span, Timeline

_FORWARD = 1000.0
"""Microseconds that stand for one forward where a timeline counts in forwards: a trace knows no other unit."""

_CATEGORIES: dict[type[Instruction], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward input",
    BackwardWeight: "backward weight",
}


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """Return the timelines as JSON in the Trace Event Format: a process for each, in it a thread for each rank.

    Every span is a complete event (``"ph": "X"``) named like its instruction (``2F0``), with the stage and the
    microbatch in its ``args``; times are microseconds from the first span on, a forward of a simulated timeline being
    one millisecond. A rank's sends and receives have a thread of their own, since they overlap what it computes.
    """
    events = [
        event for number, (name, timeline) in enumerate(timelines.items()) for event in _process(number, name, timeline)
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _process(number: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _named("process", name, pid=number)
    threads = sorted({_thread(span) for span in timeline.spans})
    for thread in threads:
        rank, messages = divmod(thread, 2)
        title = f"rank {rank} messages" if messages else f"rank {rank}"
        yield _named("thread", title, pid=number, tid=thread)
        yield {"name": "thread_sort_index", "ph": "M", "pid": number, "tid": thread, "args": {"sort_index": thread}}
    microseconds = 1e6 if timeline.unit == "seconds" else _FORWARD
    origin = min((span.start for span in timeline.spans), default=0.0)
    for span in sorted(timeline.spans, key=lambda span: span.start):
        yield {
            "name": str(span.instruction),
            "cat": _category(span.instruction),
            "ph": "X",
            "ts": (span.start - origin) * microseconds,
            "dur": (span.end - span.start) * microseconds,
            "pid": number,
            "tid": _thread(span),
            "args": {"stage": span.instruction.stage, "microbatch": span.instruction.microbatch},
        }


def _thread(span: Span) -> int:
    return 2 * span.rank + (not isinstance(span.instruction, Compute))


def _named(what: str, name: str, **where: int) -> dict[str, Any]:
    return {"name": f"{what}_name", "ph": "M", **where, "args": {"name": name}}


def _category(instruction: Instruction) -> str:
    return _CATEGORIES.get(type(instruction), "receive" if isinstance(instruction, Receive) else "send")
