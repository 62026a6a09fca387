"""Counting bytes: of tensors that are there, and of what a piece of work takes from torch's CPU allocator."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The memory behind tensors, each piece once: bytes by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes behind tensors, memory that they share counted once."""
    return sum(storages(tensors).values())


@dataclass(slots=True)
class Allocations:
    """What was allocated and freed, in order, as (address, bytes); bytes are negative where memory is freed."""

    events: list[tuple[int, int]] = field(default_factory=list)

    def peak(self, without: Collection[int] = ()) -> int:
        """The most bytes alive at once, above what was there before; `without` are addresses of blocks still alive."""
        kept = {address: index for index, (address, size) in enumerate(self.events) if address in without and size > 0}
        level = highest = 0
        for index, (address, size) in enumerate(self.events):
            if kept.get(address) != index:
                level += size
                highest = max(highest, level)
        return highest


@contextmanager
def watched_allocations() -> Iterator[Allocations]:
    """Watch torch's CPU allocator: every tensor, whoever holds it; not the working memory of its libraries."""
    allocations = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield allocations
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = walk(profiled.profiler.kineto_results.experimental_event_tree())
    found = [event for event in events if event.tag.name == "Allocation"]
    found.sort(key=lambda event: event.start_time_ns)
    allocations.events.extend((event.extra_fields.ptr, event.extra_fields.alloc_size) for event in found)


def walk(events: Iterable[Any]) -> Iterator[Any]:
    """Every event of a tree of the profiler's."""
    for event in events:
        yield event
        yield from walk(event.children)
