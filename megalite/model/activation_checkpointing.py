"""Activation checkpointing: the backward recomputes layers from their saved input (arXiv:1604.06174)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megalite.model.recompute import Recompute
from megalite.parallel.tensor_group import TensorGroup
from megalite.pipeline.stage_io import add_losses

T = TypeVar("T")
Losses = dict[str, Tensor]
Layer = Callable[[Tensor], Tensor | tuple[Tensor, Losses]]
"""From hidden states to hidden states. With gradients enabled a layer may return named scalar losses beside them, such
as that of a router: means over the tokens, the same on every rank of the tensor group."""


def run_layers(
    layers: Mapping[int, Layer], x: Tensor, recompute: Recompute | None, group: TensorGroup
) -> tuple[Tensor, Losses]:
    """Run layers, by their numbers in the model, in order; with gradients enabled, checkpoint as `recompute` says.

    `x` and the returned hidden states are the same on every rank of `group`, or with sequence parallelism its share of
    the tokens. Also returns the losses of the layers, summed by name.
    """
    functions = list(layers.values())
    if recompute is None or recompute.mode != "full" or not torch.is_grad_enabled():
        return _run_in_order(functions, x)
    numbers, losses = list(layers), {}
    for first in range(0, len(functions), recompute.segment):
        segment = functions[first : first + recompute.segment]
        if numbers[first] % recompute.every:
            x, added = _run_in_order(segment, x)
        else:
            with _saved_input_hooks(recompute, group):
                x, added = checkpointed(_run_in_order, segment, x)
        losses = add_losses(losses, added)
    return x, losses


def checkpointed(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function and save its tensor arguments alone; the backward recomputes all other tensors.

    The function must not draw from a random generator with a state, since no state is restored for the recomputation.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return cast(T, checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False))


def _run_in_order(layers: Sequence[Layer], x: Tensor) -> tuple[Tensor, Losses]:
    losses: Losses = {}
    for layer in layers:
        result = layer(x)
        x, added = result if isinstance(result, tuple) else (result, {})
        losses = add_losses(losses, added)
    return x, losses


def _saved_input_hooks(recompute: Recompute, group: TensorGroup) -> AbstractContextManager[object]:
    """Return hooks that store the saved input of a checkpointed segment: partitioned over the group, or on the host."""
    partition = recompute.partition and group.size > 1 and not group.sequence_parallel  # else x is a share already
    if not (partition or recompute.cpu):
        return nullcontext()

    def pack(x: Tensor) -> tuple[Tensor, torch.Size, torch.device]:
        saved = _partition(x, group) if partition else x
        return _copy_to_host(saved) if recompute.cpu else saved, x.shape, x.device

    def unpack(packed: tuple[Tensor, torch.Size, torch.device]) -> Tensor:
        saved, shape, device = packed
        saved = saved.to(device, non_blocking=True)
        return _all_gather(saved, shape, group) if partition else saved

    return saved_tensors_hooks(pack, unpack)


def _partition(x: Tensor, group: TensorGroup) -> Tensor:
    """Return a copy of this rank's even share of the elements; the last rank's share is padded."""
    size = -(-x.numel() // group.size)
    share = x.flatten()[group.rank * size : (group.rank + 1) * size]
    return F.pad(share, (0, size - share.numel())) if share.numel() < size else share.clone()


def _all_gather(share: Tensor, shape: torch.Size, group: TensorGroup) -> Tensor:
    parts = [torch.empty_like(share) for _ in range(group.size)]
    dist.all_gather(parts, share, group=group.process_group)
    return torch.cat(parts)[: shape.numel()].view(shape)


def _copy_to_host(x: Tensor) -> Tensor:
    """Copy to pinned host memory, so that the copies in both directions are asynchronous; on a CPU return `x`."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
