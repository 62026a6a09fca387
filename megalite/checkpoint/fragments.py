"""Fragments: map the flat ZeRO partitions that a rank updates to regions of global tensors, and back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megalite.checkpoint.store import Part
from megalite.parallel.regions import Region
from megalite.parallel.sharding import FlatRegion, LocalShard, global_regions

if TYPE_CHECKING:
    from torch import Tensor

    from megalite.model.stage import Stage
    from megalite.parallel.mesh import Mesh
    from megalite.tensor_parallel.layers import PlacedParameter

SPLIT_ELEMENTS = 1 << 16
"""Replicated fragments smaller than this are written whole by one of the ranks; larger fragments are split."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A flat range of one local parameter that this rank updates, beginning at element `start`.

    `tensors` are writable flat views: ``weight``, and the optimizer's state by the names that it declares, both fp32;
    of a frozen parameter ``weight`` alone, in the model's precision; or ``gradient`` alone. `copies` ranks hold the
    same fragment; this rank's is number `copy`. If two stages hold the parameter, each saves only the elements in its
    `window`; None means all.
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
        """Yield the global regions of elements `start` to `stop`; `FlatRegion.start` is an offset in the fragment."""
        for found in global_regions(self.shards, self.local_shape, self.start + start, self.start + stop):
            yield FlatRegion(found.name, found.global_shape, found.region, start + found.start)

    def share(self, number: int) -> tuple[int, int]:
        """Return the range of elements that this rank saves; `number` distributes small fragments over the copies.

        Ranks that hold the same fragment must give it the same number.
        """
        first, last = self.window or (0, self.start + self.numel)
        first, last = max(0, first - self.start), min(self.numel, last - self.start)
        length = last - first
        if length <= 0:
            return 0, 0
        if length < SPLIT_ELEMENTS:
            return (first, last) if number % self.copies == self.copy else (0, 0)
        return first + length * self.copy // self.copies, first + length * (self.copy + 1) // self.copies


def saved_window(stage: "Stage", placed: "PlacedParameter", mesh: "Mesh") -> tuple[int, int] | None:
    """Return the `Fragment.window` of a stage's parameter: of a tied table that two stages hold, each saves half.

    Where one rank holds both stages, the first one saves all of it. None for other parameters.
    """
    if placed.name != stage.tied_copy_name:
        return None
    size, is_first = prod(placed.shape), stage.index == 0
    if mesh.has_first_stage and mesh.has_last_stage:
        return (0, size) if is_first else (0, 0)
    return (0, size // 2) if is_first else (size // 2, size)


class TensorSource(Protocol):
    """Reads regions of tensors, by their names in a checkpoint: ``weight/layers.0...``."""

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out` with a region of a tensor."""
        ...


def parts(fragments: Iterable[Fragment]) -> Iterator[Part]:
    """Yield the parts that this rank writes: over all ranks every element once, in even shares."""
    for number, fragment in enumerate(fragments):
        regions = list(fragment.regions(*fragment.share(number)))
        for kind, flat in fragment.tensors.items():
            for at in regions:
                elements = flat[at.start : at.start + at.region.numel]
                yield Part(f"{kind}/{at.name}", at.global_shape, at.region, _Elements(elements, at.region.shape))


@dataclass(frozen=True, slots=True)
class _Elements:
    """Loads the elements of a flat tensor when called: on an accelerator this copies them to the host."""

    flat: "Tensor"
    shape: tuple[int, ...]

    def __call__(self) -> np.ndarray:
        return self.flat.detach().float().cpu().numpy().reshape(self.shape)


def fill(fragments: Iterable[Fragment], source: TensorSource) -> None:
    """Read all fp32 tensors of the fragments from `source`; padding is not changed."""
    import torch

    for fragment in fragments:
        for at in fragment.regions(0, fragment.numel):
            for kind, flat in fragment.tensors.items():
                elements = flat[at.start : at.start + at.region.numel].detach()
                on_host = elements if elements.device.type == "cpu" else torch.empty_like(elements, device="cpu")
                source.read(f"{kind}/{at.name}", at.region, on_host.numpy().reshape(at.region.shape))
                if on_host is not elements:
                    elements.copy_(on_host)
