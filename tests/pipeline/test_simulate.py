"""The simulator: what it says of the schedules, that its times are right, and that it catches broken streams."""

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalite.pipeline.instructions import Backward, Compute, Forward, Instruction, Receive, Send, parse
from megalite.pipeline.schedule import SCHEDULES, Schedule, all_streams, forward_only, one_f_one_b, with_communication
from megalite.pipeline.simulate import (
    Cost,
    CrossedMessages,
    ScheduleDeadlock,
    ScheduleError,
    measured_cost,
    simulate,
)
from megalite.pipeline.timeline import Span, Timeline

Test = Callable[..., None]
TRAINING = list(SCHEDULES.values())
ALL = [*TRAINING, forward_only]


def for_many_sizes(test: Test) -> Test:
    test = settings(deadline=None, max_examples=50)(test)
    test = given(num_stages=st.integers(1, 8), num_microbatches=st.integers(1, 24))(test)
    for num_stages, num_microbatches in ((1, 1), (1, 5), (4, 1), (4, 3), (8, 2), (4, 4), (4, 16)):
        test = example(num_stages=num_stages, num_microbatches=num_microbatches)(test)
    return test


def streams_of(*lines: str) -> list[list[Instruction]]:
    return [[parse(word) for word in line.split()] for line in lines]


@pytest.mark.parametrize("rendezvous", [False, True])
@pytest.mark.parametrize("schedule", ALL)
@for_many_sizes
def test_no_schedule_deadlocks_or_crosses_messages(
    schedule: Schedule, rendezvous: bool, num_stages: int, num_microbatches: int
) -> None:
    streams = all_streams(schedule, num_stages, num_microbatches)
    timeline = simulate(streams, rendezvous=rendezvous)
    ran = sorted((span.rank, str(span.instruction)) for span in timeline.spans)
    assert ran == sorted(
        (rank, str(i)) for rank, stream in enumerate(streams) for i in stream if isinstance(i, Compute)
    )


@pytest.mark.parametrize("schedule", TRAINING)
@for_many_sizes
def test_the_bubble_is_exactly_the_textbooks(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    p, m = num_stages, num_microbatches
    timeline = simulate(all_streams(schedule, p, m), Cost(forward=1, backward=2))
    busy = sum(Fraction(span.end) - Fraction(span.start) for span in timeline.spans)
    assert 1 - busy / (p * Fraction(timeline.makespan)) == Fraction(p - 1, m + p - 1)
    assert timeline.bubble_fraction == (p - 1) / (m + p - 1)
    assert timeline.makespan == 3 * (m + p - 1)


@for_many_sizes
def test_the_bubble_of_an_evaluation_is_the_same(num_stages: int, num_microbatches: int) -> None:
    timeline = simulate(all_streams(forward_only, num_stages, num_microbatches))
    assert timeline.bubble_fraction == (num_stages - 1) / (num_microbatches + num_stages - 1)


@for_many_sizes
def test_microbatches_in_flight(num_stages: int, num_microbatches: int) -> None:
    p, m = num_stages, num_microbatches
    peaks = {name: simulate(all_streams(schedule, p, m)).peak_in_flight for name, schedule in SCHEDULES.items()}
    assert peaks == {"1f1b": tuple(min(p - stage, m) for stage in range(p)), "gpipe": (m,) * p}
    assert simulate(all_streams(forward_only, p, m)).peak_in_flight == (0,) * p


@settings(deadline=None, max_examples=100)
@given(data=st.data(), schedule=st.sampled_from(TRAINING), p=st.integers(1, 6), m=st.integers(1, 10))
def test_times_are_those_of_the_recurrence(data: st.DataObject, schedule: Schedule, p: int, m: int) -> None:
    """A compute starts once its rank is free and its input is made: written down again, as a recursion."""
    times = st.tuples(*[st.integers(1, 9)] * p)
    cost = Cost(forward=data.draw(times), backward=data.draw(times))
    computes = [[i for i in stream if isinstance(i, Compute)] for stream in all_streams(schedule, p, m)]

    @cache
    def end(compute: Compute) -> float:
        index = computes[compute.stage].index(compute)
        ready = [end(computes[compute.stage][index - 1])] if index else [0.0]
        receive = compute.receive(p)
        ready += [end(receive.counterpart.source)] if receive is not None else []
        return max(ready) + cost.of(compute)

    for span in simulate(all_streams(schedule, p, m), cost).spans:
        assert isinstance(span.instruction, Compute)
        assert (span.start, span.end) == (end(span.instruction) - cost.of(span.instruction), end(span.instruction))


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    schedule=st.sampled_from(ALL),
    p=st.integers(1, 6),
    m=st.integers(1, 10),
    rendezvous=st.booleans(),
)
def test_times_respect_cause_and_effect(
    data: st.DataObject, schedule: Schedule, p: int, m: int, rendezvous: bool
) -> None:
    times = st.tuples(*[st.floats(0.01, 10.0)] * p)
    cost = Cost(data.draw(times), data.draw(times), data.draw(times))
    streams = all_streams(schedule, p, m)
    timeline = simulate(streams, cost, rendezvous=rendezvous)
    span_of = {span.instruction: span for span in timeline.spans}
    for stream in streams:
        free = 0.0
        for compute in (i for i in stream if isinstance(i, Compute)):
            span, receive = span_of[compute], compute.receive(p)
            assert span.start >= free
            assert span.end == span.start + cost.of(compute)
            if receive is not None:
                send = receive.counterpart
                assert span.start >= span_of[send.source].end + cost.of(send)
            free = span.end
    assert timeline.makespan >= simulate(streams, Cost(cost.forward, cost.backward)).makespan
    assert timeline.makespan <= simulate(streams, cost, rendezvous=True).makespan


