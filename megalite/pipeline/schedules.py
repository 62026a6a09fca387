"""Schedules: what a pipeline rank runs when, as a pure function of the rank, the placement and a count.

A schedule first orders the compute, as a score: a string in which each letter plays the next instruction of its part
(``F`` the next forward, ``I`` the next backward for the input, a small letter those of a rank's second stage). A letter
whose part has ended is a rest, so one score holds for every number of microbatches. `with_communication` then weaves
in the sends and receives, the same way for all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Protocol

from megalite.parallel.placement import Placement, Shape
from megalite.pipeline.instructions import Backward, BackwardInput, BackwardWeight, Compute, Forward, Instruction


class Schedule(Protocol):
    """The shape of every schedule: the stream of one rank, in the order in which it runs."""

    def __call__(self, rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]: ...


def gpipe(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """All forwards, then all backwards (arXiv:1811.06965): simple, and every microbatch is in flight at once.

    Raises ValueError for a rank outside ``0..num_ranks - 1``, fewer than one microbatch, or what `refusal` refuses.
    """
    _check("gpipe", rank, placement, num_microbatches)
    m = num_microbatches
    return _play("F" * m + "B" * m, _parts(rank, m, F=Forward, B=Backward), placement)


def one_f_one_b(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """One forward, one backward, in turn (PipeDream-Flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473).

    GPipe's bubble, with at most ``num_ranks - rank`` microbatches in flight however many there are.

    >>> " ".join(str(instruction) for instruction in one_f_one_b(1, Placement(num_ranks=2), num_microbatches=2))
    '1RA0 1F0 1RA1 1B0 1SG0 1F1 1B1 1SG1'

    Raises ValueError as `gpipe` does.
    """
    _check("1f1b", rank, placement, num_microbatches)
    score = "F" * (placement.num_ranks - 1 - rank) + "FB" * num_microbatches
    return _play(score, _parts(rank, num_microbatches, F=Forward, B=Backward), placement)


def interleaved_1f1b(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """1F1B over several smaller stages a rank, which divides its bubble by their number (arXiv:2104.04473).

    Microbatches go in groups of ``num_ranks`` through one stage of the rank after the other. With ``v`` stages a rank
    the bubble fraction is ``(p - 1) / (v * m + p - 1)``; rank 0 holds up to ``v * p + p - 1`` microbatch-stages, each
    ``1 / v`` of a rank's layers, a little more than 1F1B; and there are ``v`` times the messages.

    Raises ValueError as `gpipe` does: the microbatches must be whole groups.
    """
    _check("interleaved_1f1b", rank, placement, num_microbatches)
    stages, p = placement.stages_of(rank), placement.num_ranks
    parts = {
        "F": [Forward(*at) for at in _in_groups(stages, p, num_microbatches)],
        "B": [Backward(*at) for at in _in_groups(stages[::-1], p, num_microbatches)],
    }
    first = 2 * (p - 1 - rank) + (len(stages) - 1) * p
    return _play("F" * first + "FB" * len(parts["F"]), parts, placement, ahead=2)  # forwards and backwards by turns


def zb_h1(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """1F1B with its backward split, the weights' half put off into the bubble (ZB-H1, arXiv:2401.10241).

    Rank ``r`` puts the weights' half off by ``r`` microbatches, so that every rank holds as many as the first, which
    are ``p`` as in 1F1B, and has work while it waits for gradients at the end. The bubble of a rank shrinks from 1F1B's
    ``(p - 1) (T_F + T_I + T_W)`` to ``(p - 1) (T_F + T_I - T_W)`` from ``m >= p`` on.

    Raises ValueError as `gpipe` does.
    """
    _check("zb_h1", rank, placement, num_microbatches)
    score = "F" * (placement.num_ranks - 1 - rank) + "FI" * rank + "FIW" * num_microbatches
    parts = _parts(rank, num_microbatches, F=Forward, I=BackwardInput, W=BackwardWeight)
    return _play(score, parts, placement)


def zb_v(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """Two stages a rank in a v, and no bubble in the memory of 1F1B (ZB-V, arXiv:2401.10241).

    Where ``T_F = T_I = T_W`` and ``m >= 2 * p - 1``, every rank is busy from its first forward to its last
    instruction; only its start waits, for the first microbatch to come down the v. It never holds more than ``2 * p``
    microbatch-stages, each half of a rank's layers: 1F1B's ``p`` on its worst rank, here on all. Fewer microbatches run
    as well, with a bubble. Neighbours send to each other at the same time, activations up one side of the v and down
    the other, so this alone needs sends that do not block; megalite's keep their tensor and never do.

    Raises ValueError as `gpipe` does.
    """
    _check("zb_v", rank, placement, num_microbatches)
    p, m = placement.num_ranks, num_microbatches
    down, up = placement.stages_of(rank)
    parts = _parts(down, m, F=Forward, I=BackwardInput, W=BackwardWeight)
    parts |= _parts(up, m, f=Forward, i=BackwardInput, w=BackwardWeight)
    score = _down_and_up(rank, p) + "fF" * rank  # until the memory is full, just as the first gradient comes
    score += "fiw" * (p - rank) + "FIWfiw" * (m - (2 * p - 1 - rank))  # as much is let go as is taken
    score += "IWfiw" * (p - 1 - rank) + "Ii" * rank + "IW" * m + "w" * m  # gradients first, for the others
    return _play(score, parts, placement)


def forward_only(rank: int, placement: Placement, num_microbatches: int) -> tuple[Instruction, ...]:
    """The forwards alone, for any placement and count: evaluation, where nothing is kept for a backward.

    Raises ValueError for a rank outside ``0..num_ranks - 1`` or fewer than one microbatch.
    """
    stages, p, m = placement.stages_of(rank), placement.num_ranks, num_microbatches
    _at_least_one(m)
    if placement.shape == "v":
        down, up = stages
        score = _down_and_up(rank, p) + "fF" * m
        return _play(score, _parts(down, m, F=Forward) | _parts(up, m, f=Forward), placement)
    return with_communication([Forward(*at) for at in _in_groups(stages, p, m)], placement)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A schedule and what it runs on."""

    schedule: Schedule
    shape: Shape = "loop"
    fewest_stages: int = 1
    most_stages: int | None = 1
    splits: bool = False
    """Whether backwards run in halves."""
    whole_groups: bool = False
    """Whether the number of microbatches must be a multiple of the number of ranks."""


_KINDS = {
    "gpipe": _Kind(gpipe),
    "1f1b": _Kind(one_f_one_b),
    "interleaved_1f1b": _Kind(interleaved_1f1b, fewest_stages=2, most_stages=None, whole_groups=True),
    "zb_h1": _Kind(zb_h1, splits=True),
    "zb_v": _Kind(zb_v, shape="v", fewest_stages=2, most_stages=2, splits=True),
}
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({name: kind.schedule for name, kind in _KINDS.items()})
"""The schedules that train, by their name in a run file."""


def placement(name: str, num_ranks: int, virtual_stages: int) -> Placement:
    """Return where the schedule of that name puts the stages; raise ValueError as `Placement` does."""
    return Placement(num_ranks, virtual_stages, _KINDS[name].shape)


def refusal(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> str | None:
    """Return why the schedule of that name cannot run so and the nearest that can, or None where it can run.

    >>> refusal("interleaved_1f1b", num_ranks=4, virtual_stages=2, num_microbatches=6)
    'parallel.schedule=interleaved_1f1b runs groups of parallel.pipeline=4 microbatches, and 6 are not whole groups; \
use 4 or 8 microbatches'
    """
    kind = _KINDS[name]
    if not kind.fewest_stages <= virtual_stages <= (kind.most_stages or virtual_stages):
        return _wrong_stages(name, kind, virtual_stages)
    if kind.whole_groups and num_microbatches % num_ranks:
        below = num_microbatches // num_ranks * num_ranks
        nearest = " or ".join(str(count) for count in (below, below + num_ranks) if count)
        return (
            f"parallel.schedule={name} runs groups of parallel.pipeline={num_ranks} microbatches, and"
            f" {num_microbatches} are not whole groups; use {nearest} microbatches"
        )
    return None


def all_streams(schedule: Schedule, placement: Placement, num_microbatches: int) -> tuple[tuple[Instruction, ...], ...]:
    """Return the stream of every rank: what `simulate` takes."""
    return tuple(schedule(rank, placement, num_microbatches) for rank in range(placement.num_ranks))


def with_communication(computes: Sequence[Compute], placement: Placement, *, ahead: int = 1) -> tuple[Instruction, ...]:
    """Weave into a rank's compute order the receives it waits for and the sends of its results.

    Each receive is posted `ahead` computes early, before that compute's own send, so that a message crosses while the
    device is busy. Sends never block here, and links carry one direction and kind each, so a stream is free of deadlock
    wherever its compute order is. All but `zb_v` stay so even where every send blocks until its receive is posted: a
    neighbour's send then never waits for a rank that is itself stuck in one.
    """
    receives = [compute.receive(placement) for compute in computes]
    stream: list[Instruction | None] = [*receives[:ahead]]
    for index, compute in enumerate(computes):
        stream += [*receives[index + ahead : index + ahead + 1], compute, compute.send(placement)]
    return tuple(instruction for instruction in stream if instruction is not None)


def _play(
    score: str, parts: Mapping[str, Iterable[Compute]], placement: Placement, *, ahead: int = 1
) -> tuple[Instruction, ...]:
    """Return the stream of a score: a letter is the next instruction of its part, or a rest where that has ended."""
    players = {letter: iter(part) for letter, part in parts.items()}
    computes = [compute for letter in score for compute in [next(players[letter], None)] if compute is not None]
    return with_communication(_fused(computes, placement), placement, ahead=ahead)


def _fused(computes: Sequence[Compute], placement: Placement) -> list[Compute]:
    """Join the two halves of a backward where they stand side by side and no other rank waits for the first."""
    fused: list[Compute] = []
    for compute in computes:
        half = BackwardInput(compute.stage, compute.microbatch)
        if isinstance(compute, BackwardWeight) and fused[-1] == half and half.send(placement) is None:
            fused[-1] = Backward(compute.stage, compute.microbatch)
        else:
            fused.append(compute)
    return fused


def _parts(stage: int, num_microbatches: int, **kinds: type[Compute]) -> dict[str, list[Compute]]:
    """Return, by letter, the instructions of each kind on a stage, microbatch after microbatch."""
    return {
        letter: [kind(stage, microbatch) for microbatch in range(num_microbatches)] for letter, kind in kinds.items()
    }


def _down_and_up(rank: int, num_ranks: int) -> str:
    """Return the forwards that fill a rank's time until the first microbatch is back from the turn of the v."""
    return "F" * (2 * (num_ranks - rank) - 1)


def _in_groups(stages: Sequence[int], size: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Return every (stage, microbatch): group after group of `size` microbatches, through one stage after the other.

    The order is the same on all ranks, each with the stages it holds, so the messages of a link match by count.
    """
    groups = (range(first, min(first + size, num_microbatches)) for first in range(0, num_microbatches, size))
    return list(chain.from_iterable([(stage, m) for stage in stages for m in group] for group in groups))


def _check(name: str, rank: int, placed: Placement, num_microbatches: int) -> None:
    _at_least_one(num_microbatches)
    reason = refusal(name, placed.num_ranks, placed.virtual_stages, num_microbatches)
    if reason is None and placed.shape != _KINDS[name].shape:
        reason = f"{name} lays its stages as a {_KINDS[name].shape}, not as a {placed.shape}"
    if reason is not None:
        raise ValueError(reason)
    placed.stages_of(rank)


def _at_least_one(num_microbatches: int) -> None:
    if num_microbatches < 1:
        raise ValueError(f"a schedule needs at least one microbatch, not {num_microbatches}")


def _wrong_stages(name: str, kind: _Kind, virtual_stages: int) -> str:
    runs = ("one stage a rank", "two stages a rank")[kind.fewest_stages - 1]
    more = "" if kind.most_stages else " or more"
    return (
        f"parallel.virtual_stages={virtual_stages} does not go with parallel.schedule={name}, which runs {runs}{more};"
        f" use parallel.virtual_stages={kind.fewest_stages}, or parallel.schedule={_alternative(kind, virtual_stages)}"
    )


def _alternative(kind: _Kind, virtual_stages: int) -> str:
    """Return the schedule most like `kind` that runs so many stages a rank."""
    if virtual_stages == 1:
        return "zb_h1" if kind.splits else "1f1b"
    return "zb_v" if kind.splits and virtual_stages == 2 else "interleaved_1f1b"
