"""Schedules: which forward and backward a stage runs when, as a pure function of three numbers.

A schedule first orders the compute; `with_communication` then weaves in the sends and receives, the same way for all.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from megalite.pipeline.instructions import Backward, Compute, Forward, Instruction


class Schedule(Protocol):
    """The shape of every schedule: the stream of one stage, in the order in which it runs."""

    def __call__(self, stage: int, num_stages: int, num_microbatches: int) -> tuple[Instruction, ...]: ...


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> tuple[Instruction, ...]:
    """All forwards, then all backwards (arXiv:1811.06965): simple, and every microbatch is in flight at once.

    Raises ValueError for a stage outside ``0..num_stages - 1`` or fewer than one microbatch.
    """
    _check(stage, num_stages, num_microbatches)
    return with_communication([*_forwards(stage, num_microbatches), *_backwards(stage, num_microbatches)], num_stages)


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> tuple[Instruction, ...]:
    """One forward, one backward, in turn (PipeDream-Flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473).

    GPipe's bubble, with at most ``num_stages - stage`` microbatches in flight however many there are.

    >>> " ".join(str(instruction) for instruction in one_f_one_b(stage=1, num_stages=2, num_microbatches=2))
    '1RA0 1F0 1RA1 1B0 1SG0 1F1 1B1 1SG1'

    Raises ValueError for a stage outside ``0..num_stages - 1`` or fewer than one microbatch.
    """
    _check(stage, num_stages, num_microbatches)
    forwards, backwards = _forwards(stage, num_microbatches), _backwards(stage, num_microbatches)
    warmup = min(num_stages - stage - 1, num_microbatches)
    steady = [compute for pair in zip(forwards[warmup:], backwards, strict=False) for compute in pair]
    return with_communication([*forwards[:warmup], *steady, *backwards[num_microbatches - warmup :]], num_stages)


def forward_only(stage: int, num_stages: int, num_microbatches: int) -> tuple[Instruction, ...]:
    """The forwards alone: evaluation, where nothing is kept for a backward.

    Raises ValueError for a stage outside ``0..num_stages - 1`` or fewer than one microbatch.
    """
    _check(stage, num_stages, num_microbatches)
    return with_communication(_forwards(stage, num_microbatches), num_stages)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType({"gpipe": gpipe, "1f1b": one_f_one_b})
"""The schedules that train, by their name in a run file."""


def all_streams(schedule: Schedule, num_stages: int, num_microbatches: int) -> tuple[tuple[Instruction, ...], ...]:
    """Return the stream of every stage, one stage a rank: what `simulate` takes."""
    return tuple(schedule(stage, num_stages, num_microbatches) for stage in range(num_stages))


def with_communication(computes: Sequence[Compute], num_stages: int) -> tuple[Instruction, ...]:
    """Weave into a stage's compute order the receives it waits for and the sends of its results.

    Each receive is posted one compute early, before that compute's own send. So a message crosses while the device is
    busy; and a neighbour's send never waits for a rank that is itself stuck in a send, which keeps the streams free
    of deadlock even where every send blocks until its receive is posted.
    """
    stream: list[Instruction | None] = [computes[0].receive(num_stages)] if computes else []
    for compute, following in zip(computes, [*computes[1:], None], strict=True):
        stream += [following and following.receive(num_stages), compute, compute.send(num_stages)]
    return tuple(instruction for instruction in stream if instruction is not None)


def _forwards(stage: int, num_microbatches: int) -> list[Forward]:
    return [Forward(stage, microbatch) for microbatch in range(num_microbatches)]


def _backwards(stage: int, num_microbatches: int) -> list[Backward]:
    return [Backward(stage, microbatch) for microbatch in range(num_microbatches)]


def _check(stage: int, num_stages: int, num_microbatches: int) -> None:
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} is not in 0..{num_stages - 1}")
    if num_microbatches < 1:
        raise ValueError(f"a schedule needs at least one microbatch, not {num_microbatches}")
