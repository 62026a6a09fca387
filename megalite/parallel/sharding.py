"""Sharding: the slice of a global tensor that each rank of the tensor axis holds. Pure arithmetic, no torch.

A parameter of a module is made of one or more *shards*, stacked along dim 0. Most parameters have one shard. A fused
projection has a shard for each tensor that checkpoints store under a name (``query``, ``key``, ``value``), so that one
matrix product computes all three.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A global tensor and the dim along which the ranks of the tensor axis divide it (None: every rank holds all).

    `padded_size` is the size of dim `dim` with the padding that makes it divide evenly, as for a vocabulary. Padding is
    no part of the global tensor. It lies on the last ranks, which hold fewer real rows than their share.

    >>> ShardSpec("head.weight", (10, 4), 0, padded_size=12).slice(rank=1, size=2)
    (slice(6, 10, None), slice(0, 4, None))
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int | None
    padded_size: int | None = None

    def share(self, size: int) -> int:
        """Return the length along `dim` of one rank's shard, with padding; raise ValueError where it is no integer."""
        assert self.dim is not None
        whole = self.padded_size or self.global_shape[self.dim]
        if whole % size:
            raise ValueError(f"{self.name}: {size} ranks do not divide dim {self.dim} of {self.global_shape}")
        return whole // size

    def slice(self, rank: int, size: int) -> tuple[slice, ...]:
        """Return the slices of the global tensor that `rank` of `size` holds, without padding."""
        region = [slice(0, length) for length in self.global_shape]
        if self.dim is not None:
            share, length = self.share(size), self.global_shape[self.dim]
            region[self.dim] = slice(min(rank * share, length), min((rank + 1) * share, length))
        return tuple(region)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Return the shape that every rank allocates, with padding."""
        shape = list(self.global_shape)
        if self.dim is not None:
            shape[self.dim] = self.share(size)
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One rank's shard: `source` in the global tensor, `target` in the local parameter; both have the same shape."""

    spec: ShardSpec
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def local_shards(specs: Iterable[ShardSpec], rank: int, size: int) -> Iterator[LocalShard]:
    """Yield the shards of one parameter of `rank` of `size`, stacked along dim 0 in their order."""
    row = 0
    for spec in specs:
        source = spec.slice(rank, size)
        lengths = [part.stop - part.start for part in source]
        target = (slice(row, row + lengths[0]), *(slice(0, length) for length in lengths[1:]))
        yield LocalShard(spec, source, target)
        row += spec.local_shape(size)[0]


def padded_vocabulary(vocab_size: int, tensor_size: int, multiple: int = 64) -> int:
    """Return the padded vocabulary size: the smallest that gives every rank an equal multiple of `multiple` rows.

    Matrix units are fastest at widths that are multiples of 64. The padding is not visible outside the layers.
    """
    unit = multiple * tensor_size
    return -(-vocab_size // unit) * unit
