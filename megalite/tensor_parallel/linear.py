"""The one product behind every sharded linear layer, with a backward whose two halves can part.

The gradient of the input is computed first; its sum over the group may be under way while that of the weight is
computed, and that of the weight may be left for later (`megalite.tensor_parallel.deferral`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.tensor_parallel.collectives import TensorGroup, start_all_reduce
from megalite.tensor_parallel.deferral import WeightGradients

ONE_RANK = TensorGroup()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    entered: TensorGroup = ONE_RANK,
    weight_gradients: WeightGradients | None = None,
) -> Tensor:
    """Return ``x W^T + b`` of x ``[..., in_features]``, as `torch.nn.functional.linear` does, and bit for bit that.

    With `entered` x enters a sharded region of that group, as with `copy_to_group`: its gradient is summed over the
    group, and with the group's `overlap` while the weight's is computed. `weight_gradients` says when that is; a
    weight that is put off must be a parameter.
    """
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, entered, weight_gradients)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        entered: TensorGroup,
        weight_gradients: WeightGradients | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Beside the saved tensor: a recomputation may save an alias in its place, which is not the parameter.
        ctx.weight, ctx.has_bias = weight, bias is not None
        ctx.entered, ctx.weight_gradients = entered, weight_gradients
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Detached, since a product that is put off would keep the graph behind either alive: the gradient of logits is
        # the tensor of the logits (`cross_entropy`), which has one.
        grad_y = grad_outputs[0].detach().flatten(0, -2)
        grad_x = grad_weight = grad_bias = summing = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight).view(x.shape)
            summing = start_all_reduce(grad_x, ctx.entered)
            if not ctx.entered.overlap:
                summing.wait()
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(ctx, x.detach(), grad_y)
        if ctx.has_bias:
            grad_bias = grad_y.sum(0)
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, grad_bias, None, None


def _weight_gradient(ctx: Any, x: Tensor, grad_y: Tensor) -> Tensor | None:
    """Return the weight's gradient, or None once it has been put off."""

    def product() -> Tensor:
        return grad_y.t() @ x.flatten(0, -2)

    deferred = ctx.weight_gradients.deferred if ctx.weight_gradients is not None else None
    if deferred is None:
        return product()
    deferred.put(ctx.weight, product)
    return None
