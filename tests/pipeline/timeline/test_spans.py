import json

from megalite.parallel.placement import Placement
from megalite.pipeline.instructions import Backward, BackwardInput, BackwardWeight, Forward, parse
from megalite.pipeline.schedules import all_streams, one_f_one_b
from megalite.pipeline.timeline.simulator import simulate
from megalite.pipeline.timeline.spans import Span, Timeline


def measured() -> Timeline:
    """Two ranks on a clock that starts anywhere, with a wait for a message among the spans."""
    return Timeline(
        (
            Span(0, parse("0F0"), 100.0, 101.0),
            Span(0, parse("0SA0"), 101.0, 101.5),
            Span(1, parse("1F0"), 101.5, 102.5),
            Span(1, parse("1B0"), 102.5, 104.5),
            Span(0, parse("0RG0"), 101.5, 105.0),
            Span(0, parse("0B0"), 105.0, 108.0),
            Span(0, parse("0RG1"), 108.0, 120.0),
        )
    )


def test_only_forwards_and_backwards_count() -> None:
    timeline = measured()
    assert [str(span.instruction) for span in timeline.compute] == ["0F0", "1F0", "1B0", "0B0"]
    assert timeline.num_ranks == 2
    assert timeline.start == 100.0
    assert timeline.makespan == 8.0
    assert timeline.bubble_fraction == (16.0 - 7.0) / 16.0


def test_a_microbatch_is_in_flight_from_its_forward_to_the_end_of_its_backward() -> None:
    spans = [Span(0, Forward(0, m), m, m + 1) for m in (0, 1)]
    spans += [Span(0, Backward(0, 0), 2, 4), Span(0, Forward(0, 2), 4, 5)]
    spans += [Span(0, Backward(0, m), 5 + m, 6 + m) for m in (1, 2)]
    assert Timeline(tuple(spans)).peak_in_flight == (2,)


def test_what_a_split_backward_holds_it_holds_until_its_weights_are_done() -> None:
    spans = [Span(0, Forward(0, m), m, m + 1) for m in (0, 1)]
    spans += [Span(0, BackwardInput(0, 0), 2, 3), Span(0, Forward(0, 2), 3, 4), Span(0, BackwardWeight(0, 0), 4, 5)]
    spans += [Span(0, Forward(0, 3), 5, 6), *(Span(0, Backward(0, m), 5 + m, 6 + m) for m in (1, 2, 3))]
    assert Timeline(tuple(spans)).peak_in_flight == (3,)
    assert Timeline(tuple(spans)).bubble_fraction == 0.0


def test_the_stages_of_a_rank_share_its_layers() -> None:
    spans = [Span(0, Forward(0, m), m, m + 1) for m in (0, 1)] + [Span(0, Forward(3, 0), 2, 3)]
    spans += [Span(0, Backward(*at), 3 + i, 4 + i) for i, at in enumerate(((3, 0), (0, 0), (0, 1)))]
    spans += [Span(1, Forward(1, 0), 0, 1), Span(1, Backward(1, 0), 1, 2), Span(1, parse("2RA0"), 2, 3)]
    timeline = Timeline(tuple(spans))
    assert timeline.stages == ((0, 3), (1,))
    assert timeline.peak_in_flight == (3, 1)
    assert timeline.peak_microbatches == (1.5, 1.0)


def test_the_order_of_the_spans_does_not_matter() -> None:
    timeline = simulate(all_streams(one_f_one_b, Placement(4), 6))
    backwards = Timeline(timeline.spans[::-1], timeline.unit)
    assert backwards.peak_in_flight == timeline.peak_in_flight == (4, 3, 2, 1)
    assert backwards.bubble_fraction == timeline.bubble_fraction


def test_forwards_without_a_backward_hold_nothing() -> None:
    assert Timeline((Span(0, Forward(0, 0), 0, 1), Span(0, Forward(0, 1), 1, 2))).peak_in_flight == (0,)


def test_an_empty_timeline_is_no_error() -> None:
    empty = Timeline(())
    assert (empty.num_ranks, empty.makespan, empty.bubble_fraction, empty.peak_in_flight) == (0, 0.0, 0.0, ())
    assert empty.stages == empty.peak_microbatches == ()


def test_json_by_example() -> None:
    text = Timeline((Span(2, parse("2F0"), 0.5, 1.5),)).to_json()
    assert "\n" not in text
    assert json.loads(text) == {"unit": "seconds", "spans": [[2, "2F0", 0.5, 1.5]]}
