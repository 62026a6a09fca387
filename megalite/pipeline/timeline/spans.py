"""The timeline of a pipeline step: which rank ran which instruction when, simulated or measured."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megalite.pipeline.instructions import (
    Backward,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    ReduceGradients,
)

Unit = Literal["forward", "seconds"]
"""The unit of times: the duration of one forward, or seconds."""


@dataclass(frozen=True, slots=True)
class Span:
    """An instruction that one pipeline rank ran from `start` to `end`."""

    rank: int
    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of one step over all pipeline ranks.

    The spans may include sends, receives and reductions; their time counts as idle.
    """

    spans: tuple[Span, ...]
    unit: Unit = "seconds"

    @cached_property
    def compute(self) -> tuple[Span, ...]:
        """The spans of forwards and backwards, without messages."""
        return tuple(span for span in self.spans if isinstance(span.instruction, Compute))

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks, up to the highest rank that has a span."""
        return 1 + max((span.rank for span in self.spans), default=-1)

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The stages that each rank computes, ascending."""
        stages: list[set[int]] = [set() for _ in range(self.num_ranks)]
        for span in self.compute:
            stages[span.rank].add(span.instruction.stage)
        return tuple(tuple(sorted(of_rank)) for of_rank in stages)

    @property
    def start(self) -> float:
        """When the first forward or backward starts."""
        return min((span.start for span in self.compute), default=0.0)

    @property
    def makespan(self) -> float:
        """Time from the start of the first forward or backward to the end of the last."""
        return max((span.end for span in self.compute), default=0.0) - self.start

    @cached_property
    def reductions(self) -> tuple[Span, ...]:
        """The spans in which gradients are reduced over the data ranks."""
        return tuple(span for span in self.spans if isinstance(span.instruction, ReduceGradients))

    @property
    def exposed_reduction(self) -> float:
        """The time for which a step is longer because of the reduction of its gradients: after the last compute."""
        end = max((span.end for span in self.reductions), default=0.0)
        return max(0.0, end - self.start - self.makespan)

    @property
    def bubble_fraction(self) -> float:
        """The bubble: the share of the ranks' time, over the makespan, in which they do not compute."""
        available = self.num_ranks * self.makespan
        busy = sum(span.end - span.start for span in self.compute)
        return (available - busy) / available if available else 0.0

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each rank, the largest number of microbatch-stages whose activations it holds at once.

        Activations are held from the start of the forward to the end of the backward, of the weight half if it is
        split.
        """
        kept = {_microbatch(span) for span in self.compute if isinstance(span.instruction, Backward | BackwardWeight)}
        changes: list[list[tuple[float, int]]] = [[] for _ in range(self.num_ranks)]
        for span in self.compute:
            if isinstance(span.instruction, Backward | BackwardWeight):
                changes[span.rank].append((span.end, -1))
            elif isinstance(span.instruction, Forward) and _microbatch(span) in kept:
                changes[span.rank].append((span.start, 1))
        return tuple(_highest(change for _, change in sorted(of_rank)) for of_rank in changes)

    @property
    def peak_microbatches(self) -> tuple[float, ...]:
        """`peak_in_flight` in microbatches over all of a rank's layers, if its stages are equally large."""
        peaks = zip(self.peak_in_flight, self.stages, strict=True)
        return tuple(peak / max(len(stages), 1) for peak, stages in peaks)

    def to_json(self) -> str:
        """Return the timeline as one line of JSON: ``{"unit": ..., "spans": [[rank, "2F0", start, end], ...]}``."""
        spans = [[span.rank, str(span.instruction), span.start, span.end] for span in self.spans]
        return json.dumps({"unit": self.unit, "spans": spans})


def _microbatch(span: Span) -> tuple[int, int]:
    return span.instruction.stage, span.instruction.microbatch


def _highest(changes: Iterable[int]) -> int:
    level = highest = 0
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest
