"""Layers between which every rank holds a share of the tokens, against torch.nn over all of them."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from harness import run_distributed
from sharded_modules import check_gradients, draw, fill
from torch import Tensor, nn

from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import (
    all_gather_tokens,
    enter_parallel_region,
    leave_parallel_region,
    local_tokens,
    reduce_scatter_tokens,
    start_all_gather,
    start_reduce,
)
from megalite.tensor_parallel.layers import (
    ColumnParallelLinear,
    ReplicatedKVLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

ROWS, LENGTH, WIDTH, INNER = 3, 20, 12, 24
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def divided_group(*, overlap: bool = False) -> TensorGroup:
    dist = torch.distributed
    return TensorGroup(
        dist.get_rank(), dist.get_world_size(), dist.group.WORLD, sequence_parallel=True, overlap=overlap
    )


def share(x_BSH: Tensor, group: TensorGroup) -> Tensor:
    """This rank's tokens of all, ``[1, B*S / size, H]``."""
    return x_BSH.flatten(0, 1).chunk(group.size)[group.rank].unsqueeze(0)


def pair(group: TensorGroup) -> tuple[Tensor, Tensor]:
    """All tokens, and this rank's share of them, both leaves."""
    whole = draw(ROWS, LENGTH, WIDTH, seed=9)
    return whole.clone().requires_grad_(), share(whole, group).clone().requires_grad_()


def collectives(dtype: torch.dtype) -> None:
    group = divided_group()
    # Whole numbers, of which every precision holds every sum.
    everyone = [(4 * draw(4 * group.size, 5, seed=rank)).round().to(dtype) for rank in range(group.size)]
    shares = [x.view(group.size, 4, 5)[0].unsqueeze(0) for x in everyone]
    assert torch.equal(all_gather_tokens(shares[group.rank], group), torch.cat(shares, dim=1))
    exact = torch.stack([x.double() for x in everyone]).sum(0).view(group.size, 1, 4, 5)[group.rank].to(dtype)
    found = reduce_scatter_tokens(everyone[group.rank].view(2, -1, 5), group)
    assert torch.equal(found, exact)
    with patch.object(torch.distributed, "get_backend", return_value="nccl"):  # which sums in its own reduce-scatter
        assert torch.equal(reduce_scatter_tokens(everyone[group.rank].view(2, -1, 5), group), exact)
    for overlap in (False, True):
        pending = start_reduce(everyone[group.rank].clone(), divided_group(overlap=overlap))
        assert torch.equal(pending.wait(), found)
        assert torch.equal(pending.wait(), found), "waited for once more, it is another"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shares_are_joined_and_sums_divided(dtype: torch.dtype, world_size: int) -> None:
    run_distributed(collectives, world_size, dtype)


def conjugate() -> None:
    """What enters and leaves by these is as if one rank had done it all: the gradients say so."""
    group = divided_group()
    whole, mine = pair(group)
    scale = draw(1, ROWS * LENGTH, WIDTH, seed=2)  # each rank does a part of the work of a region
    part = scale * (group.rank + 1) / sum(range(1, group.size + 1))
    y = leave_parallel_region(enter_parallel_region(mine, group) * part, group)
    y_ref = (whole.view(1, -1, WIDTH) * scale).view_as(whole)
    assert_close(y, share(y_ref, group))
    weight = draw(ROWS, LENGTH, WIDTH, seed=3)
    (y * share(weight, group)).sum().backward()
    (y_ref * weight).sum().backward()
    assert whole.grad is not None
    assert_close(mine.grad, share(whole.grad, group))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_entering_and_leaving_are_each_others_conjugates(world_size: int) -> None:
    run_distributed(conjugate, world_size)


def mlp(overlap: bool) -> None:
    group = divided_group(overlap=overlap)
    reference = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
    whole = {name: 0.3 * draw(*p.shape, seed=i) for i, (name, p) in enumerate(reference.named_parameters())}
    reference.load_state_dict(whole)
    up = ColumnParallelLinear(WIDTH, INNER, group=group, bias=True)
    down = RowParallelLinear(INNER, WIDTH, group=group, bias=True)
    layers = nn.Sequential(up, nn.GELU(), down)
    fill(layers, whole)
    x_ref, x = pair(group)
    y_ref, y = reference(x_ref), layers(x)
    assert_close(y, share(y_ref, group))
    with torch.no_grad():
        assert_close(layers(x), y, rtol=0, atol=0)
    weight = draw(*y_ref.shape, seed=11) / (ROWS * LENGTH)
    (y * share(weight, group)).sum().backward()
    (y_ref * weight).sum().backward()
    assert x_ref.grad is not None
    assert_close(x.grad, share(x_ref.grad, group))
    assert down.bias.grad is not None
    torch.distributed.all_reduce(down.bias.grad)  # the one of a share: the engine sums it once a step
    check_gradients(layers, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_column_and_row_are_an_mlp_over_shares(world_size: int, overlap: bool) -> None:
    run_distributed(mlp, world_size, overlap)


def shared_heads(bias: bool) -> None:
    """One entry serves the queries and the key-value head that two ranks share."""
    group, parts = divided_group(), {"key": 8, "value": 8}
    kv_head = group.rank * 2 // group.size
    holder = nn.Module()
    holder.query = ColumnParallelLinear(WIDTH, 16, group=group, bias=bias)
    holder.kv = ReplicatedKVLinear(WIDTH, parts, slice(4 * kv_head, 4 * kv_head + 4), group=group, bias=bias)
    sizes = {"query": 16, **parts}
    whole = {f"{part}.weight": 0.3 * draw(size, WIDTH, seed=i) for i, (part, size) in enumerate(sizes.items())}
    if bias:
        whole |= {f"{part}.bias": draw(size, seed=i) for i, (part, size) in enumerate(sizes.items())}
    whole = {name: tensor.requires_grad_() for name, tensor in whole.items()}
    fill(holder, {name: tensor.detach() for name, tensor in whole.items()})
    x_ref, x = pair(group)
    gathered = enter_parallel_region(x, group)
    query, key, value = torch.cat(
        (holder.query(gathered, gathered=True), holder.kv(gathered, gathered=True)), -1
    ).split(4, -1)
    alone = torch.cat((holder.query(x), holder.kv(x)), -1)
    assert_close(alone, torch.cat((query, key, value), -1), rtol=0, atol=0)
    (query * key * value / (ROWS * LENGTH)).sum().backward()
    wanted = {
        part: F.linear(x_ref, whole[f"{part}.weight"], whole.get(f"{part}.bias")).unflatten(-1, (-1, 4))
        for part in sizes
    }
    key_ref, value_ref = (wanted[part].repeat_interleave(2, dim=2) for part in parts)
    (wanted["query"] * key_ref * value_ref / (ROWS * LENGTH)).sum().backward()
    assert x_ref.grad is not None
    assert_close(x.grad, share(x_ref.grad, group))
    check_gradients(holder, {n: t.grad for n, t in whole.items() if t.grad is not None})


@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_a_shared_head_enter_once(bias: bool) -> None:
    run_distributed(shared_heads, 4, bias)


def embedding() -> None:
    group = divided_group()
    reference = nn.Embedding(301, WIDTH)
    layer = VocabParallelEmbedding(301, WIDTH, group=group)
    fill(layer, {"weight": reference.weight.detach()})
    ids = torch.randint(0, 301, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    y_ref, y = reference(ids), layer(ids)
    assert_close(y, share(y_ref, group))
    assert torch.equal(local_tokens(ids, group)[0], share(ids.unsqueeze(-1), group)[0, :, 0])
    weight = draw(*y_ref.shape, seed=11)
    (y * share(weight, group)).sum().backward()
    (y_ref * weight).sum().backward()
    assert reference.weight.grad is not None
    check_gradients(layer, {"weight": reference.weight.grad})


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_embedding_gives_every_rank_its_tokens(world_size: int) -> None:
    run_distributed(embedding, world_size)


def test_one_rank_has_nothing_to_divide() -> None:
    group, x = TensorGroup(sequence_parallel=True), draw(2, 3, 4)
    assert not group.sequence_parallel
    for found in (
        enter_parallel_region(x, group),
        leave_parallel_region(x, group),
        local_tokens(x, group),
        start_all_gather(x, group).wait(),
    ):
        assert found is x
