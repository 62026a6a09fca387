"""Sharding: the region of a global tensor that each rank holds. Pure arithmetic, no torch.

A parameter of a module is made of one or more *shards*, stacked along dim 0. Most parameters have one shard. A fused
projection has a shard for each tensor that checkpoints store under a name (``query``, ``key``, ``value``), so that one
matrix product computes all three.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from megalite.parallel.regions import Region, flat_range_regions

Position = Mapping[str, tuple[int, int]]
"""A rank's index along each axis, and the axis' size: ``{"tensor": (1, 4)}``. An axis that is left out has one rank."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A global tensor, and for each axis that divides it the dim along which it does.

    Along an axis that is not in `sharding` every rank holds all. Where several axes divide one dim, the first of them
    cuts it coarsest. `padded_rows` is the size of dim 0 with the padding that makes it divide evenly, as for a
    vocabulary. Padding is no part of the global tensor. It lies on the last ranks, which hold fewer real rows than
    their share. Other dims have none: what a rank holds of a tensor would be scattered over its flat elements.

    >>> ShardSpec("head.weight", (10, 4), {"tensor": 0}, padded_rows=12).region({"tensor": (1, 2)})
    Region(offset=(6, 0), shape=(4, 4))
    >>> ShardSpec("experts.up", (8, 6), {"expert": 0, "tensor": 1}).region({"expert": (1, 2), "tensor": (2, 3)})
    Region(offset=(4, 4), shape=(4, 2))
    """

    name: str
    global_shape: tuple[int, ...]
    sharding: Mapping[str, int] = field(default_factory=dict)
    padded_rows: int | None = None

    def local_shape(self, position: Position) -> tuple[int, ...]:
        """Return the shape that every rank allocates, with padding; raise ValueError where a dim does not divide."""
        shape = [self.padded_rows or size if dim == 0 else size for dim, size in enumerate(self.global_shape)]
        for dim in {*self.sharding.values()}:
            _, size = self._cut(dim, position)
            if shape[dim] % size:
                raise ValueError(f"{self.name}: {size} ranks do not divide dim {dim} of {self.global_shape}")
            shape[dim] //= size
        return tuple(shape)

    def region(self, position: Position) -> Region:
        """Return the region of the global tensor that the rank at `position` holds, without padding."""
        offset, shape = [], []
        for dim, (share, length) in enumerate(zip(self.local_shape(position), self.global_shape, strict=True)):
            index, _ = self._cut(dim, position)
            offset.append(min(index * share, length))
            shape.append(min(share, length - offset[dim]))
        return Region(tuple(offset), tuple(shape))

    def _cut(self, dim: int, position: Position) -> tuple[int, int]:
        """Return which of how many shares of a dim the rank at `position` holds."""
        index, size = 0, 1
        for axis, divided in self.sharding.items():
            if divided == dim:
                at, ranks = position.get(axis, (0, 1))
                index, size = index * ranks + at, size * ranks
        return index, size


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One rank's shard: `source` in the global tensor, `target` in the local parameter; both have the same shape."""

    spec: ShardSpec
    source: Region
    target: Region


def local_shards(specs: Iterable[ShardSpec], position: Position) -> Iterator[LocalShard]:
    """Yield the shards of one parameter of the rank at `position`, stacked along dim 0 in their order."""
    row = 0
    for spec in specs:
        source = spec.region(position)
        target = Region((row, *(0 for _ in source.shape[1:])) if source.shape else (), source.shape)
        yield LocalShard(spec, source, target)
        row += spec.local_shape(position)[0] if source.shape else 0


@dataclass(frozen=True, slots=True)
class FlatRegion:
    """The elements from `start` on of a flat range are `region` of the global tensor `name`, in row-major order."""

    name: str
    global_shape: tuple[int, ...]
    region: Region
    start: int


def global_regions(
    shards: Iterable[LocalShard], local_shape: tuple[int, ...], start: int, stop: int
) -> Iterator[FlatRegion]:
    """Return the regions of global tensors that elements `start` to `stop` of a local parameter cover, without padding.

    ZeRO flattens parameters and cuts them into even shares, at any element. `FlatRegion.start` is relative to element
    `start`.
    """
    local_regions = list(flat_range_regions(local_shape, start, stop))
    for shard in shards:
        origin = tuple(at - zero for at, zero in zip(shard.target.offset, shard.source.offset, strict=True))
        for local in local_regions:
            common = local.intersect(shard.target) if shard.target.numel else None
            if common is not None:
                at = sum(offset * prod(local_shape[dim + 1 :]) for dim, offset in enumerate(common.offset))
                yield FlatRegion(shard.spec.name, shard.spec.global_shape, common.relative_to(origin), at - start)


def padded_vocabulary(vocab_size: int, tensor_size: int, multiple: int = 64) -> int:
    """Return the padded vocabulary size: the smallest that gives every rank an equal multiple of `multiple` rows.

    Matrix units are fastest at widths that are multiples of 64. The padding is not visible outside the layers.
    """
    unit = multiple * tensor_size
    return -(-vocab_size // unit) * unit
