import doctest
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.parallel import placement
from megalite.parallel.placement import Placement
from megalite.pipeline import instructions, partition, schedules
from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
    parse,
)

KINDS: tuple[type[Instruction], ...] = (
    Forward,
    Backward,
    BackwardInput,
    BackwardWeight,
    SendActivation,
    ReceiveActivation,
    SendGradient,
    ReceiveGradient,
)


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(0, 10**6))
def test_parse_reads_back_what_an_instruction_prints(kind: type[Instruction], stage: int, microbatch: int) -> None:
    instruction = kind(stage, microbatch)
    assert parse(str(instruction)) == instruction


def test_instructions_print_as_stage_code_microbatch() -> None:
    assert [str(kind(2, 0)) for kind in KINDS] == ["2F0", "2B0", "2I0", "2W0", "2SA0", "2RA0", "2SG0", "2RG0"]


@pytest.mark.parametrize("text", ["", "F", "2F", "F0", "2X0", "2f0", "-1F0", "02F0", "2F00", "2F0 ", "2F0\n", "٢F0"])
def test_parse_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match="is no instruction"):
        parse(text)


def test_instructions_of_different_kinds_differ() -> None:
    assert len({kind(0, 0) for kind in KINDS}) == len(KINDS)


def test_instructions_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Forward(0, 0).stage = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_computes_know_what_they_receive_and_send() -> None:
    three = Placement(3)
    assert Forward(1, 5).receive(three) == ReceiveActivation(1, 5)
    assert Forward(1, 5).send(three) == SendActivation(1, 5)
    for backward in (Backward(1, 5), BackwardInput(1, 5)):
        assert backward.receive(three) == ReceiveGradient(1, 5)
        assert backward.send(three) == SendGradient(1, 5)


def test_the_ends_of_the_pipeline_have_no_neighbour() -> None:
    for placed in (Placement(3), Placement(1, 3), Placement(2, 2, "v")):
        last = placed.num_stages - 1
        for backward in (Backward, BackwardInput):
            assert Forward(0, 5).receive(placed) is None
            assert backward(0, 5).send(placed) is None
            assert Forward(last, 5).send(placed) is None
            assert backward(last, 5).receive(placed) is None


def test_weight_gradients_stay_where_they_are() -> None:
    for placed in (Placement(3), Placement(1, 3)):
        at = BackwardWeight(1, 5)
        assert at.receive(placed) is at.send(placed) is None


@pytest.mark.parametrize("turn", [Placement(2, 2, "v"), Placement(1, 4)])
def test_neighbours_on_one_rank_exchange_no_message(turn: Placement) -> None:
    assert Forward(1, 5).send(turn) is None
    assert Forward(2, 5).receive(turn) is None
    for backward in (Backward, BackwardInput):
        assert backward(2, 5).send(turn) is None
        assert backward(1, 5).receive(turn) is None


def test_both_ends_of_a_message_name_each_other() -> None:
    assert SendActivation(1, 5).counterpart == ReceiveActivation(2, 5)
    assert SendGradient(1, 5).counterpart == ReceiveGradient(0, 5)
    for send in (SendActivation(1, 5), SendGradient(1, 5)):
        assert send.counterpart.counterpart == send
        assert send.counterpart.kind == send.kind


def test_a_message_names_what_makes_it() -> None:
    computes: tuple[type[Compute], ...] = (Forward, Backward, BackwardInput, BackwardWeight)
    for send in (SendActivation(1, 5), SendGradient(1, 5)):
        assert set(send.sources) == {kind(1, 5) for kind in computes if kind(1, 5).resulting_send(3) == send}


@pytest.mark.parametrize("module", [instructions, partition, placement, schedules])
def test_the_examples_in_the_docstrings_are_true(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed
