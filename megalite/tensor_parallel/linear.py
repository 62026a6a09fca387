"""The one product behind every sharded linear layer, with a backward whose two halves can part.

The gradient of the input is computed first; its sum over the group may be under way while that of the weight is
computed, and that of the weight may be left for later (`megalite.tensor_parallel.weight_grad_store`). It costs nothing
beside torch's own product, so there is no second path without it. How the products are computed is the group's to say
(`megalite.kernels.choice`).
"""

from typing import Any

import torch
from torch import Tensor

from megalite.kernels.choice import Kernels
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import enter_region, start_entering, start_summing
from megalite.tensor_parallel.weight_grad_store import WeightGradients

ONE_RANK = TensorGroup()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernels: Kernels,
    entering: TensorGroup = ONE_RANK,
    weight_gradients: WeightGradients | None = None,
) -> Tensor:
    """Return ``x W^T + b`` of x ``[..., in_features]``, as `torch.nn.functional.linear` does; bit for bit that with
    native `kernels`.

    With `entering` x enters a sharded region of that group first (`enter_region`). Where that gathers tokens, the
    backward gathers them once more, so that what is kept until then is a rank's share (arXiv:2205.05198). With the
    group's `overlap` the backward's collectives run beside its two products. `weight_gradients` says when the second
    is computed; a weight whose gradient is put off must be a parameter.
    """
    if not torch.is_grad_enabled():
        return kernels.linear(enter_region(x, entering), weight, bias)
    return _Linear.apply(x, weight, bias, kernels, entering, weight_gradients)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernels: Kernels,
        entering: TensorGroup,
        weight_gradients: WeightGradients | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Beside the saved tensor: a recomputation may save an alias in its place, which is not the parameter.
        ctx.weight = weight
        ctx.kernels, ctx.entering, ctx.weight_gradients = kernels, entering, weight_gradients
        return kernels.linear(start_entering(x, entering).wait(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        (saved_x, weight), group, kernels = ctx.saved_tensors, ctx.entering, ctx.kernels
        # Detached, since a product that is put off would keep the graph behind either alive: the gradient of logits is
        # the tensor of the logits (`cross_entropy`), which has one.
        x, grad_y = saved_x.detach(), grad_outputs[0].detach()
        rows = grad_y.flatten(0, -2)
        deferred = ctx.weight_gradients.deferred if ctx.weight_gradients is not None else None
        entered = start_entering(x, group) if needs_weight and deferred is None else None
        grad_x = start_summing(kernels.matmul(rows, weight).view(*grad_y.shape[:-1], -1), group) if needs_x else None
        grad_weight = None
        if entered is not None:
            grad_weight = _weight_product(rows, entered.wait(), kernels)
        elif needs_weight and deferred is not None:
            deferred.put(ctx.weight, lambda: _weight_product(rows, start_entering(x, group).wait(), kernels))
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_x.wait() if grad_x is not None else None, grad_weight, grad_bias, None, None, None


def _weight_product(grad_rows: Tensor, x: Tensor, kernels: Kernels) -> Tensor:
    return kernels.matmul(grad_rows.t(), x.flatten(0, -2))
