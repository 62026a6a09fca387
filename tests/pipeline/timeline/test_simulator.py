"""The simulator: what it says of the schedules, that its times are right, and that it catches broken streams."""

from fractions import Fraction
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import ALL, TRAINING, Case, for_many_sizes, grid

from megalite.parallel.placement import Placement
from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    Receive,
    Send,
    parse,
)
from megalite.pipeline.schedules import all_streams, forward_only, one_f_one_b, with_communication
from megalite.pipeline.timeline.simulator import (
    Cost,
    CrossedMessages,
    ScheduleDeadlock,
    ScheduleError,
    measured_cost,
    simulate,
)
from megalite.pipeline.timeline.spans import Span, Timeline

pytestmark = pytest.mark.slow

BLOCKING = tuple(name for name in ALL if name != "zb_v")
"""The schedules that get through even where every send blocks."""


def streams_of(*lines: str) -> list[list[Instruction]]:
    return [[parse(word) for word in line.split()] for line in lines]


def gets_through(case: Case, *, rendezvous: bool) -> None:
    ran = [span.instruction for span in simulate(case.streams, rendezvous=rendezvous).spans]
    assert len(ran) == len(set(ran))
    assert set(ran) == {compute for computes in case.computes for compute in computes}


@pytest.mark.slow
@for_many_sizes(*ALL)
def test_no_schedule_deadlocks_or_crosses_messages(case: Case) -> None:
    gets_through(case, rendezvous=False)


@pytest.mark.slow
@for_many_sizes(*BLOCKING)
def test_nor_where_every_send_blocks(case: Case) -> None:
    gets_through(case, rendezvous=True)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("name", ALL)
def test_no_size_deadlocks_or_crosses_messages(name: str, ranks: int) -> None:
    for case in grid([name], range(ranks, ranks + 1), range(1, 5), range(1, 34)):
        gets_through(case, rendezvous=False)
        if name in BLOCKING:
            gets_through(case, rendezvous=True)


def test_zb_v_needs_sends_that_do_not_block() -> None:
    case = Case("zb_v", Placement(2, 2, "v"), 4)
    simulate(case.streams)
    with pytest.raises(ScheduleDeadlock, match="which has not been posted"):
        simulate(case.streams, rendezvous=True)


# ---- the published bubbles, exactly


def sizes(case: Case) -> tuple[int, int, int]:
    return case.placement.num_ranks, case.placement.virtual_stages, case.num_microbatches


def bubble(timeline: Timeline) -> Fraction:
    busy = sum(Fraction(span.end) - Fraction(span.start) for span in timeline.compute)
    return 1 - busy / (timeline.num_ranks * Fraction(timeline.makespan))


@for_many_sizes("gpipe", "1f1b", "interleaved_1f1b")
def test_the_bubble_is_exactly_the_textbooks(case: Case) -> None:
    p, v, m = sizes(case)
    timeline = simulate(case.streams, Cost(forward=1, backward=2))
    assert bubble(timeline) == Fraction(p - 1, v * m + p - 1)
    assert timeline.bubble_fraction == (p - 1) / (v * m + p - 1)
    assert timeline.makespan == 3 * (v * m + p - 1)


