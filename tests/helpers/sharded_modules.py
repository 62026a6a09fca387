"""Modules of a tensor-parallel group: their parameters filled from global tensors, their gradients compared."""

from functools import partial

import torch
from torch import Tensor, nn

from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.layers import placed_parameters

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def world_group() -> TensorGroup:
    dist = torch.distributed
    return TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give every parameter its regions of the named global tensors."""
    with torch.no_grad():
        for placed in placed_parameters(module):
            placed.parameter.zero_()
            for shard in placed.shards:
                placed.parameter[shard.target.slices] = whole[shard.spec.name][shard.source.slices]


def check_gradients(module: nn.Module, expected: dict[str, Tensor]) -> None:
    for placed in placed_parameters(module):
        assert placed.parameter.grad is not None
        for shard in placed.shards:
            assert_close(placed.parameter.grad[shard.target.slices], expected[shard.spec.name][shard.source.slices])
