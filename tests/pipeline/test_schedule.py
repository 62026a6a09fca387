"""Every schedule by property. What is checked here never asks the simulator: test_simulate.py does."""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalite.pipeline.instructions import (
    Backward,
    Compute,
    Forward,
    Instruction,
    Receive,
    ReceiveActivation,
    Send,
    SendActivation,
)
from megalite.pipeline.schedule import SCHEDULES, Schedule, all_streams, forward_only, gpipe, one_f_one_b

Test = Callable[..., None]
TRAINING = list(SCHEDULES.values())
ALL = [*TRAINING, forward_only]


def for_many_sizes(test: Test) -> Test:
    """Run a test over many numbers of stages and microbatches, the awkward ones always among them."""
    test = settings(deadline=None)(test)
    test = given(num_stages=st.integers(1, 12), num_microbatches=st.integers(1, 40))(test)
    for num_stages, num_microbatches in ((1, 1), (1, 5), (4, 1), (4, 3), (8, 2), (4, 4), (4, 16)):
        test = example(num_stages=num_stages, num_microbatches=num_microbatches)(test)
    return test


def microbatches(stream: tuple[Instruction, ...], kind: type[Instruction]) -> list[int]:
    return [instruction.microbatch for instruction in stream if isinstance(instruction, kind)]


def in_flight(stream: tuple[Instruction, ...]) -> int:
    """The most microbatches between their forward and their backward at any point of a stream."""
    level = highest = 0
    for instruction in stream:
        level += isinstance(instruction, Forward) - isinstance(instruction, Backward)
        highest = max(highest, level)
    return highest


def test_schedules_are_known_by_their_names_in_a_run_file() -> None:
    assert dict(SCHEDULES) == {"gpipe": gpipe, "1f1b": one_f_one_b}


@pytest.mark.parametrize("schedule", TRAINING)
@for_many_sizes
def test_each_forward_and_backward_runs_once_in_order(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    for stage, stream in enumerate(all_streams(schedule, num_stages, num_microbatches)):
        assert {instruction.stage for instruction in stream} == {stage}
        assert microbatches(stream, Forward) == list(range(num_microbatches))
        assert microbatches(stream, Backward) == list(range(num_microbatches))


@for_many_sizes
def test_evaluation_runs_each_forward_once_in_order_and_nothing_backward(
    num_stages: int, num_microbatches: int
) -> None:
    for stream in all_streams(forward_only, num_stages, num_microbatches):
        assert microbatches(stream, Forward) == list(range(num_microbatches))
        assert all(isinstance(instruction, Forward | SendActivation | ReceiveActivation) for instruction in stream)


@pytest.mark.parametrize("schedule", TRAINING)
@for_many_sizes
def test_a_backward_comes_after_its_forward(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    for stage, stream in enumerate(all_streams(schedule, num_stages, num_microbatches)):
        for microbatch in range(num_microbatches):
            assert stream.index(Forward(stage, microbatch)) < stream.index(Backward(stage, microbatch))


@pytest.mark.parametrize("schedule", ALL)
@for_many_sizes
def test_each_send_follows_its_compute_and_each_receive_is_posted_one_compute_early(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    for stream in all_streams(schedule, num_stages, num_microbatches):
        computes = [instruction for instruction in stream if isinstance(instruction, Compute)]
        for index, compute in enumerate(computes):
            at = stream.index(compute)
            send, receive = compute.send(num_stages), compute.receive(num_stages)
            assert send is None or stream[at + 1] == send
            assert receive is None or stream.index(receive) < stream.index(computes[max(index - 1, 0)])
        messages = sum((c.send(num_stages) is not None) + (c.receive(num_stages) is not None) for c in computes)
        assert len(stream) == len(computes) + messages


@pytest.mark.parametrize("schedule", ALL)
@for_many_sizes
def test_on_every_link_sends_match_receives_in_order(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    streams = all_streams(schedule, num_stages, num_microbatches)
    links = set()
    for stage, stream in enumerate(streams):
        for kind, peer in (("activation", stage + 1), ("gradient", stage - 1)):
            sends = [i for i in stream if isinstance(i, Send) and i.kind == kind]
            there = streams[peer] if 0 <= peer < num_stages else ()
            receives = [i for i in there if isinstance(i, Receive) and i.kind == kind]
            assert [send.counterpart for send in sends] == receives
            links |= {(stage, peer, kind)} if sends else set()
    assert len(links) == (num_stages - 1) * (1 if schedule is forward_only else 2)


@for_many_sizes
def test_1f1b_keeps_at_most_num_stages_minus_stage_microbatches(num_stages: int, num_microbatches: int) -> None:
    for stage, stream in enumerate(all_streams(one_f_one_b, num_stages, num_microbatches)):
        assert in_flight(stream) == min(num_stages - stage, num_microbatches)


@for_many_sizes
def test_gpipe_keeps_every_microbatch(num_stages: int, num_microbatches: int) -> None:
    assert {in_flight(stream) for stream in all_streams(gpipe, num_stages, num_microbatches)} == {num_microbatches}


def test_1f1b_by_example() -> None:
    first, last = (" ".join(map(str, stream)) for stream in all_streams(one_f_one_b, 2, 3))
    assert first == "0F0 0SA0 0RG0 0F1 0SA1 0B0 0RG1 0F2 0SA2 0RG2 0B1 0B2"
    assert last == "1RA0 1F0 1RA1 1B0 1SG0 1F1 1RA2 1B1 1SG1 1F2 1B2 1SG2"


def test_gpipe_by_example() -> None:
    first, last = (" ".join(map(str, stream)) for stream in all_streams(gpipe, 2, 2))
    assert first == "0F0 0SA0 0RG0 0F1 0SA1 0RG1 0B0 0B1"
    assert last == "1RA0 1RA1 1F0 1F1 1B0 1SG0 1B1 1SG1"


@pytest.mark.parametrize("schedule", ALL)
def test_what_cannot_be_is_refused(schedule: Schedule) -> None:
    for stage in (-1, 4):
        with pytest.raises(ValueError, match=f"stage {stage} is not in 0..3"):
            schedule(stage, 4, 8)
    with pytest.raises(ValueError, match="at least one microbatch, not 0"):
        schedule(0, 4, 0)