def test_messages_take_their_time_and_share_their_link() -> None:
    streams = all_streams(forward_only, 2, 3)
    ends = {str(span.instruction): span.end for span in simulate(streams, Cost(forward=1.0, send=3.0)).spans}
    assert ends == {"0F0": 1, "0F1": 2, "0F2": 3, "1F0": 5, "1F1": 8, "1F2": 11}
    blocked = {str(s.instruction): s.end for s in simulate(streams, Cost(1.0, send=3.0), rendezvous=True).spans}
    assert blocked == {"0F0": 1, "0F1": 5, "0F2": 9, "1F0": 5, "1F1": 9, "1F2": 13}


def test_a_rank_may_hold_several_virtual_stages() -> None:
    def stream(*stages: int) -> tuple[Instruction, ...]:
        computes = [Forward(stage, 0) for stage in stages] + [Backward(stage, 0) for stage in reversed(stages)]
        return with_communication(computes, num_stages=4)

    timeline = simulate([stream(0, 2), stream(1, 3)], rendezvous=True)
    assert timeline.makespan == 12
    assert timeline.peak_in_flight == (2, 2)


# ---- broken streams are caught


def test_swapped_sends_are_caught() -> None:
    streams = streams_of("0F0 0F1 0SA1 0SA0", "1RA0 1RA1 1F0 1F1")
    with pytest.raises(CrossedMessages, match="0SA1 meets 1RA0, which is there for 0SA0"):
        simulate(streams)


def test_swapped_receives_are_caught() -> None:
    streams = streams_of("0F0 0SA0 0F1 0SA1", "1RA1 1RA0 1F0 1F1")
    with pytest.raises(CrossedMessages, match="0SA0 meets 1RA1, which is there for 0SA1"):
        simulate(streams)


def test_a_missing_receive_is_caught() -> None:
    streams = streams_of("0F0 0SA0", "1F0")
    with pytest.raises(ScheduleDeadlock, match="rank 1 stands at 1F0, waiting for 1RA0, which has not been posted"):
        simulate(streams)


def test_a_missing_send_is_caught() -> None:
    streams = streams_of("0F0", "1RA0 1F0")
    with pytest.raises(ScheduleDeadlock, match="rank 1 stands at 1F0, waiting for 1RA0; posted and not met: 1RA0"):
        simulate(streams)


def test_a_send_that_nobody_receives_is_caught_though_every_rank_ends() -> None:
    streams = streams_of("0F0 0SA0 0F1 0SA1", "1RA0 1F0")
    with pytest.raises(ScheduleDeadlock, match="^posted and not met: 0SA1$"):
        simulate(streams)


def test_a_send_before_its_compute_is_caught() -> None:
    streams = streams_of("0SA0 0F0", "1RA0 1F0")
    with pytest.raises(ScheduleDeadlock, match="rank 0 stands at 0SA0, waiting for 0F0, which has not been run"):
        simulate(streams)


def test_a_receive_posted_after_the_compute_that_needs_it_is_caught() -> None:
    streams = streams_of("0F0 0SA0", "1F0 1RA0")
    with pytest.raises(ScheduleDeadlock, match="1F0, waiting for 1RA0, which has not been posted"):
        simulate(streams)


def test_a_backward_before_its_forward_is_caught() -> None:
    with pytest.raises(ScheduleDeadlock, match="0B0, waiting for 0F0, which has not been run"):
        simulate(streams_of("0B0 0F0"))


def late_receives(stage: int, num_stages: int, num_microbatches: int) -> tuple[Instruction, ...]:
    """1F1B whose receives stand right before the compute that needs them, so after the sends of the one before."""
    computes = [i for i in one_f_one_b(stage, num_stages, num_microbatches) if isinstance(i, Compute)]
    stream = [i for c in computes for i in (c.receive(num_stages), c, c.send(num_stages))]
    return tuple(i for i in stream if i is not None)


