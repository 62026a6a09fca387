"""The autograd function of every sharded linear layer: its backward overlaps communication or defers weight gradients.

The backward computes the gradient of the input first. The sum of that gradient over the group can overlap with the
computation of the weight's gradient, which can also be deferred (`megalite.tensor_parallel.weight_grad_store`). The
function is as fast as torch's own, so all layers use it. The group's `Kernels` compute the matrix products.
"""

from typing import Any

import torch
from torch import Tensor

from megalite.kernels.choice import Kernels
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import enter_parallel_region, start_all_gather, start_reduce
from megalite.tensor_parallel.weight_grad_store import WeightGradDeferral

ONE_RANK = TensorGroup()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernels: Kernels,
    input_group: TensorGroup = ONE_RANK,
    weight_grad_deferral: WeightGradDeferral | None = None,
) -> Tensor:
    """Return ``x W^T + b`` of x ``[..., in_features]``; with native `kernels` bit-equal to `torch.nn.functional`'s.

    With `input_group`, x first enters a tensor-parallel region of that group (`enter_parallel_region`). With sequence
    parallelism the backward repeats the all-gather of the tokens, so that only this rank's share is kept until then
    (arXiv:2205.05198). With the group's `overlap` the backward's collectives run beside its two products.
    `weight_grad_deferral` says whether the weight's gradient is deferred; such a weight must be a parameter.
    """
    if not torch.is_grad_enabled():
        return kernels.linear(enter_parallel_region(x, input_group), weight, bias)
    return _Linear.apply(x, weight, bias, kernels, input_group, weight_grad_deferral)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernels: Kernels,
        input_group: TensorGroup,
        weight_grad_deferral: WeightGradDeferral | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # The saved tensor may be an alias of the parameter after a recomputation; this is the parameter itself.
        ctx.weight = weight
        ctx.kernels, ctx.input_group, ctx.weight_grad_deferral = kernels, input_group, weight_grad_deferral
        return kernels.linear(start_all_gather(x, input_group).wait(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        (saved_x, weight), group, kernels = ctx.saved_tensors, ctx.input_group, ctx.kernels
        # Detach both, since a deferred product would keep their graphs alive. The gradient of the logits has a graph
        # too: it is the tensor of the logits itself (`cross_entropy`).
        x, grad_y = saved_x.detach(), grad_outputs[0].detach()
        rows = grad_y.flatten(0, -2)
        store = ctx.weight_grad_deferral.store if ctx.weight_grad_deferral is not None else None
        gathered = start_all_gather(x, group) if needs_weight and store is None else None
        grad_x = start_reduce(kernels.matmul(rows, weight).view(*grad_y.shape[:-1], -1), group) if needs_x else None
        grad_weight = None
        if gathered is not None:
            grad_weight = _weight_product(rows, gathered.wait(), kernels)
        elif needs_weight and store is not None:
            store.put(ctx.weight, lambda: _weight_product(rows, start_all_gather(x, group).wait(), kernels))
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_x.wait() if grad_x is not None else None, grad_weight, grad_bias, None, None, None


def _weight_product(grad_rows: Tensor, x: Tensor, kernels: Kernels) -> Tensor:
    return kernels.matmul(grad_rows.t(), x.flatten(0, -2))
