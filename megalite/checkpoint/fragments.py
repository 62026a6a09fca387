"""Between what a rank updates, flat and cut as ZeRO cuts it, and the boxes of global tensors that a checkpoint has."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megalite.checkpoint.store import Part
from megalite.parallel.regions import Region
from megalite.parallel.sharding import FlatRegion, LocalShard, global_regions

if TYPE_CHECKING:
    from torch import Tensor

SPLIT_ELEMENTS = 1 << 16
"""What several ranks hold alike and is smaller than this, one of them writes whole."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """What this rank updates of one local parameter: elements `start` and on of it, laid flat.

    `tensors` are flat fp32 views that may be written to: ``weight``, the master copy, and the optimizer's state by its
    names, ``exp_avg`` and ``exp_avg_sq``; or ``gradient`` alone. `copies` ranks hold the same fragment, of which this
    is number `copy`. Of a parameter that two stages hold, each is to save the elements in its `window`; None: all.
    """

    shards: tuple[LocalShard, ...]
    local_shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, "Tensor"]
    copy: int = 0
    copies: int = 1
    window: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Elements in the fragment, padding included."""
        return next(iter(self.tensors.values())).numel()

    def regions(self, start: int, stop: int) -> Iterator[FlatRegion]:
        """Return where elements `start` to `stop` of the fragment stand; `FlatRegion.start` counts from its start."""
        for found in global_regions(self.shards, self.local_shape, self.start + start, self.start + stop):
            yield FlatRegion(found.name, found.global_shape, found.region, start + found.start)

    def share(self, number: int) -> tuple[int, int]:
        """Return the elements of the fragment that this rank saves, `number` telling small fragments apart."""
        first, last = self.window or (0, self.start + self.numel)
        first, last = max(0, first - self.start), min(self.numel, last - self.start)
        length = last - first
        if length <= 0:
            return 0, 0
        if length < SPLIT_ELEMENTS:
            return (first, last) if number % self.copies == self.copy else (0, 0)
        return first + length * self.copy // self.copies, first + length * (self.copy + 1) // self.copies


class Source(Protocol):
    """Where boxes of tensors are read from, by the names of a checkpoint: ``weight/layers.0...``."""

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out` with a box of a tensor."""
        ...


def parts(fragments: Iterable[Fragment]) -> Iterator[Part]:
    """Return what this rank writes of its fragments: over all ranks every element once, in even shares."""
    for number, fragment in enumerate(fragments):
        regions = list(fragment.regions(*fragment.share(number)))
        for kind, flat in fragment.tensors.items():
            for at in regions:
                elements = flat[at.start : at.start + at.region.numel]
                yield Part(f"{kind}/{at.name}", at.global_shape, at.region, _Elements(elements, at.region.shape))


@dataclass(frozen=True, slots=True)
class _Elements:
    """Calls for the elements of a flat tensor when they are needed: on an accelerator that is a copy."""

    flat: "Tensor"
    shape: tuple[int, ...]

    def __call__(self) -> np.ndarray:
        return self.flat.detach().cpu().numpy().reshape(self.shape)


def fill(fragments: Iterable[Fragment], source: Source, kinds: Iterable[str]) -> None:
    """Write what `source` has into the tensors of the given kinds; padding stays as it is."""
    import torch

    for fragment in fragments:
        for at in fragment.regions(0, fragment.numel):
            for kind in kinds:
                elements = fragment.tensors[kind][at.start : at.start + at.region.numel].detach()
                on_host = elements if elements.device.type == "cpu" else torch.empty_like(elements, device="cpu")
                source.read(f"{kind}/{at.name}", at.region, on_host.numpy().reshape(at.region.shape))
                if on_host is not elements:
                    elements.copy_(on_host)