@for_many_sizes("forward_only")
def test_the_bubble_of_an_evaluation_is_the_least_there_can_be(case: Case) -> None:
    p, v, m = sizes(case)
    makespan = simulate(case.streams).makespan
    if case.placement.shape == "v":
        assert makespan == 2 * m + 2 * (p - 1)
    elif m % p == 0 or v == 1:
        assert makespan == v * m + p - 1
    else:
        assert makespan <= v * p * -(-m // p) + p - 1


@pytest.mark.parametrize("p", range(1, 7))
def test_zb_h1_takes_as_long_as_published(p: int) -> None:
    for m, forward, for_input in product((p, p + 1, 3 * p), (2, 3, 5), (2, 3, 5)):
        for for_weight in range(1, min(forward, for_input) + 1):
            cost = halves(forward, for_input, for_weight)
            timeline = simulate(Case("zb_h1", Placement(p), m).streams, cost)
            work, idle = m * (forward + for_input + for_weight), (p - 1) * (forward + for_input - for_weight)
            assert timeline.makespan == work + idle


@pytest.mark.slow
@for_many_sizes("zb_h1")
def test_zb_h1_is_never_slower_than_1f1b(case: Case) -> None:
    p, _, m = sizes(case)
    for forward, for_input, for_weight in product((1, 4), (1, 3), (1, 2)):
        cost = halves(forward, for_input, for_weight)
        slower = simulate(Case("1f1b", Placement(p), m).streams, cost).makespan
        assert simulate(case.streams, cost).makespan <= slower


@for_many_sizes("zb_v")
def test_no_rank_of_zb_v_ever_idles(case: Case) -> None:
    p, _, m = sizes(case)
    timeline = simulate(case.streams)
    assert m < 2 * p - 1 or timeline.makespan == 6 * m + p - 1
    for rank in range(p):
        spans = [span for span in timeline.spans if span.rank == rank]
        start, end = min(span.start for span in spans), max(span.end for span in spans)
        assert start == rank
        assert m < 2 * p - 1 or end - start == 6 * m


@pytest.mark.parametrize("p", range(1, 6))
def test_what_uneven_costs_add_to_zb_v_does_not_grow_with_the_microbatches(p: int) -> None:
    for forward, for_input, for_weight in product((2, 3), (2, 3, 4), (2, 3)):
        cost = halves(forward, for_input, for_weight)
        lengths = [
            simulate(Case("zb_v", Placement(p, 2, "v"), m).streams, cost).makespan for m in (2 * p, 2 * p + 1, 4 * p)
        ]
        each = 2 * (forward + for_input + for_weight)
        assert [length - lengths[0] for length in lengths] == [0, each, 2 * p * each]


def halves(forward: float, for_input: float, for_weight: float) -> Cost:
    return Cost(forward, for_input + for_weight, for_input, for_weight)


# ---- what is held


@pytest.mark.slow
@for_many_sizes(*ALL)
def test_activations_held_at_once(case: Case) -> None:
    p, v, m = sizes(case)
    peaks = {
        "gpipe": lambda rank: m,
        "1f1b": lambda rank: min(p - rank, m),
        "interleaved_1f1b": lambda rank: min(v * p + p - 1 - 2 * rank, v * m),
        "zb_h1": lambda rank: min(p, m),
        "forward_only": lambda rank: 0,
    }
    timeline = simulate(case.streams)
    if case.name == "zb_v":
        assert max(timeline.peak_in_flight) <= 2 * min(p, m)
    else:
        assert timeline.peak_in_flight == tuple(peaks[case.name](rank) for rank in range(p))
    assert timeline.peak_microbatches == tuple(peak / v for peak in timeline.peak_in_flight)


# ---- times


@settings(deadline=None, max_examples=100)
@given(data=st.data(), case=st.sampled_from(list(grid(TRAINING, range(1, 6), range(1, 4), range(1, 10)))))
def test_times_are_those_of_the_recurrence(data: st.DataObject, case: Case) -> None:
    """A compute starts once its rank is free and its input is made: written down again, as a recursion."""
    times = st.tuples(*[st.integers(1, 9)] * case.placement.num_stages)
    forward, backward, for_input, for_weight = (data.draw(times) for _ in range(4))
    cost = Cost(forward, backward, for_input, for_weight)
    ranks = case.computes
    place = {compute: (rank, index) for rank, order in enumerate(ranks) for index, compute in enumerate(order)}

    @cache
    def end(compute: Compute) -> float:
        rank, index = place[compute]
        ready = [end(ranks[rank][index - 1])] if index else [0.0]
        taken = compute.required_receive(case.placement.num_stages)
        ready += [end(source) for source in taken.counterpart.sources if source in place] if taken is not None else []
        return max(ready) + cost.of(compute)

    spans = simulate(case.streams, cost).spans
    assert len(spans) == len(place)
    for span in spans:
        assert isinstance(span.instruction, Compute)
        assert (span.start, span.end) == (end(span.instruction) - cost.of(span.instruction), end(span.instruction))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), case=st.sampled_from(list(grid(ALL, range(1, 6), range(1, 4), range(1, 10)))))
