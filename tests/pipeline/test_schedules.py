"""Every schedule by property. What is checked here never asks the simulator: test_simulator.py does."""

from collections import Counter, defaultdict
from typing import cast

import pytest
from scheduling import ALL, TRAINING, Case, for_many_sizes

from megalite.parallel.placement import Placement
from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    Receive,
    ReduceGradients,
    Send,
)
from megalite.pipeline.schedules import (
    SCHEDULES,
    all_streams,
    forward_only,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    placement,
    refusal,
    zb_h1,
    zb_v,
)

pytestmark = pytest.mark.slow


def microbatches(stream: tuple[Instruction, ...], stage: int, *kinds: type[Instruction]) -> list[int]:
    return [i.microbatch for i in stream if isinstance(i, kinds) and i.stage == stage]


def in_flight(stream: tuple[Instruction, ...]) -> int:
    """The most microbatches, over the stages of a rank, between their forward and the end of their backward."""
    level = highest = 0
    for instruction in stream:
        level += isinstance(instruction, Forward) - isinstance(instruction, Backward | BackwardWeight)
        highest = max(highest, level)
    return highest


def printed(streams: tuple[tuple[Instruction, ...], ...]) -> list[str]:
    """The streams without the reductions, which a property of all schedules is about."""
    return [" ".join(str(i) for i in stream if not isinstance(i, ReduceGradients)) for stream in streams]


def test_schedules_are_known_by_their_names_in_a_run_file() -> None:
    assert dict(SCHEDULES) == {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved_1f1b": interleaved_1f1b,
        "zb_h1": zb_h1,
        "zb_v": zb_v,
    }


@for_many_sizes(*TRAINING)
def test_each_stage_runs_each_microbatch_forward_and_backward_once_in_order(case: Case) -> None:
    every = list(range(case.num_microbatches))
    for rank, stream in enumerate(case.streams):
        assert {instruction.stage for instruction in stream} == set(case.placement.stages_of(rank))
        for stage in case.placement.stages_of(rank):
            assert microbatches(stream, stage, Forward) == every
            assert microbatches(stream, stage, Backward, BackwardInput) == every
            assert microbatches(stream, stage, Backward, BackwardWeight) == every


@for_many_sizes("forward_only")
def test_evaluation_runs_each_forward_once_in_order_and_nothing_backward(case: Case) -> None:
    for rank, stream in enumerate(case.streams):
        for stage in case.placement.stages_of(rank):
            assert microbatches(stream, stage, Forward) == list(range(case.num_microbatches))
        assert all(isinstance(i, Forward) or cast(Send | Receive, i).kind == "activation" for i in stream)


@for_many_sizes(*TRAINING)
def test_a_backward_comes_after_its_forward_and_its_weights_half_after_its_inputs(case: Case) -> None:
    for stream in case.streams:
        place = {instruction: index for index, instruction in enumerate(stream)}
        for instruction in stream:
            at = instruction.stage, instruction.microbatch
            if isinstance(instruction, Backward | BackwardInput):
                assert place[Forward(*at)] < place[instruction]
            if isinstance(instruction, BackwardWeight):
                assert place[BackwardInput(*at)] < place[instruction]
                assert Backward(*at) not in place


@for_many_sizes(*TRAINING)
def test_each_stage_reduces_its_gradients_once_after_its_last_backward(case: Case) -> None:
    for rank, stream in enumerate(case.streams):
        for stage in case.placement.stages_of(rank):
            of_stage = [i for i in stream if i.stage == stage and isinstance(i, Compute | ReduceGradients)]
            assert [isinstance(i, ReduceGradients) for i in of_stage] == [False] * (len(of_stage) - 1) + [True]


@pytest.mark.slow
@for_many_sizes(*ALL)
def test_each_send_follows_its_compute_and_each_receive_is_posted_early(case: Case) -> None:
    early = 2 if case.name == "interleaved_1f1b" else 1
    for stream, computes in zip(case.streams, case.computes, strict=True):
        messages = 0
        for index, compute in enumerate(computes):
            send, receive = compute.send(case.placement), compute.receive(case.placement)
            assert send is None or stream[stream.index(compute) + 1] == send
            assert receive is None or stream.index(receive) < stream.index(computes[max(index - early, 0)])
            messages += (send is not None) + (receive is not None)
        reductions = sum(isinstance(instruction, ReduceGradients) for instruction in stream)
        assert len(stream) == len(computes) + messages + reductions


