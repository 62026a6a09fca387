import doctest
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.pipeline import instructions, partition, schedule
from megalite.pipeline.instructions import (
    Backward,
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
    assert [str(kind(2, 0)) for kind in KINDS] == ["2F0", "2B0", "2SA0", "2RA0", "2SG0", "2RG0"]


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
    assert Forward(1, 5).receive(3) == ReceiveActivation(1, 5)
    assert Forward(1, 5).send(3) == SendActivation(1, 5)
    assert Backward(1, 5).receive(3) == ReceiveGradient(1, 5)
    assert Backward(1, 5).send(3) == SendGradient(1, 5)


def test_the_ends_of_the_pipeline_have_no_neighbour() -> None:
    assert Forward(0, 5).receive(3) is None
    assert Backward(0, 5).send(3) is None
    assert Forward(2, 5).send(3) is None
    assert Backward(2, 5).receive(3) is None


def test_both_ends_of_a_message_name_each_other() -> None:
    assert SendActivation(1, 5).counterpart == ReceiveActivation(2, 5)
    assert SendGradient(1, 5).counterpart == ReceiveGradient(0, 5)
    for send in (SendActivation(1, 5), SendGradient(1, 5)):
        assert send.counterpart.counterpart == send
        assert send.counterpart.kind == send.kind
        assert send.source.send(3) == send


@pytest.mark.parametrize("module", [instructions, partition, schedule])
def test_the_examples_in_the_docstrings_are_true(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed
