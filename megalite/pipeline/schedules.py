"""Pipeline schedules: the stream of instructions of a rank, as a pure function of rank, placement and microbatches.

A schedule first orders the compute with a pattern string such as ``FFIFI``. Each letter is replaced by the next
instruction of its kind: ``F`` by the next forward, ``I`` by the next backward for the input; a lowercase letter stands
for the rank's second stage. Letters beyond the last microbatch are dropped, so one pattern serves any number of
microbatches. `with_communication` then inserts the sends and receives, and `_with_reductions` a `ReduceGradients` after
the last backward of each stage, in the same way for all schedules.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Protocol

from megalite.parallel.placement import Placement, Shape
from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    ReduceGradients,
    SendGradient,
)


class Schedule(Protocol):
    """The signature of a schedule: it returns the stream of one rank, in the order of execution."""

    def __call__(self, rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]: ...


def gpipe(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """GPipe: all forwards, then all backwards (arXiv:1811.06965); every microbatch is in flight at once.

    Raises ValueError for a rank outside ``0..num_ranks - 1``, fewer than one microbatch, or a case of `refusal`.
    """
    _check("gpipe", rank, placement, num_microbatches)
    m = num_microbatches
    return _expand("F" * m + "B" * m, _sequences(rank, m, F=Forward, B=Backward), placement)


def one_f_one_b(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """1F1B: alternate one forward and one backward (PipeDream-Flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473).

    The bubble is that of GPipe, with at most ``num_ranks - rank`` microbatches in flight.

    >>> " ".join(str(instruction) for instruction in one_f_one_b(1, Placement(num_ranks=2), num_microbatches=2))
    '1RA0 1F0 1RA1 1B0 1SG0 1F1 1B1 1SG1 1R1'

    Raises ValueError as `gpipe` does.
    """
    _check("1f1b", rank, placement, num_microbatches)
    pattern = "F" * (placement.num_ranks - 1 - rank) + "FB" * num_microbatches
    return _expand(pattern, _sequences(rank, num_microbatches, F=Forward, B=Backward), placement)


def interleaved_1f1b(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """Interleaved 1F1B: ``v`` smaller stages per rank, which divides the bubble by ``v`` (arXiv:2104.04473).

    Microbatches pass the stages of a rank in groups of ``num_ranks``, one stage after the other. The bubble fraction is
    ``(p - 1) / (v * m + p - 1)``. Rank 0 holds up to ``v * p + p - 1`` microbatch-stages, each ``1 / v`` of a rank's
    layers, a little more than 1F1B. There are ``v`` times as many messages.

    Raises ValueError as `gpipe` does, also where the microbatches do not fill whole groups.
    """
    _check("interleaved_1f1b", rank, placement, num_microbatches)
    stages, p = placement.stages_of(rank), placement.num_ranks
    sequences = {
        "F": [Forward(*at) for at in _in_groups(stages, p, num_microbatches)],
        "B": [Backward(*at) for at in _in_groups(stages[::-1], p, num_microbatches)],
    }
    first = 2 * (p - 1 - rank) + (len(stages) - 1) * p
    # Receives are posted two computes ahead: that of the next forward and that of the next backward.
    return _expand("F" * first + "FB" * len(sequences["F"]), sequences, placement, ahead=2)


def zb_h1(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """ZB-H1: 1F1B with split backwards, whose weight gradients are deferred into the bubble (arXiv:2401.10241).

    Rank ``r`` defers the weight gradients by ``r`` microbatches. So every rank holds as many microbatches as the first
    rank, which are ``p`` as in 1F1B, and has work while it waits for gradients at the end. For ``m >= p`` the bubble of
    a rank shrinks from 1F1B's ``(p - 1) (T_F + T_I + T_W)`` to ``(p - 1) (T_F + T_I - T_W)``.

    Raises ValueError as `gpipe` does.
    """
    _check("zb_h1", rank, placement, num_microbatches)
    pattern = "F" * (placement.num_ranks - 1 - rank) + "FI" * rank + "FIW" * num_microbatches
    sequences = _sequences(rank, num_microbatches, F=Forward, I=BackwardInput, W=BackwardWeight)
    return _expand(pattern, sequences, placement)


def zb_v(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """ZB-V: two stages per rank in a v placement, no bubble, and the memory of 1F1B (arXiv:2401.10241).

    Where ``T_F = T_I = T_W`` and ``m >= 2 * p - 1``, every rank computes without a pause from its first forward to its
    last instruction; it idles only before its first forward, until the first microbatch arrives. A rank never holds
    more than ``2 * p`` microbatch-stages, each half of a rank's layers: as much as the first rank in 1F1B. Fewer
    microbatches run as well, with a bubble. Neighbouring ranks send to each other at the same time, activations of both
    virtual stages, so this schedule alone needs sends that do not block; megalite's sends never block.

    Raises ValueError as `gpipe` does.
    """
    _check("zb_v", rank, placement, num_microbatches)
    p, m = placement.num_ranks, num_microbatches
    down, up = placement.stages_of(rank)
    sequences = _sequences(down, m, F=Forward, I=BackwardInput, W=BackwardWeight)
    sequences |= _sequences(up, m, f=Forward, i=BackwardInput, w=BackwardWeight)
    pattern = _v_warmup(rank, p) + "fF" * rank  # until memory is full and the first gradient arrives
    pattern += "fiw" * (p - rank) + "FIWfiw" * (m - (2 * p - 1 - rank))  # each forward replaces a freed microbatch
    pattern += "IWfiw" * (p - 1 - rank) + "Ii" * rank + "IW" * m + "w" * m  # first what other ranks wait for
    return _expand(pattern, sequences, placement)


def forward_only(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """The forwards alone, for evaluation, with any placement and number of microbatches.

    Raises ValueError for a rank outside ``0..num_ranks - 1`` or fewer than one microbatch.
    """
    stages, p, m = placement.stages_of(rank), placement.num_ranks, num_microbatches
    _require_a_microbatch(m)
    if placement.shape == "v":
        down, up = stages
        pattern = _v_warmup(rank, p) + "fF" * m
        return _expand(pattern, _sequences(down, m, F=Forward) | _sequences(up, m, f=Forward), placement)
    return with_communication([Forward(*at) for at in _in_groups(stages, p, m)], placement)


@dataclass(frozen=True, slots=True)
class _ScheduleSpec:
    """A schedule, and the placements and numbers of microbatches that it supports."""

    schedule: Schedule
    shape: Shape = "loop"
    fewest_stages: int = 1
    most_stages: int | None = 1
    splits: bool = False
    """Whether backwards are split into input and weight gradients."""
    whole_groups: bool = False
    """Whether the number of microbatches must be a multiple of the number of ranks."""


_SPECS = {
    "gpipe": _ScheduleSpec(gpipe),
    "1f1b": _ScheduleSpec(one_f_one_b),
    "interleaved_1f1b": _ScheduleSpec(interleaved_1f1b, fewest_stages=2, most_stages=None, whole_groups=True),
    "zb_h1": _ScheduleSpec(zb_h1, splits=True),
    "zb_v": _ScheduleSpec(zb_v, shape="v", fewest_stages=2, most_stages=2, splits=True),
}
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({name: spec.schedule for name, spec in _SPECS.items()})
"""The training schedules, by their name in a run file."""


def splits_backward(name: str) -> bool:
    """Return whether the schedule of that name splits backwards into input and weight gradients."""
    return _SPECS[name].splits


def placement(name: str, num_ranks: int, virtual_stages: int) -> Placement:
    """Return the placement of stages of the schedule of that name; raise ValueError as `Placement` does."""
    return Placement(num_ranks, virtual_stages, _SPECS[name].shape)


def refusal(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> str | None:
    """Return why the schedule of that name does not support these sizes, with the nearest alternative; else None.

    >>> refusal("interleaved_1f1b", num_ranks=4, virtual_stages=2, num_microbatches=6)
    'parallel.schedule=interleaved_1f1b runs groups of parallel.pipeline=4 microbatches, and 6 are not whole groups; \
use 4 or 8 microbatches'
    """
    spec = _SPECS[name]
    if not spec.fewest_stages <= virtual_stages <= (spec.most_stages or virtual_stages):
        return _wrong_stages(name, spec, virtual_stages)
    if spec.whole_groups and num_microbatches % num_ranks:
        below = num_microbatches // num_ranks * num_ranks
        nearest = " or ".join(str(count) for count in (below, below + num_ranks) if count)
        return (
            f"parallel.schedule={name} runs groups of parallel.pipeline={num_ranks} microbatches, and"
            f" {num_microbatches} are not whole groups; use {nearest} microbatches"
        )
    return None


def all_streams(schedule: Schedule, placement: Placement, num_microbatches: int) -> tuple[tuple[Instruction, ...], ...]:
    """Return the streams of all ranks, as `simulate` takes them."""
    return tuple(schedule(rank, placement, num_microbatches) for rank in range(placement.num_ranks))


def with_communication(computes: Sequence[Compute], placement: Placement, *, ahead: int = 1) -> tuple[Instruction, ...]:
    """Insert into a rank's compute order the receives that it waits for and the sends of its results.

    Each receive is posted `ahead` computes early, before the send of that compute, so that messages are transferred
    while the device computes. Sends never block here, and each link carries one direction and kind of message, so the
    streams have no deadlock if their compute orders have none. With sends that block until the receive is posted, all
    schedules but `zb_v` still have no deadlock: a rank then never waits for a rank that is blocked in a send.
    """
    receives = [compute.receive(placement) for compute in computes]
    stream: list[Instruction | None] = [*receives[:ahead]]
    for index, compute in enumerate(computes):
        stream += [*receives[index + ahead : index + ahead + 1], compute, compute.send(placement)]
    return tuple(instruction for instruction in stream if instruction is not None)


def _expand(
    pattern: str, sequences: Mapping[str, Iterable[Compute]], placement: Placement, *, ahead: int = 1
) -> tuple[Instruction, ...]:
    """Return the stream of a pattern: a letter is the next instruction of its sequence, dropped after its end."""
    remaining = {letter: iter(sequence) for letter, sequence in sequences.items()}
    computes = [compute for letter in pattern for compute in [next(remaining[letter], None)] if compute is not None]
    return tuple(_with_reductions(with_communication(_fused(computes, placement), placement, ahead=ahead), placement))


def _with_reductions(stream: Sequence[Instruction], placement: Placement) -> Iterator[Instruction]:
    """Insert a `ReduceGradients` after the last backward of each stage, and after the send of its result."""
    last = {i.stage: i for i in stream if isinstance(i, Backward | BackwardWeight)}
    for instruction in stream:
        yield instruction
        end = last.get(instruction.stage)
        if end is None or end.microbatch != instruction.microbatch:
            continue
        is_send = isinstance(end, Backward) and isinstance(instruction, SendGradient)
        if is_send or (instruction == end and end.send(placement) is None):
            yield ReduceGradients(end.stage, end.microbatch)


def _fused(computes: Sequence[Compute], placement: Placement) -> list[Compute]:
    """Fuse a `BackwardInput` and the `BackwardWeight` directly after it where no other rank waits for the first."""
    fused: list[Compute] = []
    for compute in computes:
        half = BackwardInput(compute.stage, compute.microbatch)
        if isinstance(compute, BackwardWeight) and fused[-1] == half and half.send(placement) is None:
            fused[-1] = Backward(compute.stage, compute.microbatch)
        else:
            fused.append(compute)
    return fused


def _sequences(stage: int, num_microbatches: int, **kinds: type[Compute]) -> dict[str, list[Compute]]:
    """Return, by letter, the instructions of each kind on a stage, in the order of microbatches."""
    return {
        letter: [kind(stage, microbatch) for microbatch in range(num_microbatches)] for letter, kind in kinds.items()
    }


def _v_warmup(rank: int, num_ranks: int) -> str:
    """Return the warm-up of a v placement: forwards until the first microbatch returns to the rank's second stage."""
    return "F" * (2 * (num_ranks - rank) - 1)


def _in_groups(stages: Sequence[int], size: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Return every (stage, microbatch): groups of `size` microbatches, each group through all stages in turn.

    The order is the same on all ranks, for the stages that each holds, so that the messages of a link match by count.
    """
    groups = (range(first, min(first + size, num_microbatches)) for first in range(0, num_microbatches, size))
    return list(chain.from_iterable([(stage, m) for stage in stages for m in group] for group in groups))


def _check(name: str, rank: int, placed: Placement, num_microbatches: int) -> None:
    _require_a_microbatch(num_microbatches)
    reason = refusal(name, placed.num_ranks, placed.virtual_stages, num_microbatches)
    if reason is None and placed.shape != _SPECS[name].shape:
        reason = f"{name} needs a {_SPECS[name].shape} placement, not a {placed.shape} placement"
    if reason is not None:
        raise ValueError(reason)
    placed.stages_of(rank)


def _require_a_microbatch(num_microbatches: int) -> None:
    if num_microbatches < 1:
        raise ValueError(f"a schedule needs at least one microbatch, not {num_microbatches}")


def _wrong_stages(name: str, spec: _ScheduleSpec, virtual_stages: int) -> str:
    supported = "one stage" if spec.fewest_stages == 1 else "two stages" if spec.most_stages else "two or more stages"
    return (
        f"parallel.virtual_stages={virtual_stages} does not go with parallel.schedule={name}, which runs {supported} "
        f"per rank; use parallel.virtual_stages={spec.fewest_stages}, or "
        f"parallel.schedule={_alternative(spec, virtual_stages)}"
    )


def _alternative(spec: _ScheduleSpec, virtual_stages: int) -> str:
    """Return the schedule most like `spec` that runs `virtual_stages` stages per rank."""
    if virtual_stages == 1:
        return "zb_h1" if spec.splits else "1f1b"
    return "zb_v" if spec.splits and virtual_stages == 2 else "interleaved_1f1b"
