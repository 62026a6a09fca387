"""A pipeline stage under fully_shard: what its ranks divide, and when its gradients are reduced (FSDP2).

fully_shard wraps each block, and the rest of the stage. The ZeRO stages (arXiv:1910.02054) differ in what a rank keeps
between the microbatches of a step:

| ZeRO stage | weights | gradients |
|---|---|---|
| 0 | whole | whole; all-reduced in the stage's last backward of the step |
| 1 | gathered once per step | whole; reduce-scattered in the stage's last backward of the step |
| 2 | gathered once per step | divided: reduce-scattered in every backward |
| 3 | divided: each block gathers before its forward and backward | divided |

Where the schedule defers weight gradients, `ShardedStage.reduce` reduces what no backward can.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megalite.model.stage import Stage
from megalite.parallel.mesh import Mesh
from megalite.tensor_parallel.layers import PlacedParameter


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of a stage's weights in forward and backward, and of its gradients in sums and reductions."""

    weights: torch.dtype
    gradients: torch.dtype


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's share of a parameter: elements from `start` on of the local parameter that tensor ranks leave it.

    `master` is the share itself, flat, in fp32, which the optimizer updates in place. A frozen parameter's is in the
    model's precision.
    """

    placed: PlacedParameter
    master: nn.Parameter
    start: int
    _source: nn.Parameter

    @property
    def gradient(self) -> Tensor | None:
        """The reduced gradient of the share, flat; None before the reduction, and of a frozen parameter."""
        gradient = cast(DTensor | None, self._source.grad)
        return None if gradient is None else gradient.to_local().view(-1)

    def drop_gradient(self) -> None:
        self._source.grad = None


class ShardedStage:
    """A stage of this rank, divided over the data ranks at a ZeRO stage."""

    def __init__(self, stage: Stage, mesh: Mesh, zero_stage: int, precision: Precision) -> None:
        """Divide a stage whose parameters are on the meta device, and allocate this rank's shares. Collective."""
        self.stage, self.zero_stage = stage, zero_stage
        blocks = list(stage.layers.values())
        for parameter in stage.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(precision.weights)
        policy = MixedPrecisionPolicy(
            param_dtype=precision.weights if precision.weights != torch.float32 else None,
            reduce_dtype=precision.gradients,
            cast_forward_inputs=False,
        )
        stage.compute_dtype = precision.weights
        device_mesh = _device_mesh(mesh, zero_stage)
        for module in (*blocks, stage):
            if zero_stage == 0:
                replicate(module, mesh=device_mesh, mp_policy=policy)
            else:
                keep = zero_stage < 3 or module is stage
                fully_shard(module, mesh=device_mesh, mp_policy=policy, reshard_after_forward=not keep)
        stage.to_empty(device=mesh.device)
        self._modules = [cast(FSDPModule, module) for module in (*blocks, stage)]
        _set_prefetch(self._modules[:-1])
        self.shards = tuple(_shard(stage, placed, mesh, divided=zero_stage > 0) for placed in stage.placed_parameters)
        self._mode: tuple[bool, bool] | None = None
        self._is_complete = True
        """Whether the gradients so far are reduced, and the device waits for the reductions before later work."""

    @property
    def root(self) -> FSDPModule:
        return self._modules[-1]

    def backward(self, scalar: Tensor, *, last: bool, deferred: bool) -> None:
        """Backpropagate from one microbatch; reduce in this backward what the ZeRO stage reduces in it.

        `last`: no other backward of this stage follows in the step. `deferred`: some weight gradients come later.
        """
        self._is_complete = last and not deferred
        self._set_mode(reduces=(self.zero_stage >= 2 or last) and not deferred, last=self._is_complete)
        scalar.backward()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a deferred weight gradient, of the whole parameter; `settle` or `reduce` follows."""
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def settle(self) -> None:
        """After deferred weight gradients of a microbatch: reduce them at ZeRO stage 2 and 3, else keep their sum."""
        self._is_complete = False
        self._set_mode(reduces=self.zero_stage >= 2, last=False)
        self._post_backward()

    def reduce(self) -> bool:
        """Reduce the gradients that no backward has reduced, at the end of the step; return whether there were any."""
        if self._is_complete:
            return False
        self._is_complete = True
        self._set_mode(reduces=True, last=True)
        self._post_backward()
        return True

    def reshard(self) -> None:
        """Drop the gathered weights, so that the next forward gathers what the masters hold."""
        for module in self._modules:
            module.reshard()

    def _set_mode(self, *, reduces: bool, last: bool) -> None:
        """Say whether a backward reduces each group's gradients, and waits at its end for all reductions."""
        if self._mode != (reduces, last):
            self._mode = reduces, last
            self.root.set_requires_gradient_sync(reduces)
            self.root.set_is_last_backward(last)
            self.root.set_reshard_after_backward(last or self.zero_stage == 3)

    def _post_backward(self) -> None:
        """Run what fully_shard runs after a backward, as torch's own pipeline does for its REDUCE_GRAD."""
        for group in self.groups():
            group.post_backward()
        self._state(self.root)._root_post_backward_final_callback()

    def groups(self) -> Iterator[Any]:
        """Yield torch's groups of parameters (FSDPParamGroup), from the last block to the first."""
        for module in reversed(self._modules):
            yield from self._state(module)._fsdp_param_groups

    def _state(self, module: FSDPModule) -> Any:
        return module._get_fsdp_state()


def _device_mesh(mesh: Mesh, zero_stage: int) -> DeviceMesh:
    """Return the ranks over which fully_shard divides, and those over which it averages copies, as a DeviceMesh."""
    kind = mesh.device.type
    if zero_stage == 0:
        return DeviceMesh.from_group(mesh.gradient.process_group, kind, mesh_dim_names=("replicate",))
    if mesh.shard_replicas is None:
        return DeviceMesh.from_group(mesh.shard.process_group, kind, mesh_dim_names=("shard",))
    # Every row has the ranks of a shard group; this rank's row and column are its two groups.
    layout = mesh.layout
    rows = [list(ranks) for ranks in layout.groups(*layout.names_of("shard"))]
    mine = set(dist.get_process_group_ranks(mesh.shard_replicas.process_group))
    (gradient,) = (ranks for ranks in layout.groups(*layout.names_of("gradient")) if mesh.rank in ranks)
    square = [row for row in rows if set(row) <= set(gradient) and mine & set(row)]
    groups = [mesh.shard_replicas.process_group, mesh.shard.process_group]
    return DeviceMesh.from_group(groups, kind, mesh=torch.tensor(square), mesh_dim_names=("replicate", "shard"))


def _set_prefetch(blocks: Sequence[FSDPModule]) -> None:
    """Gather the next block's weights during a block's forward, and the one before it during its backward.

    fully_shard's own prefetch follows the order of the last forward, which is another microbatch's under 1F1B.
    """
    for before, after in zip(blocks, blocks[1:], strict=False):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])


def _shard(stage: Stage, placed: PlacedParameter, mesh: Mesh, *, divided: bool) -> Shard:
    source = cast(nn.Parameter, stage.get_parameter(placed.name))
    local = cast(DTensor, source).to_local().detach().view(-1).zero_()  # padding stays 0
    row = prod(placed.shape[1:])
    rows = -(-placed.shape[0] // mesh.shard.size) if divided else 0
    start = min(rows * mesh.shard.rank, placed.shape[0]) * row
    return Shard(placed, nn.Parameter(local, requires_grad=source.requires_grad), start, source)
