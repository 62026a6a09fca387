"""Differentiable collectives of a sharded layer, in conjugate pairs (Megatron-LM, arXiv:1909.08053).

| operator                | forward                | backward               |
|-------------------------|------------------------|------------------------|
| `copy_to_group` (f)     | identity               | all-reduce             |
| `reduce_from_group` (g) | all-reduce             | identity               |
| `gather_from_group`     | all-gather, last dim   | local slice            |
| `all_gather_tokens`     | all-gather, tokens     | reduce-scatter, tokens |
| `reduce_scatter_tokens` | reduce-scatter, tokens | all-gather, tokens     |

f enters a tensor-parallel region, in which every rank computes a part of the result; g leaves it. Under sequence
parallelism (arXiv:2205.05198) every rank holds a share of the tokens outside such regions, and the last two operators
replace f and g. `enter_parallel_region` and `leave_parallel_region` choose between the pairs. In a group of one rank
every operator is the identity.

Tokens are one flattened sequence, ``[1, B*S, H]``. Rank r holds its r-th even part, ``[1, B*S / size, H]``, so that no
collective has to transpose. Legend for shapes: B rows, S tokens per row, H features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.tensor_group import TensorGroup

# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class AsyncTensor:
    """A tensor that a collective is still writing; `finish` waits for the collective and returns the result."""

    def __init__(self, tensor: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self._tensor, self._finish = tensor, finish

    def wait(self) -> Tensor:
        """Wait for the collective, and return the tensor."""
        if self._finish is not None:
            self._tensor, self._finish = self._finish(self._tensor), None
        return self._tensor


def start_all_gather(x: Tensor, group: TensorGroup) -> AsyncTensor:
    """Start the all-gather over the tokens (sequence parallelism); without sequence parallelism return `x`.

    Without the group's `overlap` the collective has ended on return, here and in `start_reduce`.
    """
    return _wait_unless_overlapped(_start_gather(x, group) if group.sequence_parallel else AsyncTensor(x), group)


def start_reduce(x: Tensor, group: TensorGroup) -> AsyncTensor:
    """Start the sum of a contiguous `x` over the group: an all-reduce in place, or with sequence parallelism the
    reduce-scatter over the tokens."""
    if group.size == 1:
        return AsyncTensor(x)
    if group.sequence_parallel:
        return _wait_unless_overlapped(_start_reduce_scatter(x, group), group)
    if torch.compiler.is_compiling():
        return _wait_unless_overlapped(_traced("all_reduce", x, "sum", group=group), group)
    return _wait_unless_overlapped(_started(x, dist.all_reduce(x, group=group.process_group, async_op=True)), group)


def _wait_unless_overlapped(pending: AsyncTensor, group: TensorGroup) -> AsyncTensor:
    if not group.overlap:
        pending.wait()
    return pending


def _all_reduce(x: Tensor, group: TensorGroup) -> Tensor:
    """Return the sum of a contiguous `x` over the group, which overwrites `x` unless it is compiled."""
    if torch.compiler.is_compiling():
        return _traced("all_reduce", x, "sum", group=group).wait()
    dist.all_reduce(x, group=group.process_group)
    return x


def _start_gather(x: Tensor, group: TensorGroup) -> AsyncTensor:
    share = x.contiguous().view(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        return _traced("all_gather_into_tensor", share, group.size, group=group, then=lambda x: x.unsqueeze(0))
    whole = x.new_empty(group.size * share.shape[0], x.shape[-1])
    work = _all_gather(whole, share, group=group.process_group, async_op=True)
    return _started(whole.unsqueeze(0), work)


def _start_reduce_scatter(x: Tensor, group: TensorGroup) -> AsyncTensor:
    parts = x.contiguous().view(-1, x.shape[-1])
    share, rest = divmod(parts.shape[0], group.size)
    assert rest == 0, f"{group.size} ranks do not divide {parts.shape[0]} tokens"
    if dist.get_backend(group.process_group) == "gloo":
        # gloo's reduce-scatter is an all-reduce and a copy, and takes four times as long as this all-to-all.
        def add(received: Tensor) -> Tensor:
            return received.view(group.size, 1, share, -1).sum(0)

        if torch.compiler.is_compiling():
            splits = [share] * group.size
            return _traced("all_to_all_single", parts, splits, splits, group=group, then=add)
        received = torch.empty_like(parts)
        return _started(
            received, dist.all_to_all_single(received, parts, group=group.process_group, async_op=True), add
        )
    if torch.compiler.is_compiling():
        return _traced("reduce_scatter_tensor", parts, "sum", group.size, group=group, then=lambda x: x.unsqueeze(0))
    mine = parts.new_empty(1, share, parts.shape[-1])
    return _started(mine, _reduce_scatter(mine.squeeze(0), parts, group=group.process_group, async_op=True))


def _started(
    tensor: Tensor, work: dist.Work | None, then: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> AsyncTensor:
    assert work is not None

    def finish(tensor: Tensor) -> Tensor:
        work.wait()
        return then(tensor)

    return AsyncTensor(tensor, finish)


def _traced(
    name: str,
    x: Tensor,
    *arguments: Any,
    group: TensorGroup,
    then: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> AsyncTensor:
    """Start a collective that torch.compile can trace: it returns a new tensor, and the wait is an operation too."""
    assert group.process_group is not None
    collectives = torch.ops._c10d_functional
    pending = getattr(collectives, name)(x, *arguments, group.process_group.group_name)
    return AsyncTensor(pending, lambda tensor: then(collectives.wait_tensor(tensor)))


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # Copy: autograd may give the same tensor to another branch, for example at a residual sum.
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        return _all_reduce(grad, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        elif not torch.compiler.is_compiling():
            ctx.mark_dirty(x)
        return _all_reduce(x, group)

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


class _AllGatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return start_all_gather(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return start_reduce(grad_outputs[0], ctx.group).wait(), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        return start_reduce(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return start_all_gather(grad_outputs[0], ctx.group).wait().view(ctx.shape), None


def copy_to_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Enter a tensor-parallel region: return `x`; the backward all-reduces its gradient over the group."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from_group(x: Tensor, group: TensorGroup) -> Tensor:
    """Leave a tensor-parallel region: all-reduce `x`, in place if contiguous; the backward is the identity."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_from_group(x: Tensor, group: TensorGroup) -> Tensor:
    """All-gather parts ``[..., n / size]`` into ``[..., n]``; the backward takes this rank's slice of the gradient."""
    return x if group.size == 1 else _GatherFromGroup.apply(x, group)  # pyright: ignore[reportReturnType]


