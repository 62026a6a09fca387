"""Layers that are computed again in the backward, from the input that was kept of them (arXiv:1604.06174)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megalite.config import Recompute
from megalite.parallel.tensor_group import TensorGroup

Layer = Callable[[Tensor], Tensor]


def run_layers(layers: Mapping[int, Layer], x: Tensor, recompute: Recompute | None, group: TensorGroup) -> Tensor:
    """Run layers, by their numbers in the model, one after the other; where gradients are asked for, with `recompute`.

    `x` and what is returned are hidden states, the same on every rank of `group`, or its share of the tokens.
    """
    steps = list(layers.values())
    if recompute is None or recompute.mode != "full" or not torch.is_grad_enabled():
        return _in_turn(steps, x)
    numbers = list(layers)
    for first in range(0, len(steps), recompute.segment):
        segment = steps[first : first + recompute.segment]
        if numbers[first] % recompute.every:
            x = _in_turn(segment, x)
        else:
            with _kept_input(recompute, group):
                x = recomputed(_in_turn, segment, x)
    return x


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function, keeping its tensor arguments alone; whatever its backward needs is computed again.

    The function draws no random numbers but those that its arguments determine: no generator's state is restored.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def _in_turn(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _kept_input(recompute: Recompute, group: TensorGroup) -> AbstractContextManager[object]:
    """Say where the input of what is recomputed waits; torch keeps nothing else of it by these hooks."""
    partition = recompute.partition and group.size > 1 and not group.sequence_parallel  # what is a share already
    if not (partition or recompute.cpu):
        return nullcontext()

    def pack(x: Tensor) -> tuple[Tensor, torch.Size, torch.device]:
        kept = _share(x, group) if partition else x
        return _to_host(kept) if recompute.cpu else kept, x.shape, x.device

    def unpack(packed: tuple[Tensor, torch.Size, torch.device]) -> Tensor:
        kept, shape, device = packed
        kept = kept.to(device, non_blocking=True)
        return _joined(kept, shape, group) if partition else kept

    return saved_tensors_hooks(pack, unpack)


def _share(x: Tensor, group: TensorGroup) -> Tensor:
    """Return a copy of this rank's even stretch of the elements, the last filled up."""
    size = -(-x.numel() // group.size)
    share = x.flatten()[group.rank * size : (group.rank + 1) * size]
    return F.pad(share, (0, size - share.numel())) if share.numel() < size else share.clone()


def _joined(share: Tensor, shape: torch.Size, group: TensorGroup) -> Tensor:
    parts = [torch.empty_like(share) for _ in range(group.size)]
    dist.all_gather(parts, share, group=group.process_group)
    return torch.cat(parts)[: shape.numel()].view(shape)


def _to_host(x: Tensor) -> Tensor:
    """Copy to memory that the device reads by itself, so that neither way waits; on a CPU it is there already."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
