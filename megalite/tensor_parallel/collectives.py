"""The conjugate pairs of communication that make a sharded layer differentiable (Megatron-LM, arXiv:1909.08053).

| operator            | forward            | backward             |
|---------------------|--------------------|----------------------|
| `copy_to_group` (f) | identity           | all-reduce           |
| `reduce_from_group` (g) | all-reduce     | identity             |
| `gather_from_group` | all-gather, last dim | own slice          |

f opens a region in which every rank computes a part, g closes it. With one rank all of them are the identity.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The ranks that share a layer, and this rank's place among them; `process_group` may be None for one rank.

    Plain numbers beside the process group let modules be built, sized and initialised without any process.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    overlap: bool = False
    """Sum the gradient of a sharded region's input while that of its weight is computed."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A collective under way; None where there is nothing to wait for."""

    work: dist.Work | None = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


def start_all_reduce(x: Tensor, group: TensorGroup) -> Pending:
    """Begin to sum `x`, which is contiguous, over the group in place."""
    if group.size == 1:
        return Pending()
    return Pending(dist.all_reduce(x, group=group.process_group, async_op=True))


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to another branch, as it does at a residual sum.
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group.process_group)
        return grad, None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        if x.is_contiguous():
            ctx.mark_dirty(x)
        else:
            x = x.contiguous()
        dist.all_reduce(x, group=group.process_group)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _GatherFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, x.contiguous(), group=group.process_group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].chunk(ctx.group.size, dim=-1)[ctx.group.rank].contiguous(), None


def copy_to_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Enter a sharded region: return `x` itself; its gradient is summed over the group."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Leave a sharded region: sum `x` over the group, in place where `x` is contiguous; the gradient passes."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_from_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Join the parts ``[..., n / size]`` of every rank into ``[..., n]``; each rank takes its slice of the gradient."""
    return x if group.size == 1 else _GatherFromGroup.apply(x, group)  # pyright: ignore[reportReturnType]
