"""Initialisation of weights from (seed, global name): the same model under every layout, in bounded memory.

A global tensor is drawn in blocks of rows, each with a separate random generator that is seeded by (seed, name, block).
A rank draws only the blocks that overlap its region, and keeps the overlap.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from megalite.parallel.sharding import LocalShard

BLOCK_ELEMENTS = 1 << 20


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    # torch takes seeds of 63 bits on every device.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_slice_(target: Tensor, shard: LocalShard, *, seed: int, std: float) -> None:
    """Fill `target`, the local view of a shard, with its region of a normal global tensor; `std`: its deviation."""
    shape = shard.spec.global_shape
    columns = 1
    for length in shape[1:]:
        columns *= length
    rows = max(1, BLOCK_ELEMENTS // columns)
    needed, *columns_needed = shard.source.slices
    for block in range(needed.start // rows, -(-needed.stop // rows)):
        first, last = block * rows, min((block + 1) * rows, shape[0])
        drawn = torch.empty(last - first, *shape[1:])
        drawn.normal_(0.0, std, generator=_generator(seed, shard.spec.name, block))
        low, high = max(first, needed.start), min(last, needed.stop)
        part = drawn[low - first : high - first][(slice(None), *columns_needed)]
        target[low - needed.start : high - needed.start].copy_(part)


@torch.no_grad()
def initialise_parameter(parameter: Tensor, shards: Iterable[LocalShard], *, seed: int, std: float) -> None:
    """Initialise one parameter, shard by shard: biases and padding with 0, other vectors with 1, matrices normally."""
    parameter.zero_()
    for shard in shards:
        target = parameter[shard.target.slices]
        if shard.spec.name.endswith(".bias"):
            continue
        if target.ndim == 1:
            target.fill_(1.0)
        else:
            normal_slice_(target, shard, seed=seed, std=std)