def test_times_respect_cause_and_effect(data: st.DataObject, case: Case) -> None:
    times = st.tuples(*[st.floats(0.01, 10.0)] * case.placement.num_stages)
    forward, backward, for_input, for_weight, send = (data.draw(times) for _ in range(5))
    cost = Cost(forward, backward, for_input, for_weight, send)
    streams = case.streams
    timeline = simulate(streams, cost)
    span_of = {span.instruction: span for span in timeline.spans}
    for computes in case.computes:
        free = 0.0
        for compute in computes:
            span, taken = span_of[compute], compute.required_receive(case.placement.num_stages)
            assert span.start >= free
            assert span.end == span.start + cost.of(compute)
            if taken is not None:
                made = taken.counterpart
                crossing = cost.of(made) if compute.receive(case.placement) else 0.0
                assert span.start >= min(span_of[one].end for one in made.sources if one in span_of) + crossing
            free = span.end
    at_once = Cost(forward, backward, for_input, for_weight)
    assert timeline.makespan >= simulate(streams, at_once).makespan
    if case.name in BLOCKING:
        assert timeline.makespan <= simulate(streams, cost, rendezvous=True).makespan


def test_messages_take_their_time_and_share_their_link() -> None:
    streams = all_streams(forward_only, Placement(2), 3)
    ends = {str(span.instruction): span.end for span in simulate(streams, Cost(forward=1.0, send=3.0)).spans}
    assert ends == {"0F0": 1, "0F1": 2, "0F2": 3, "1F0": 5, "1F1": 8, "1F2": 11}
    blocked = {str(s.instruction): s.end for s in simulate(streams, Cost(1.0, send=3.0), rendezvous=True).spans}
    assert blocked == {"0F0": 1, "0F1": 5, "0F2": 9, "1F0": 5, "1F1": 9, "1F2": 13}


def test_a_rank_may_hold_several_stages() -> None:
    def stream(*stages: int) -> tuple[Instruction, ...]:
        computes = [Forward(stage, 0) for stage in stages] + [Backward(stage, 0) for stage in reversed(stages)]
        return with_communication(computes, Placement(2, 2))

    timeline = simulate([stream(0, 2), stream(1, 3)], rendezvous=True)
    assert timeline.makespan == 12
    assert timeline.peak_in_flight == (2, 2)
    assert timeline.peak_microbatches == (1.0, 1.0)


def test_what_passes_on_a_rank_takes_no_time_and_no_message() -> None:
    streams = streams_of("0F0 0SA0 0RG0 0B0", "1RA0 1F0 2F0 2I0 1B0 1SG0 2W0")
    ends = {str(span.instruction): span.end for span in simulate(streams, Cost(send=10.0)).spans}
    assert ends == {"0F0": 1, "1F0": 12, "2F0": 13, "2I0": 14, "1B0": 16, "2W0": 17, "0B0": 28}


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


def late_receives(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """1F1B whose receives stand right before the compute that needs them, so after the sends of the one before."""
    computes = [i for i in one_f_one_b(rank, placement, num_microbatches) if isinstance(i, Compute)]
    stream = [i for c in computes for i in (c.receive(placement), c, c.send(placement))]
    return tuple(i for i in stream if i is not None)


@settings(deadline=None)
@given(num_ranks=st.integers(2, 6), num_microbatches=st.integers(2, 12))
def test_receives_posted_late_deadlock_where_sends_block(num_ranks: int, num_microbatches: int) -> None:
    streams = all_streams(late_receives, Placement(num_ranks), num_microbatches)
    simulate(streams)
    with pytest.raises(ScheduleDeadlock, match=r"SA1, waiting for \dRA1, which has not been posted"):
        simulate(streams, rendezvous=True)


@settings(deadline=None)
@given(case=st.sampled_from(list(grid(TRAINING, range(2, 7), range(1, 4), range(1, 13)))))
def test_one_communicator_for_both_directions_would_deadlock(case: Case) -> None:
    """Why activations and gradients have communicators of their own: first in, first out, they block each other."""
    with pytest.raises(ScheduleError, match="posted and not met|which is there for"):
        simulate(case.streams, communicator=lambda source, destination, kind: frozenset((source, destination)))


@settings(deadline=None)
@given(data=st.data(), case=st.sampled_from(list(grid(TRAINING, range(2, 6), range(1, 4), range(1, 9)))))
def test_a_schedule_that_lacks_any_one_message_or_forward_is_caught(data: st.DataObject, case: Case) -> None:
    streams = [list(stream) for stream in case.streams]
    stream = data.draw(st.sampled_from(streams))
    missed = [i for i in stream if isinstance(i, Send | Receive | Forward | BackwardInput)]
    stream.remove(data.draw(st.sampled_from(missed)))
    with pytest.raises(ScheduleError):
        simulate(streams)


@settings(deadline=None)
@given(data=st.data(), case=st.sampled_from(list(grid(TRAINING, range(2, 6), range(1, 4), range(2, 9)))))
def test_a_schedule_with_two_messages_of_a_link_exchanged_is_caught(data: st.DataObject, case: Case) -> None:
    streams = [list(stream) for stream in case.streams]
    stream = data.draw(st.sampled_from(streams))
    links = sorted({(type(i).__name__, i.stage) for i in stream if isinstance(i, Send | Receive)})
    link = data.draw(st.sampled_from(links))
    places = [index for index, i in enumerate(stream) if (type(i).__name__, i.stage) == link]
    first, second = data.draw(st.permutations(places))[:2]
    stream[first], stream[second] = stream[second], stream[first]
    with pytest.raises(ScheduleError):
        simulate(streams)


def test_messages_of_two_stages_of_a_rank_that_share_a_link_are_told_apart() -> None:
    """With two ranks in a loop, stages 0 and 2 both send to rank 1."""
    right = streams_of("0F0 0SA0 2RA0 2F0 2SA0", "1RA0 1F0 1SA0 3RA0 3F0")
    assert simulate(right).makespan == 4
    wrong = streams_of("0F0 0SA0 2RA0 2F0 2SA0", "3RA0 1RA0 1F0 1SA0 3F0")
    with pytest.raises(CrossedMessages, match="0SA0 meets 3RA0, which is there for 2SA0"):
        simulate(wrong)


def test_a_weights_half_before_its_inputs_half_is_caught() -> None:
    with pytest.raises(ScheduleDeadlock, match="0W0, waiting for 0I0, which has not been run"):
        simulate(streams_of("0F0 0W0 0I0"))


def test_a_gradient_sent_before_either_backward_is_caught() -> None:
    streams = streams_of("0F0 0SA0 0RG0 0B0", "1RA0 1F0 1SG0 1I0 1W0")
    with pytest.raises(ScheduleDeadlock, match="1SG0, waiting for 1B0 or 1I0, which has not been run"):
        simulate(streams)


def test_a_compute_before_what_its_own_rank_hands_over_is_caught() -> None:
    with pytest.raises(ScheduleDeadlock, match="1F0, waiting for 0F0, which has not been run"):
        simulate(streams_of("1F0 0F0"))
    with pytest.raises(ScheduleDeadlock, match="0B0, waiting for 1B0 or 1I0, which has not been run"):
        simulate(streams_of("0F0 1F0 0B0 1B0"))


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(ScheduleError, match="0F0 stands in its stream more than once"):
        simulate(streams_of("0F0 0F0"))
    with pytest.raises(ScheduleError, match="stage 0 is run by rank 0 and by rank 1"):
        simulate(streams_of("0F0", "0F1"))
    with pytest.raises(ScheduleError, match="0SA0 talks to stage 1, which no rank runs"):
        simulate(streams_of("0F0 0SA0"))


# ---- costs


def test_costs_may_differ_by_stage() -> None:
    cost = Cost(forward=(1.0, 2.0), backward=5.0, backward_input=(2.0, 3.0), backward_weight=1.5, send=(0.5, 0.25))
    computes = {"0F3": 1.0, "1F3": 2.0, "1B0": 5.0, "0I0": 2.0, "1I0": 3.0, "1W0": 1.5}
    messages = {"0SA0": 0.5, "1SG0": 0.25, "1RA0": 0.0, "0RG0": 0.0}
    for word, time in (computes | messages).items():
        assert cost.of(parse(word)) == time


def test_the_unit_of_a_cost_is_the_timelines() -> None:
    assert simulate(streams_of("0F0")).unit == "forward"
    assert simulate(streams_of("0F0"), Cost(unit="seconds")).unit == "seconds"


@pytest.mark.parametrize("case", [Case("1f1b", Placement(3), 5), Case("zb_h1", Placement(3), 5)])
def test_measured_cost_gives_back_what_was_simulated(case: Case) -> None:
    cost = Cost((0.1, 0.2, 0.3), (0.2, 0.4, 0.7), (0.1, 0.3, 0.4), (0.1, 0.1, 0.3), 0.05, "seconds")
    measured = measured_cost(simulate(case.streams, cost))
    assert measured.unit == "seconds"
    assert measured.send == pytest.approx(cost.send)
    assert measured.forward == pytest.approx(cost.forward)
    assert measured.backward == pytest.approx(cost.backward)
    if case.name == "zb_h1":
        assert measured.backward_input == pytest.approx(cost.backward_input)
        assert measured.backward_weight == pytest.approx(cost.backward_weight)


def test_of_a_backward_measured_whole_each_half_is_half() -> None:
    spans = (Span(0, Backward(0, 0), 0.0, 3.0), Span(1, BackwardInput(1, 0), 0.0, 4.0))
    spans += (Span(1, BackwardWeight(1, 0), 4.0, 5.0),)
    cost = measured_cost(Timeline(spans))
    assert cost == Cost((0.0, 0.0), (3.0, 5.0), (1.5, 4.0), (1.5, 1.0), unit="seconds")


def test_a_message_takes_the_time_that_its_rank_waited_for_it() -> None:
    spans = [Span(0, Forward(0, m), m, m + 1.0) for m in range(3)]
    spans += [Span(1, Forward(1, 0), 1.5, 2.4), Span(1, Forward(1, 1), 2.6, 9.0), Span(1, Forward(1, 2), 9.0, 10.0)]
    assert measured_cost(Timeline(tuple(spans[:4]))).send == 0.5
    assert measured_cost(Timeline(tuple(spans))).send == 0.5  # the others came while the rank computed


def test_a_stage_on_its_neighbours_rank_waits_for_no_message() -> None:
    spans = (Span(0, Forward(0, 0), 0.0, 1.0), Span(0, Forward(1, 0), 4.0, 5.0))
    assert measured_cost(Timeline(spans)).send == 0.0


def test_measured_cost_is_a_median_over_computes_alone() -> None:
    spans = [Span(0, Forward(0, m), 0.0, length) for m, length in enumerate((9.0, 1.0, 2.0))]
    sends = [Span(0, parse("0SA0"), 0.0, 100.0)]
    assert measured_cost(Timeline((*spans, *sends))) == Cost((2.0,), (0.0,), (0.0,), (0.0,), unit="seconds")


# ---- the reduction of gradients


def test_a_reduction_runs_beside_the_last_backward_bucket_by_bucket() -> None:
    """Of a backward of 2 in 4 buckets the first is ready after 0.5; a long reduction then ends after its own time."""
    streams = streams_of("0F0 0B0 0R0")
    for cost, exposed in ((0.4, 0.1), (1.5, 0.375), (8.0, 6.5)):
        timeline = simulate(streams, Cost(forward=1, backward=2, reduce=cost, reduce_buckets=4))
        assert timeline.exposed_reduction == pytest.approx(exposed)
    assert simulate(streams, Cost(reduce=0.4)).exposed_reduction == pytest.approx(0.4)


def test_a_stage_that_ends_early_reduces_behind_the_ranks_other_stages() -> None:
    streams = streams_of("0F0 1F0 1B0 1R0 0B0 0R0")
    timeline = simulate(streams, Cost(forward=1, backward=2, reduce=(0.0, 1.5)))
    assert (timeline.exposed_reduction, timeline.makespan) == (0.0, 6.0)
    both = simulate(streams, Cost(forward=1, backward=2, reduce=3.0))
    assert [(str(s.instruction), s.start, s.end) for s in both.reductions] == [("1R0", 4.0, 7.0), ("0R0", 7.0, 10.0)]


def test_deferred_weight_gradients_are_reduced_after_the_last_of_them() -> None:
    timeline = simulate(streams_of("0F0 0I0 0W0 0R0"), Cost(reduce=0.5, reduce_buckets=8))
    assert timeline.exposed_reduction == pytest.approx(0.5)


def test_a_reduction_before_its_backward_is_caught() -> None:
    with pytest.raises(ScheduleDeadlock, match="0R0"):
        simulate(streams_of("0F0 0R0 0B0"))
