"""Schedules on what they run on, awkward sizes among them, for the tests of schedules and of the simulator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalite.parallel.placement import Placement
from megalite.pipeline.instructions import Compute, Instruction
from megalite.pipeline.schedules import SCHEDULES, all_streams, forward_only, placement, refusal

TRAINING = tuple(SCHEDULES)
ALL = (*TRAINING, "forward_only")
AWKWARD = ((1, 1), (1, 5), (4, 1), (4, 3), (8, 2), (4, 4), (2, 6), (4, 16))
"""Numbers of ranks and of microbatches."""


@dataclass(frozen=True)
class Case:
    """A schedule by name, `forward_only` among them, its placement and a number of microbatches."""

    name: str
    placement: Placement
    num_microbatches: int

    @property
    def schedule(self) -> Callable[..., tuple[Instruction, ...]]:
        return SCHEDULES.get(self.name, forward_only)

    @property
    def streams(self) -> tuple[tuple[Instruction, ...], ...]:
        return all_streams(self.schedule, self.placement, self.num_microbatches)

    @property
    def computes(self) -> list[list[Compute]]:
        return [[i for i in stream if isinstance(i, Compute)] for stream in self.streams]


def grid(names: Sequence[str], ranks: range, virtual_stages: range, microbatches: range) -> Iterator[Case]:
    """Every case of these sizes that runs."""
    for name, p, v, m in product(names, ranks, virtual_stages, microbatches):
        if name == "forward_only":
            yield Case(name, Placement(p, v), m)
            if v == 2:
                yield Case(name, Placement(p, v, "v"), m)
        elif refusal(name, p, v, m) is None:
            yield Case(name, placement(name, p, v), m)


def for_many_sizes(
    *names: str, max_ranks: int = 8, max_microbatches: int = 20, max_examples: int = 25
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test, of one argument `case`, over many sizes of each schedule, the awkward ones always among them."""
    awkward = [case for name in names for p, m in AWKWARD for case in grid([name], span(p), range(1, 4), span(m))]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        many = [
            list(grid([name], range(1, max_ranks + 1), range(1, 5), range(1, max_microbatches + 1))) for name in names
        ]
        among = st.one_of([st.sampled_from(of_name) for of_name in many])
        test = settings(deadline=None, max_examples=max_examples * len(names))(given(case=among)(test))
        for case in awkward:
            test = example(case=case)(test)
        return test

    return decorate


def span(number: int) -> range:
    return range(number, number + 1)