@for_many_sizes(*ALL)
def test_on_every_link_sends_match_receives_in_order(case: Case) -> None:
    rank_of = case.placement.rank_of
    sends: dict[object, list[Instruction]] = defaultdict(list)
    receives: dict[object, list[Instruction]] = defaultdict(list)
    for rank, stream in enumerate(case.streams):
        for i in stream:
            if isinstance(i, Send):
                sends[rank, rank_of(i.counterpart.stage), i.kind].append(i.counterpart)
            elif isinstance(i, Receive):
                receives[rank_of(i.counterpart.stage), rank, i.kind].append(i)
    assert sends == receives
    assert all(source != destination for source, destination, _ in cast(list[tuple[int, int, str]], list(sends)))
    crossings = sum(case.placement.crosses(s, s + 1) for s in range(case.placement.num_stages - 1))
    kinds = Counter(i.kind for stream in case.streams for i in stream if isinstance(i, Send))
    assert kinds["activation"] == crossings * case.num_microbatches
    assert kinds["gradient"] == (0 if case.name == "forward_only" else crossings * case.num_microbatches)


@for_many_sizes(*TRAINING)
def test_a_backward_is_split_wherever_another_rank_waits_for_its_gradient(case: Case) -> None:
    splits = case.name in ("zb_h1", "zb_v")
    for computes in case.computes:
        for compute in computes:
            if isinstance(compute, Backward):
                assert not splits or compute.send(case.placement) is None
            assert splits or not isinstance(compute, BackwardInput | BackwardWeight)


# ---- how much is held at once


@for_many_sizes("1f1b")
def test_1f1b_keeps_at_most_num_ranks_minus_rank_microbatches(case: Case) -> None:
    for rank, stream in enumerate(case.streams):
        assert in_flight(stream) == min(case.placement.num_ranks - rank, case.num_microbatches)


@for_many_sizes("gpipe")
def test_gpipe_keeps_every_microbatch(case: Case) -> None:
    assert {in_flight(stream) for stream in case.streams} == {case.num_microbatches}


@for_many_sizes("interleaved_1f1b")
def test_interleaved_1f1b_keeps_what_megatron_says(case: Case) -> None:
    p, v, m = case.placement.num_ranks, case.placement.virtual_stages, case.num_microbatches
    for rank, stream in enumerate(case.streams):
        assert in_flight(stream) == min(v * p + p - 1 - 2 * rank, v * m)


@for_many_sizes("zb_h1")
def test_zb_h1_keeps_on_every_rank_what_1f1b_keeps_on_the_first(case: Case) -> None:
    assert {in_flight(s) for s in case.streams} == {min(case.placement.num_ranks, case.num_microbatches)}


@for_many_sizes("zb_v")
def test_zb_v_keeps_no_more_than_1f1b_on_its_first_rank(case: Case) -> None:
    p, m = case.placement.num_ranks, case.num_microbatches
    peaks = [in_flight(stream) for stream in case.streams]
    assert max(peaks) <= min(2 * p, 2 * m)
    assert m < 2 * p - 1 or set(peaks) == {2 * p}


# ---- by example


def test_1f1b_by_example() -> None:
    first, last = printed(all_streams(one_f_one_b, Placement(2), 3))
    assert first == "0F0 0SA0 0RG0 0F1 0SA1 0B0 0RG1 0F2 0SA2 0RG2 0B1 0B2"
    assert last == "1RA0 1F0 1RA1 1B0 1SG0 1F1 1RA2 1B1 1SG1 1F2 1B2 1SG2"


def test_gpipe_by_example() -> None:
    first, last = printed(all_streams(gpipe, Placement(2), 2))
    assert first == "0F0 0SA0 0RG0 0F1 0SA1 0RG1 0B0 0B1"
    assert last == "1RA0 1RA1 1F0 1F1 1B0 1SG0 1B1 1SG1"


def computes_of(case: Case) -> list[str]:
    return [" ".join(map(str, computes)) for computes in case.computes]


def test_interleaved_1f1b_by_example() -> None:
    assert computes_of(Case("interleaved_1f1b", Placement(2, 2), 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


def test_zb_h1_by_example() -> None:
    assert computes_of(Case("zb_h1", Placement(2), 3)) == [
        "0F0 0F1 0B0 0F2 0B1 0B2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]


def test_zb_v_by_example() -> None:
    assert computes_of(Case("zb_v", Placement(2, 2, "v"), 3)) == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0B0 3F2 3I2 3W2 0B1 0B2",
        "1F0 2F0 1F1 2F1 2B0 1F2 1I0 1W0 2F2 2B1 1I1 2I2 1I2 1W1 1W2 2W2",
    ]


def test_two_stages_of_one_rank_exchange_no_message() -> None:
    turn = all_streams(zb_v, Placement(2, 2, "v"), 3)[1]
    assert {str(i) for i in turn if isinstance(i, Send | Receive)} == {
        f"{word}{microbatch}" for word in ("1RA", "1SG", "2SA", "2RG") for microbatch in range(3)
    }
    alone = all_streams(interleaved_1f1b, Placement(1, 3), 2)
    assert not any(isinstance(instruction, Send | Receive) for instruction in alone[0])


# ---- what does not run


def test_where_the_stages_lie() -> None:
    assert placement("zb_v", 4, 2) == Placement(4, 2, "v")
    assert [placement(name, 4, 1) for name in ("gpipe", "1f1b", "zb_h1")] == [Placement(4)] * 3
    assert placement("interleaved_1f1b", 4, 3) == Placement(4, 3)


@pytest.mark.parametrize(
    ("name", "virtual_stages", "says"),
    [
        ("1f1b", 2, "runs one stage per rank; use parallel.virtual_stages=1, or parallel.schedule=interleaved_1f1b"),
        ("gpipe", 3, "runs one stage per rank; use parallel.virtual_stages=1, or parallel.schedule=interleaved_1f1b"),
        ("zb_h1", 2, "runs one stage per rank; use parallel.virtual_stages=1, or parallel.schedule=zb_v"),
        ("zb_v", 1, "runs two stages per rank; use parallel.virtual_stages=2, or parallel.schedule=zb_h1"),
        ("zb_v", 4, "runs two stages per rank; use parallel.virtual_stages=2, or parallel.schedule=interleaved_1f1b"),
        (
            "interleaved_1f1b",
            1,
            "runs two or more stages per rank; use parallel.virtual_stages=2, or parallel.schedule=1f1b",
        ),
    ],
)
def test_stages_that_a_schedule_does_not_run_are_refused(name: str, virtual_stages: int, says: str) -> None:
    expected = f"parallel.virtual_stages={virtual_stages} does not go with parallel.schedule={name}, which {says}"
    assert refusal(name, 4, virtual_stages, 8) == expected


@pytest.mark.parametrize(("count", "nearest"), [(1, "4"), (3, "4"), (6, "4 or 8"), (9, "8 or 12")])
def test_interleaved_1f1b_runs_whole_groups_of_microbatches(count: int, nearest: str) -> None:
    assert refusal("interleaved_1f1b", 4, 2, count) == (
        "parallel.schedule=interleaved_1f1b runs groups of parallel.pipeline=4 microbatches, and"
        f" {count} are not whole groups; use {nearest} microbatches"
    )
    assert all(refusal("interleaved_1f1b", 4, 2, whole) is None for whole in (4, 8, 12))
    assert all(
        refusal(name, 4, 2 if name == "zb_v" else 1, count) is None for name in ("gpipe", "1f1b", "zb_h1", "zb_v")
    )


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_is_refused(name: str) -> None:
    placed = placement(name, 4, 1 if refusal(name, 4, 1, 8) is None else 2) if name in SCHEDULES else Placement(4)
    schedule = SCHEDULES.get(name, forward_only)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=rf"rank {rank} is not in 0\.\.3"):
            schedule(rank, placed, 8)
    with pytest.raises(ValueError, match="at least one microbatch, not 0"):
        schedule(0, placed, 0)


def test_a_schedule_on_what_it_refuses_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"parallel\.virtual_stages=2 does not go with parallel\.schedule=1f1b"):
        one_f_one_b(0, Placement(4, 2), 8)
    with pytest.raises(ValueError, match="6 are not whole groups; use 4 or 8"):
        interleaved_1f1b(0, Placement(4, 2), 6)
    with pytest.raises(ValueError, match="zb_v needs a v placement"):
        zb_v(0, Placement(4, 2), 8)
    with pytest.raises(ValueError, match="interleaved_1f1b needs a loop placement"):
        interleaved_1f1b(0, Placement(4, 2, "v"), 8)
