"""The trace against the Trace Event Format, as Chrome's and Perfetto's documentation state it."""

import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel.placement import Placement
from megalite.pipeline.instructions import Forward, parse
from megalite.pipeline.schedules import all_streams, zb_v
from megalite.pipeline.timeline.chrome_trace import chrome_trace
from megalite.pipeline.timeline.simulator import Cost, simulate
from megalite.pipeline.timeline.spans import Span, Timeline


def measured() -> Timeline:
    """Two ranks on a clock that starts anywhere; rank 0 waits for two messages at once while it computes."""
    return Timeline(
        (
            Span(0, parse("0F0"), 100.0, 100.5),
            Span(0, parse("0SA0"), 100.5, 100.75),
            Span(0, parse("0RG0"), 100.5, 103.0),
            Span(0, parse("0RG1"), 101.0, 104.0),
            Span(0, parse("0F1"), 100.5, 101.0),
            Span(0, parse("0B0"), 103.0, 104.0),
            Span(1, parse("1RA0"), 100.0, 100.75),
            Span(1, parse("1I0"), 100.75, 101.25),
            Span(1, parse("1W0"), 101.25, 101.5),
        )
    )


def in_a_v() -> Timeline:
    return simulate(all_streams(zb_v, Placement(3, 2, "v"), 6), Cost(forward=0.1, backward_weight=0.7))


def events(timelines: dict[str, Timeline], phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(chrome_trace(timelines))["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize("timelines", [{}, {"none": Timeline(())}, {"measured": measured(), "simulated": in_a_v()}])
def test_a_trace_is_what_the_format_says(timelines: dict[str, Timeline]) -> None:
    trace = json.loads(chrome_trace(timelines))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["args"], dict)
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            of, _, what = event["name"].partition("_")
            assert (of, what) in {(of, what) for of in ("process", "thread") for what in ("name", "sort_index")}
            assert list(event["args"]) == [what]
            assert ("tid" in event) == (of == "thread")
        else:
            assert set(event) == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
            assert event["ph"] == "X"
            assert isinstance(event["tid"], int)
            assert event["ts"] >= 0
            assert event["dur"] >= 0


def test_every_span_is_an_event_in_microseconds() -> None:
    of_pid = {1: measured(), 2: in_a_v()}
    found = events({"measured": of_pid[1], "simulated": of_pid[2]}, "X")
    assert len(found) == sum(len(timeline.spans) for timeline in of_pid.values())
    for pid, timeline in of_pid.items():
        times = {event["name"]: (event["ts"], event["dur"]) for event in found if event["pid"] == pid}
        microseconds = 1e6 if timeline.unit == "seconds" else 1e3
        first = min(span.start for span in timeline.spans)
        for span in timeline.spans:
            expected = (span.start - first) * microseconds, (span.end - span.start) * microseconds
            assert times[str(span.instruction)] == pytest.approx(expected, abs=0.002)
    for event in found:
        instruction = parse(event["name"])
        assert event["args"] == {"stage": instruction.stage, "microbatch": instruction.microbatch}


def test_events_by_example() -> None:
    found = {event["name"]: event for event in events({"measured": measured()}, "X")}
    assert found["0F1"] == {
        **{"name": "0F1", "cat": "forward", "ph": "X", "ts": 500_000.0, "dur": 500_000.0, "pid": 1, "tid": 1},
        "args": {"stage": 0, "microbatch": 1},
    }
    assert {name: found[name]["cat"] for name in ("0B0", "1I0", "1W0", "0SA0", "0RG0", "1RA0")} == {
        **{"0B0": "backward", "1I0": "backward input", "1W0": "backward weights"},
        **{"0SA0": "send", "0RG0": "receive", "1RA0": "receive"},
    }


def test_processes_are_timelines_and_threads_are_ranks() -> None:
    timelines = {"measured": measured(), "simulated": in_a_v()}
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events(timelines, "M") if "name" in e["args"]}
    assert {pid: name for (pid, tid), name in names.items() if tid is None} == {1: "measured", 2: "simulated"}
    messages = [f"rank 0, communication {lane}" for lane in (1, 2)]
    assert [name for (pid, tid), name in names.items() if pid == 1 and tid] == [
        *("rank 0", *messages),
        *("rank 1", "rank 1, communication 1"),
    ]
    assert [name for (pid, tid), name in names.items() if pid == 2 and tid] == ["rank 0", "rank 1", "rank 2"]
    for event in events(timelines, "X"):
        thread = names[event["pid"], event["tid"]]
        timeline = list(timelines.values())[event["pid"] - 1]
        span = next(span for span in timeline.spans if str(span.instruction) == event["name"])
        assert thread.split(",")[0] == f"rank {span.rank}"
        assert ("communication" in thread) == (event["cat"] in ("send", "receive"))


def nothing_overlaps(timelines: dict[str, Timeline]) -> None:
    """Events of one thread have to nest, says the format; these stand side by side."""
    threads = defaultdict(list)
    for event in events(timelines, "X"):
        threads[event["pid"], event["tid"]].append((round(event["ts"] * 1000), round(event["dur"] * 1000)))
    for of_thread in threads.values():
        of_thread.sort()
        for (start, length), (following, _) in zip(of_thread, of_thread[1:], strict=False):
            assert start + length <= following


def test_no_thread_does_two_things_at_once() -> None:
    nothing_overlaps({"measured": measured(), "simulated": in_a_v()})


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 5), st.floats(0, 2)), max_size=12))
def test_messages_never_overlap_however_they_fall(times: list[tuple[int, float, float]]) -> None:
    waits = (Span(rank, parse(f"1RA{i}"), start, start + length) for i, (rank, start, length) in enumerate(times))
    timeline = Timeline((Span(0, Forward(0, 0), 0.0, 1.0), *waits))
    nothing_overlaps({"it": timeline})
    assert len(events({"it": timeline}, "X")) == len(times) + 1
