"""Gradients that several ranks share: what an engine does with them before and after it averages over the data axis.

An engine calls these functions once per step, whatever it shards: the first ones when every backward is done, and
`clip_grad_norm` on whole gradients.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.model.stage import Stage
from megalite.parallel.mesh import Mesh


def trained_parameters(stages: Iterable[Stage]) -> list[nn.Parameter]:
    """Return the parameters that are not frozen, each once: the first and the last stage may share a tied table."""
    parameters = dict.fromkeys(parameter for stage in stages for parameter in stage.parameters())
    return [parameter for parameter in parameters if parameter.requires_grad]


def all_reduce_sequence_parallel_grads(stages: Iterable[Stage], mesh: Mesh) -> None:
    """All-reduce the gradients of `sequence_parallel_parameters` over the tensor group: one collective, in fp32."""
    parameters = [p for stage in stages for p in stage.sequence_parallel_parameters() if p.requires_grad]
    if not parameters:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    all_reduce_as_one(gradients, mesh.tensor.process_group)


def all_reduce_as_one(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """All-reduce gradients over a group in one collective, in fp32."""
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    totals = flat.split([gradient.numel() for gradient in gradients])
    shaped = [total.view_as(gradient) for gradient, total in zip(gradients, totals, strict=True)]
    torch._foreach_copy_(gradients, shaped)  # pyright: ignore[reportPrivateImportUsage]


def all_reduce_tied_gradient(stages: Iterable[Stage], mesh: Mesh) -> None:
    """All-reduce the gradient over the copies of a tied table, so that the copies stay bit-equal.

    Afterwards each stage reduces over the data axis separately, and adds in an order that depends on the other contents
    of the bucket. With three summands or more, the rounding depends on the order. So with three data ranks or more, one
    all-reduce here sums over copies and data ranks, and all data ranks but the first contribute zeros to the later
    reduction, which is then exact.
    """
    if mesh.embedding is None:
        return
    for stage in stages:
        copy = stage.tied_copy
        if copy is not None and copy.requires_grad:
            assert copy.grad is not None
            dist.all_reduce(copy.grad, group=mesh.embedding_replicas or mesh.embedding)
            if mesh.embedding_replicas is not None and mesh.gradient.rank > 0:
                copy.grad.zero_()


def average_over_shard_replicas(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Average the gradients over the ranks that hold the same partition of the optimizer's state."""
    group = mesh.shard_replicas
    if group is None:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad.div_(group.size), group=group.process_group)


def propagate_nonfinite(uncounted: Sequence[Tensor], counted: Sequence[Tensor]) -> None:
    """Set a gradient that this rank counts in the norm to inf where one that it does not count is not finite.

    Another rank counts the same replicated parameter. With this, every rank skips the step.
    """
    if not uncounted or not counted:  # else this rank contributes nothing to the norm
        return
    if not bool(torch.stack([torch.isfinite(gradient).all() for gradient in uncounted]).all()):
        counted[0].view(-1)[0] = math.inf


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the square of a gradient's norm, fp64."""
    # By rows, then in fp64: one fp32 norm over millions of elements has an error of 1e-4 on a CPU.
    return torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()


def clip_grad_norm(gradients: Iterable[Tensor], counted: Iterable[Tensor], limit: float, mesh: Mesh) -> float:
    """Scale `gradients` to a global norm of at most `limit`, 0 for no limit; return the norm before. Collective.

    `counted` are those gradients that this rank counts in the norm: each element of the model is counted on one rank.
    """
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for gradient in counted:
        square += squared_norm(gradient)
    dist.all_reduce(square, group=mesh.model.process_group)
    norm = float(square.sqrt())
    if math.isfinite(norm) and limit > 0 and norm + 1e-6 > limit:
        scale = limit / (norm + 1e-6)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm
