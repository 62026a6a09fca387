"""Weight gradients that are put off: the same to the bit, and nothing is kept once they are computed."""

import weakref
from typing import Any

import pytest
import torch
from cut_stages import GPT2, LLAMA, NEOX, SHAPE, cut_stages, loss_of, model_config, whole_weights
from harness import run_distributed
from torch import Tensor, nn

from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megalite.tensor_parallel.weight_grad_store import WeightGradDeferral, WeightGradStore

MODELS = {
    "llama, 1 kv head": LLAMA | {"num_key_value_heads": 1},
    "gpt2, tied": GPT2,
    "gpt_neox": NEOX,
}
LINEARS = (".qkv.weight", ".output.weight", ".gate_up.weight", ".down.weight", ".up.weight", "head.weight")


def microbatch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    assert gradient.dtype == parameter.dtype
    assert not gradient.requires_grad
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def forwards(stages: list[Stage]) -> list[Tensor]:
    """The losses of two microbatches, both under way at once."""
    losses = []
    for seed in (5, 6):
        losses.append(loss_of(stages, Microbatch(*microbatch(seed))))
    return losses


def gradients(stages: list[Stage]) -> dict[tuple[int, str], Tensor | None]:
    return {(stage.index, held.name): held.parameter.grad for stage in stages for held in stage.placed_parameters}


def put_off(fields: dict[str, Any], num_stages: int) -> None:
    config = model_config(fields)
    stages = cut_stages(config, whole_weights(config), num_stages)
    for loss in forwards(stages):
        loss.backward()
    expected = gradients(stages)
    for stage in stages:
        stage.zero_grad()

    *others, last = stages
    collected = []
    for loss in forwards(stages):
        with last.weight_grad_deferral.enabled() as products:
            loss.backward()
        collected.append(products)
    deferred = {(last.index, held.name) for held in last.placed_parameters if held.name.endswith(LINEARS)}
    if last.embedding is not None and config.tie_word_embeddings:
        deferred.add((last.index, "embedding.tokens.weight"))  # which holds what the lookup gives
    assert {len(products) for products in collected} == {len(deferred)}
    for key, gradient in gradients(stages).items():
        wanted = expected[key]
        assert wanted is not None
        if key not in deferred:
            assert gradient is not None
            assert torch.equal(gradient, wanted), key
        elif key[1] != "embedding.tokens.weight":
            assert gradient is None, key

    kept = [reference for products in collected for reference in inputs_of(products)]
    for products in collected:
        products.run(accumulate)
        assert not products
    for key, gradient in gradients(stages).items():
        wanted = expected[key]
        assert gradient is not None
        assert wanted is not None
        if key[1] == "embedding.tokens.weight" and key in deferred:  # four terms, added in another order
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(gradient, wanted), key
    assert kept
    assert not [reference for reference in kept if reference() is not None], "inputs outlive their products"


def inputs_of(products: WeightGradStore) -> list[weakref.ref[Tensor]]:
    tensors = [
        cell.cell_contents
        for _, product in products._products
        for cell in product.__closure__ or ()  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(cell.cell_contents, Tensor)
    ]
    assert len(tensors) == 2 * len(products)
    assert not any(tensor.requires_grad for tensor in tensors), "the graph behind an input is kept with it"
    return [weakref.ref(tensor) for tensor in tensors]


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("world_size", "num_stages"), [(1, 1), (2, 1), (2, 2)])
def test_what_is_put_off_is_the_same_to_the_bit(fields: dict[str, Any], world_size: int, num_stages: int) -> None:
    run_distributed(put_off, world_size, fields, num_stages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_compute_as_torch_does_to_the_bit(dtype: torch.dtype) -> None:
    column = ColumnParallelLinear(12, 24, group=TensorGroup(), bias=True)
    row = RowParallelLinear(24, 12, group=TensorGroup(), bias=False)
    reference = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12, bias=False))
    for module, other in ((column, reference[0]), (row, reference[1])):
        module.load_state_dict(other.state_dict())
    layers = nn.Sequential(column, row)
    x, x_ref = (torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    for model, given in ((layers, x), (reference, x_ref)):
        model.to(dtype)(given.requires_grad_()).square().sum().backward()
    assert x.grad is not None
    assert x_ref.grad is not None
    assert torch.equal(x.grad, x_ref.grad)
    for parameter, wanted in zip(layers.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=0, atol=0 if parameter.ndim > 1 else 1e-6)


def test_a_product_needs_no_weight() -> None:
    """As under ZeRO-3, where it is gone by then."""
    layer = RowParallelLinear(6, 4, group=TensorGroup(), bias=False)
    layer.weight_grad_deferral = WeightGradDeferral()
    nn.init.normal_(layer.weight)
    x = torch.randn(5, 6, requires_grad=True)
    with layer.weight_grad_deferral.enabled() as products:
        layer(x).sum().backward()
    layer.weight.data = torch.empty(0)
    found: list[tuple[nn.Parameter, Tensor]] = []
    products.run(lambda parameter, gradient: found.append((parameter, gradient)))
    ((parameter, gradient),) = found
    assert parameter is layer.weight
    torch.testing.assert_close(gradient, x.detach().sum(0).expand(4, 6))


def test_one_collection_at_a_time_and_none_after_a_fault() -> None:
    weight_grad_deferral = WeightGradDeferral()
    with weight_grad_deferral.enabled(), pytest.raises(RuntimeError, match="already"), weight_grad_deferral.enabled():
        pass
    with pytest.raises(ZeroDivisionError), weight_grad_deferral.enabled():
        _ = 1 / 0
    assert weight_grad_deferral.store is None