def all_gather_tokens(x: Tensor, group: TensorGroup) -> Tensor:
    """All-gather shares ``[1, B*S / size, H]`` into ``[1, B*S, H]``; the backward reduce-scatters the gradient."""
    return _AllGatherTokens.apply(x, group) if group.sequence_parallel else x  # pyright: ignore[reportReturnType]


def reduce_scatter_tokens(x: Tensor, group: TensorGroup) -> Tensor:
    """Reduce-scatter ``[..., H]`` into shares ``[1, B*S / size, H]``; the backward all-gathers the gradient."""
    return _ReduceScatterTokens.apply(x, group) if group.sequence_parallel else x  # pyright: ignore[reportReturnType]


def enter_parallel_region(x: Tensor, group: TensorGroup) -> Tensor:
    """Enter a tensor-parallel region: `all_gather_tokens` with sequence parallelism, else `copy_to_group`."""
    return all_gather_tokens(x, group) if group.sequence_parallel else copy_to_group(x, group)


def leave_parallel_region(x: Tensor, group: TensorGroup) -> Tensor:
    """Leave a tensor-parallel region: `reduce_scatter_tokens` with sequence parallelism, else `reduce_from_group`."""
    return reduce_scatter_tokens(x, group) if group.sequence_parallel else reduce_from_group(x, group)


def local_tokens(x_BS: Tensor, group: TensorGroup) -> Tensor:
    """Return this rank's share of the tokens, ``[1, B*S / size]``; without sequence parallelism all of ``[B, S]``."""
    return x_BS.flatten().chunk(group.size)[group.rank].unsqueeze(0) if group.sequence_parallel else x_BS
