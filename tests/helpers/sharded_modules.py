"""Modules of a tensor-parallel group: their parameters filled from global tensors, their gradients compared."""

from functools import partial

import torch
from torch import Tensor, nn

from megalite.parallel.sharding import local_shards
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.layers import parameter_shards

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def world_group() -> TensorGroup:
    dist = torch.distributed
    return TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, group: TensorGroup, whole: dict[str, Tensor]) -> None:
    """Give every parameter its slices of the named global tensors."""
    with torch.no_grad():
        for _, parameter, shards in parameter_shards(module):
            parameter.zero_()
            for shard in local_shards(shards, group.rank, group.size):
                parameter[shard.target] = whole[shard.spec.name][shard.source]


def check_gradients(module: nn.Module, group: TensorGroup, expected: dict[str, Tensor]) -> None:
    for _, parameter, shards in parameter_shards(module):
        assert parameter.grad is not None
        for shard in local_shards(shards, group.rank, group.size):
            assert_close(parameter.grad[shard.target], expected[shard.spec.name][shard.source])
