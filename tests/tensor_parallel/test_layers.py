"""Each tensor-parallel layer against torch.nn: output and every gradient, on real ranks."""

import pytest
import torch
import torch.nn.functional as F
from harness import run_distributed
from sharded_modules import assert_close, check_gradients, draw, fill, world_group
from torch import Tensor, nn

from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import gather_from_group
from megalite.tensor_parallel.init import initialise_parameter
from megalite.tensor_parallel.layers import (
    ColumnParallelLinear,
    ReplicatedKVLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    placed_parameters,
)

IN, OUT, SEED = 12, 24, 7


def column(bias: bool, gather: bool) -> None:
    group = world_group()
    reference = nn.Linear(IN, OUT, bias=bias)
    whole = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(reference.named_parameters())}
    reference.load_state_dict(whole)
    layer = ColumnParallelLinear(IN, OUT, group=group, bias=bias)
    fill(layer, whole)
    x, x_ref = (draw(3, 5, IN, seed=9).requires_grad_() for _ in range(2))
    y, y_ref = gather_from_group(layer(x), group) if gather else layer(x), reference(x_ref)
    weight = draw(*y_ref.shape, seed=11)
    own = slice(None) if gather else slice(group.rank * OUT // group.size, (group.rank + 1) * OUT // group.size)
    assert_close(y, y_ref[..., own])
    (y * weight[..., own]).sum().backward()
    (y_ref * weight).sum().backward()
    assert_close(x.grad, x_ref.grad)
    check_gradients(layer, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("bias", "gather"), [(True, False), (False, True)])
def test_column_parallel_linear_is_linear(world_size: int, bias: bool, gather: bool) -> None:
    run_distributed(column, world_size, bias, gather)


def row(bias: bool) -> None:
    group = world_group()
    reference = nn.Linear(OUT, IN, bias=bias)
    whole = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(reference.named_parameters())}
    reference.load_state_dict(whole)
    layer = RowParallelLinear(OUT, IN, group=group, bias=bias)
    fill(layer, whole)
    own = slice(group.rank * OUT // group.size, (group.rank + 1) * OUT // group.size)
    x_ref = draw(3, 5, OUT, seed=9).requires_grad_()
    x = x_ref.detach()[..., own].clone().requires_grad_()
    y, y_ref = layer(x), reference(x_ref)
    assert_close(y, y_ref)
    weight = draw(*y_ref.shape, seed=11)
    (y * weight).sum().backward()
    (y_ref * weight).sum().backward()
    assert x_ref.grad is not None
    assert_close(x.grad, x_ref.grad[..., own])
    check_gradients(layer, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_row_parallel_linear_is_linear(world_size: int, bias: bool) -> None:
    run_distributed(row, world_size, bias)


def fused() -> None:
    """Three named projections in one product, each divided by itself."""
    group = world_group()
    parts = {"query": 16, "key": 8, "value": 8}
    holder = nn.Module()
    holder.qkv = ColumnParallelLinear(IN, 32, group=group, bias=True, parts=parts)
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    whole = {
        name: draw(*((parts[name.split(".")[0]], IN) if name.endswith("weight") else (parts[name.split(".")[0]],)))
        for name in names
    }
    whole = {name: tensor.requires_grad_() for name, tensor in whole.items()}
    fill(holder, {name: tensor.detach() for name, tensor in whole.items()})
    x, x_ref = (draw(3, IN, seed=9).requires_grad_() for _ in range(2))
    y = holder.qkv(x).split(holder.qkv.local_sizes, dim=-1)
    for index, (part, size) in enumerate(parts.items()):
        expected = F.linear(x_ref, whole[f"{part}.weight"], whole[f"{part}.bias"])
        own = slice(group.rank * size // group.size, (group.rank + 1) * size // group.size)
        assert_close(y[index], expected[:, own])
        weight = draw(*expected.shape, seed=index)
        (y[index] * weight[:, own]).sum().backward(retain_graph=True)
        (expected * weight).sum().backward()
    assert_close(x.grad, x_ref.grad)
    check_gradients(holder, {n: t.grad for n, t in whole.items() if t.grad is not None})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fused_projections_are_separate_tensors_under_their_own_names(world_size: int) -> None:
    run_distributed(fused, world_size)


def head_slice(bias: bool) -> None:
    """Two key-value heads of width 4 on four ranks: two ranks share each."""
    group, parts = world_group(), {"key": 8, "value": 8}
    kv_head = group.rank * 2 // group.size
    rows = slice(4 * kv_head, 4 * kv_head + 4)
    holder = nn.Module()
    holder.kv = ReplicatedKVLinear(IN, parts, rows, group=group, bias=bias)
    whole = {f"{part}.weight": draw(8, IN, seed=i).requires_grad_() for i, part in enumerate(parts)}
    if bias:
        whole |= {f"{part}.bias": draw(8, seed=i).requires_grad_() for i, part in enumerate(parts)}
    fill(holder, {name: tensor.detach() for name, tensor in whole.items()})
    x, x_ref = (draw(3, IN, seed=9).requires_grad_() for _ in range(2))
    weights = [[draw(3, 4, seed=10 * r + i) for i in range(2)] for r in range(group.size)]
    for output, weight in zip(holder.kv(x).chunk(2, dim=-1), weights[group.rank], strict=True):
        (output * weight).sum().backward(retain_graph=True)
    for rank in range(group.size):
        head = rank * 2 // group.size
        for part, weight in zip(parts, weights[rank], strict=True):
            expected = F.linear(x_ref, whole[f"{part}.weight"], whole.get(f"{part}.bias"))
            (expected[:, 4 * head : 4 * head + 4] * weight).sum().backward()
    assert_close(x.grad, x_ref.grad)
    check_gradients(holder, {n: t.grad for n, t in whole.items() if t.grad is not None})


@pytest.mark.parametrize("bias", [True, False])
def test_shared_heads_sum_their_gradients(bias: bool) -> None:
    run_distributed(head_slice, 4, bias)


def embedding(vocab_size: int) -> None:
    group = world_group()
    reference = nn.Embedding(vocab_size, IN)
    layer = VocabParallelEmbedding(vocab_size, IN, group=group)
    fill(layer, {"weight": reference.weight.detach()})
    ids = torch.randint(0, vocab_size, (3, 17), generator=torch.Generator().manual_seed(3))
    ids[0, :3] = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    y, y_ref = layer(ids), reference(ids)
    assert_close(y, y_ref)
    weight = draw(*y_ref.shape, seed=11)
    (y * weight).sum().backward()
    (y_ref * weight).sum().backward()
    assert reference.weight.grad is not None
    assert layer.weight.grad is not None
    check_gradients(layer, {"weight": reference.weight.grad})
    real = layer.shard_specs["weight"][0].region(group.position)
    assert not layer.weight.grad[real.shape[0] :].any(), "padding rows have a gradient"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [128, 301])
def test_vocab_parallel_embedding_is_embedding(world_size: int, vocab_size: int) -> None:
    run_distributed(embedding, world_size, vocab_size)


def test_layers_refuse_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        ColumnParallelLinear(8, 9, group=TensorGroup(0, 2), bias=False)
    with pytest.raises(ValueError, match="do not divide"):
        RowParallelLinear(9, 8, group=TensorGroup(0, 2), bias=False)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_initialisation_is_the_same_whatever_the_layout(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.tensor_parallel.init.BLOCK_ELEMENTS", 50)

    def build(rank: int, of: int, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
        group = TensorGroup(rank, of)
        module = nn.Module()
        if kind == "column":
            module.layer = ColumnParallelLinear(IN, OUT, group=group, bias=True, parts={"a": 12, "b": 12})
        elif kind == "row":
            module.layer = RowParallelLinear(IN, OUT, group=group, bias=True)
        else:
            module.layer = VocabParallelEmbedding(301, IN, group=group)
        found: dict[str, Tensor] = {}
        for placed in placed_parameters(module):
            initialise_parameter(placed.parameter, placed.shards, seed=SEED, std=0.5)
            for shard in placed.shards:
                whole = found.setdefault(shard.spec.name, torch.full(shard.spec.global_shape, torch.nan))
                whole[shard.source.slices] = placed.parameter.detach()[shard.target.slices]
        return module, found

    for kind in ("column", "row", "embedding"):
        _, expected = build(0, 1, kind)
        joined = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
        for rank in range(size):
            for name, part in build(rank, size, kind)[1].items():
                joined[name] = torch.where(part.isnan(), joined[name], part)
        assert set(joined) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(joined[name], tensor), name
    assert abs(float(expected["layer.weight"].std()) - 0.5) < 0.02
