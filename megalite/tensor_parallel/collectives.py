"""The conjugate pairs of communication that make a sharded layer differentiable (Megatron-LM, arXiv:1909.08053).

| operator                | forward                | backward               |
|-------------------------|------------------------|------------------------|
| `copy_to_group` (f)     | identity               | all-reduce             |
| `reduce_from_group` (g) | all-reduce             | identity               |
| `gather_from_group`     | all-gather, last dim   | own slice              |
| `gather_tokens`         | all-gather, tokens     | reduce-scatter, tokens |
| `scatter_tokens`        | reduce-scatter, tokens | all-gather, tokens     |

f opens a region in which every rank computes a part, g closes it. Under sequence parallelism (arXiv:2205.05198) every
rank holds a share of the tokens outside such regions, and the last two take the places of f and g: `enter_region` and
`leave_region` are the one pair or the other. With one rank all of them are the identity.

Tokens are one flattened sequence, ``[1, B*S, H]``, of which rank r holds the r-th even stretch ``[1, B*S / size, H]``:
so no collective transposes anything. Legend for shapes: B rows, S tokens of a row, H features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.tensor_group import TensorGroup

# torch gives both another name from 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Pending:
    """A tensor on which a collective is under way."""

    def __init__(
        self, tensor: Tensor, work: dist.Work | None = None, finish: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._tensor, self._work, self._finish = tensor, work, finish

    def wait(self) -> Tensor:
        """Return the tensor once the collective is through."""
        if self._work is not None:
            self._work.wait()
            self._tensor = self._finish(self._tensor) if self._finish is not None else self._tensor
            self._work = self._finish = None
        return self._tensor


def start_entering(x: Tensor, group: TensorGroup) -> Pending:
    """Begin what opens a sharded region: all tokens from the shares where they are divided, else `x` itself.

    Without the group's `overlap` it is through on return, here and in `start_summing`.
    """
    return _begun(_start_gather(x, group) if group.sequence_parallel else Pending(x), group)


def start_summing(x: Tensor, group: TensorGroup) -> Pending:
    """Begin to sum a contiguous `x` over the group: in place, or for the own share where tokens are divided."""
    if group.size == 1:
        return Pending(x)
    if group.sequence_parallel:
        return _begun(_start_reduce_scatter(x, group), group)
    return _begun(Pending(x, dist.all_reduce(x, group=group.process_group, async_op=True)), group)


def _begun(pending: Pending, group: TensorGroup) -> Pending:
    if not group.overlap:
        pending.wait()
    return pending


def _start_gather(x: Tensor, group: TensorGroup) -> Pending:
    tokens = x.shape[:-1].numel()
    whole = x.new_empty(group.size * tokens, x.shape[-1])
    share = x.contiguous().view(tokens, -1)
    work = _all_gather(whole, share, group=group.process_group, async_op=True)
    return Pending(whole.unsqueeze(0), work)


def _start_reduce_scatter(x: Tensor, group: TensorGroup) -> Pending:
    tokens = x.shape[:-1].numel()
    assert tokens % group.size == 0, f"{group.size} ranks do not divide {tokens} tokens"
    parts = x.contiguous().view(tokens, -1)
    if dist.get_backend(group.process_group) == "gloo":
        # gloo's own is an all-reduce and a copy, and takes four times as long as this.
        received = torch.empty_like(parts)
        work = dist.all_to_all_single(received, parts, group=group.process_group, async_op=True)
        return Pending(received, work, lambda x: x.view(group.size, 1, -1, x.shape[-1]).sum(0))
    share = parts.new_empty(1, tokens // group.size, parts.shape[-1])
    return Pending(share, _reduce_scatter(share.squeeze(0), parts, group=group.process_group, async_op=True))


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


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return start_entering(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return start_summing(grad_outputs[0], ctx.group).wait(), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        return start_summing(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return start_entering(grad_outputs[0], ctx.group).wait().view(ctx.shape), None


def copy_to_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Enter a sharded region: return `x` itself; its gradient is summed over the group."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Leave a sharded region: sum `x` over the group, in place where `x` is contiguous; the gradient passes."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_from_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Join the parts ``[..., n / size]`` of every rank into ``[..., n]``; each rank takes its slice of the gradient."""
    return x if group.size == 1 else _GatherFromGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_tokens(x: Tensor, group: TensorGroup) -> Tensor:
    """Join the shares ``[1, B*S / size, H]`` of every rank into ``[1, B*S, H]``; the gradient's share is summed."""
    return _GatherTokens.apply(x, group) if group.sequence_parallel else x  # pyright: ignore[reportReturnType]


def scatter_tokens(x: Tensor, group: TensorGroup) -> Tensor:
    """Sum ``[..., H]`` over the group, of which each rank keeps its share ``[1, B*S / size, H]``; the gradient's shares
    are joined."""
    return _ScatterTokens.apply(x, group) if group.sequence_parallel else x  # pyright: ignore[reportReturnType]


def enter_region(x: Tensor, group: TensorGroup) -> Tensor:
    """Open a sharded region: `gather_tokens` where tokens are divided, else `copy_to_group`."""
    return gather_tokens(x, group) if group.sequence_parallel else copy_to_group(x, group)


def leave_region(x: Tensor, group: TensorGroup) -> Tensor:
    """Close a sharded region: `scatter_tokens` where tokens are divided, else `reduce_from_group`."""
    return scatter_tokens(x, group) if group.sequence_parallel else reduce_from_group(x, group)


def own_tokens(x_BS: Tensor, group: TensorGroup) -> Tensor:
    """Return what stands at this rank's tokens, ``[1, B*S / size]``; all of ``[B, S]`` where tokens are not divided."""
    return x_BS.flatten().chunk(group.size)[group.rank].unsqueeze(0) if group.sequence_parallel else x_BS