@settings(deadline=None)
@given(num_stages=st.integers(2, 6), num_microbatches=st.integers(2, 12))
def test_receives_posted_late_deadlock_where_sends_block(num_stages: int, num_microbatches: int) -> None:
    streams = all_streams(late_receives, num_stages, num_microbatches)
    simulate(streams)
    with pytest.raises(ScheduleDeadlock, match=r"SA1, waiting for \dRA1, which has not been posted"):
        simulate(streams, rendezvous=True)


@pytest.mark.parametrize("schedule", TRAINING)
@settings(deadline=None)
@given(num_stages=st.integers(2, 6), num_microbatches=st.integers(1, 12))
def test_one_communicator_for_both_directions_would_deadlock(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    """Why activations and gradients have communicators of their own: first in, first out, they block each other."""
    streams = all_streams(schedule, num_stages, num_microbatches)
    with pytest.raises(ScheduleDeadlock, match="posted and not met"):
        simulate(streams, communicator=lambda source, destination, kind: frozenset((source, destination)))


@pytest.mark.parametrize("schedule", TRAINING)
@settings(deadline=None)
@given(data=st.data(), num_stages=st.integers(2, 5), num_microbatches=st.integers(1, 8))
def test_a_schedule_that_lacks_any_one_message_or_forward_is_caught(
    schedule: Schedule, data: st.DataObject, num_stages: int, num_microbatches: int
) -> None:
    streams = [list(stream) for stream in all_streams(schedule, num_stages, num_microbatches)]
    stream = data.draw(st.sampled_from(streams))
    stream.remove(data.draw(st.sampled_from([i for i in stream if isinstance(i, Send | Receive | Forward)])))
    with pytest.raises(ScheduleError):
        simulate(streams)


@pytest.mark.parametrize("schedule", TRAINING)
@settings(deadline=None)
@given(data=st.data(), num_stages=st.integers(2, 5), num_microbatches=st.integers(2, 8))
def test_a_schedule_with_two_messages_of_a_link_exchanged_is_caught(
    schedule: Schedule, data: st.DataObject, num_stages: int, num_microbatches: int
) -> None:
    streams = [list(stream) for stream in all_streams(schedule, num_stages, num_microbatches)]
    stream = data.draw(st.sampled_from(streams))
    of_a_kind = data.draw(st.sampled_from(sorted({type(i) for i in stream if isinstance(i, Send | Receive)}, key=str)))
    places = [index for index, instruction in enumerate(stream) if isinstance(instruction, of_a_kind)]
    first, second = data.draw(st.permutations(places))[:2]
    stream[first], stream[second] = stream[second], stream[first]
    with pytest.raises(ScheduleError):
        simulate(streams)


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(ScheduleError, match="0F0 stands in its stream more than once"):
        simulate(streams_of("0F0 0F0"))
    with pytest.raises(ScheduleError, match="stage 0 is run by rank 0 and by rank 1"):
        simulate(streams_of("0F0", "0F1"))
    with pytest.raises(ScheduleError, match="0SA0 talks to stage 1, which no rank runs"):
        simulate(streams_of("0F0 0SA0"))


# ---- costs


def test_costs_may_differ_by_stage() -> None:
    cost = Cost(forward=(1.0, 2.0), backward=5.0, send=(0.5, 0.25))
    costs = {word: cost.of(parse(word)) for word in ("0F3", "1F3", "1B0", "0SA0", "1SG0", "1RA0", "0RG0")}
    assert costs == {"0F3": 1.0, "1F3": 2.0, "1B0": 5.0, "0SA0": 0.5, "1SG0": 0.25, "1RA0": 0.0, "0RG0": 0.0}


def test_the_unit_of_a_cost_is_the_timelines() -> None:
    assert simulate(streams_of("0F0")).unit == "forward"
    assert simulate(streams_of("0F0"), Cost(unit="seconds")).unit == "seconds"


def test_measured_cost_gives_back_what_was_simulated() -> None:
    cost = Cost(forward=(0.1, 0.2, 0.3), backward=(0.2, 0.4, 0.7), send=0.05, unit="seconds")
    measured = measured_cost(simulate(all_streams(one_f_one_b, 3, 5), cost))
    assert measured.unit == "seconds"
    assert measured.send == 0.0
    assert measured.forward == pytest.approx(cost.forward)
    assert measured.backward == pytest.approx(cost.backward)


def test_measured_cost_is_a_median_over_computes_alone() -> None:
    spans = [Span(0, Forward(0, m), 0.0, length) for m, length in enumerate((9.0, 1.0, 2.0))]
    sends = [Span(0, parse("0SA0"), 0.0, 100.0)]
    assert measured_cost(Timeline((*spans, *sends))) == Cost((2.0,), (0.0,), unit="seconds")
