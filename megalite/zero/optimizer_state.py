"""The optimizer's state inside DeepSpeed's ZeRO: access to it for checkpoints, in both directions.

Unexpected behaviour of DeepSpeed is described beside the code that depends on it (`DeepSpeed:`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megalite.checkpoint.fragments import Fragment, TensorSource, fill, saved_window
from megalite.checkpoint.manifest import WEIGHT_KIND
from megalite.model.stage import Stage
from megalite.optim.declaration import OptimizerDeclaration
from megalite.optim.state import create_state, set_updates
from megalite.parallel.mesh import Mesh
from megalite.tensor_parallel.layers import PlacedParameter

_SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroState:
    """The weights of an engine's stages and the state of its optimizer.

    Tensors are fragments of parameters: a trained parameter has its master weight and the state that the optimizer
    declares, a frozen one its weight alone. The scalar state is JSON values.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        declaration: OptimizerDeclaration,
        stages: Mapping[int, Stage],
        mesh: Mesh,
        zero_stage: int,
    ) -> None:
        self._engine, self._optimizer, self._declaration = engine, optimizer, declaration
        self._stages, self._mesh, self._zero_stage = stages, mesh, zero_stage
        self._zero = cast(Any, engine.optimizer)
        self.updates = 0
        """The number of updates so far, without skipped steps."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield the frozen fragments that this rank holds, and those that it updates, with their optimizer state."""
        # First the frozen ones: every data-parallel rank has the same, so that copies have the same number in `parts`.
        for trained in (False, True):
            for _, fragment in self._fragments(trained=trained):
                yield fragment

    def gradients(self) -> Iterator[Fragment]:
        """Yield the fragments that this rank updates with their ``gradient``, reduced and not yet clipped.

        The gradients exist between the end of `ZeroEngine.accumulate` and the step, and include the loss scale.
        """
        for parameter, fragment in self._fragments(trained=True):
            gradient = self._gradient(cast(Any, parameter)).reshape(-1).narrow(0, 0, fragment.numel)
            yield replace(fragment, tensors={"gradient": gradient})

    def _fragments(self, *, trained: bool) -> Iterator[tuple[nn.Parameter, Fragment]]:
        create_state(self._optimizer, self._declaration, self._master_tensors())
        for stage in self._stages.values():
            for placed in stage.placed_parameters:
                if placed.parameter.requires_grad == trained:
                    window = saved_window(stage, placed, self._mesh)
                    for fragment in self._fragment(placed):
                        yield placed.parameter, replace(fragment, window=window)

    def restore(self, source: TensorSource, scalar_state: Mapping[str, Any]) -> None:
        """Restore master weights, optimizer state and scalar state from a checkpoint.

        Frozen weights are not restored: they never change, and the stages were built with them.
        """
        self.updates = int(scalar_state["updates"])
        fill((fragment for _, fragment in self._fragments(trained=True)), source)
        set_updates(self._optimizer, self._declaration, self._master_tensors(), self.updates)
        self._set_loss_scale(scalar_state["loss_scale"])
        scheduler = self._engine.lr_scheduler
        if scheduler is not None:
            # DeepSpeed: a scheduler sets the next step's rate at the end of a step, but not when it is loaded.
            state = scalar_state["scheduler"] or {"last_batch_iteration": int(scalar_state["updates"]) - 1}
            scheduler.step(state["last_batch_iteration"])

    def restore_weights(self, source: TensorSource) -> None:
        """Restore master weights alone; frozen weights are those that the stages were built with."""
        for _, fragment in self._fragments(trained=True):
            fill([replace(fragment, tensors={WEIGHT_KIND: fragment.tensors[WEIGHT_KIND]})], source)

    @contextmanager
    def preserve_loss_scale(self) -> Iterator[None]:
        """Undo changes of the loss scale by a step inside the context."""
        before = self.scalar_state()["loss_scale"]
        yield
        self._set_loss_scale(before)

    def _set_loss_scale(self, scale: Mapping[str, float] | None) -> None:
        if self._has_loss_scale and scale is not None:
            for name in scale.keys() & set(_SCALER_COUNTERS):
                setattr(self._zero.loss_scaler, name, scale[name])

    def scalar_state(self) -> dict[str, Any]:
        """Return the state without tensors, as JSON values: number of updates, loss scale, DeepSpeed's scheduler."""
        scheduler = self._engine.lr_scheduler
        scale = None
        if self._has_loss_scale:
            scaler = self._zero.loss_scaler
            scale = {name: getattr(scaler, name) for name in _SCALER_COUNTERS if hasattr(scaler, name)}
        return {
            "updates": self.updates,
            "loss_scale": scale,
            "scheduler": None if scheduler is None else dict(scheduler.state_dict()),
        }

    @property
    def _has_loss_scale(self) -> bool:
        return next(iter(self._stages.values())).activation_dtype == torch.float16

    def _master_tensors(self) -> Iterable[Tensor]:
        """The tensors that the optimizer updates: parameters at stage 0, else flat fp32 partitions."""
        if self._zero_stage == 0:
            return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if self._zero_stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _fragment(self, placed: PlacedParameter) -> Iterator[Fragment]:
        """Yield this rank's fragment of a parameter, if ZeRO gives it one."""
        mesh, parameter = self._mesh, cast(Any, placed.parameter)
        # Stages 1 and 2 divide the optimizer's state, which a frozen parameter has not; stage 3 divides every weight.
        is_divided = self._zero_stage == 3 or (self._zero_stage > 0 and parameter.requires_grad)
        start, tensors = 0, None
        if not is_divided:
            tensors = {WEIGHT_KIND: parameter.detach().view(-1)}
            if parameter.requires_grad:
                tensors |= {name: value.view(-1) for name, value in self._state_of(parameter).items()}
        elif self._zero_stage == 3:
            # An even share of each parameter, with padding at the end.
            share = parameter.partition_numel()
            start = mesh.shard.rank * share
            length = min(share, parameter.ds_numel - start)
            if length > 0 and parameter.requires_grad:
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                tensors = self._state_slice(self._zero.fp32_partitioned_groups_flat[group], int(offset), length)
            elif length > 0:
                tensors = {WEIGHT_KIND: parameter.ds_tensor.detach().view(-1).narrow(0, 0, length)}
        elif (mapping := parameter._hp_mapping) is not None:
            # DeepSpeed: it fills this mapping from parameters to optimizer state after the step of the first group,
            # so that the state of the other groups is missing. Only the addresses are used here.
            master = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            at, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            tensors = self._state_slice(master, at.start, at.numel)
        if tensors is not None:
            sharding = mesh.layout.names_of("shard") if is_divided else ()
            copy, copies = mesh.copy_of("pipeline", *placed.shards[0].spec.sharding, *sharding)
            yield Fragment(placed.shards, placed.shape, start, tensors, copy, copies)

    def _gradient(self, parameter: Any) -> Tensor:
        if self._zero_stage == 0:
            return parameter.grad
        if self._zero_stage == 3:
            return self._zero.get_local_fp32_grad_for_param(parameter)
        # DeepSpeed: with an offloaded optimizer the mapping returns the gradient in host memory.
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _state_slice(self, master: Tensor, start: int, length: int) -> dict[str, Tensor]:
        state = {WEIGHT_KIND: master.detach(), **self._state_of(master)}
        return {name: value.narrow(0, start, length) for name, value in state.items()}

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[cast(nn.Parameter, master)]
        return {name: state[name] for name in self._declaration.state_tensors}
