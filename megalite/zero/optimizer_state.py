"""The optimizer's state inside DeepSpeed's ZeRO: access to it for checkpoints, in both directions.

Unexpected behaviour of DeepSpeed is described beside the code that depends on it (`DeepSpeed:`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from megalite.checkpoint.fragments import Fragment, TensorSource, fill
from megalite.checkpoint.manifest import KINDS, MOMENTS
from megalite.tensor_parallel.layers import PlacedParameter
from megalite.zero.engine import ZeroEngine

_SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroState:
    """The state of an engine's optimizer: tensors as fragments of parameters, and a scalar state as JSON values."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine, self._mesh = engine, engine.mesh
        self._optimizer, self._zero = engine.optimizer, engine.zero_optimizer

    def fragments(self) -> Iterator[Fragment]:
        """Yield the fragments of its stages' parameters that this rank updates, with master weight and moments."""
        for _, fragment in self._owned_fragments():
            yield fragment

    def gradients(self) -> Iterator[Fragment]:
        """Yield the same fragments with their ``gradient``, reduced and not yet clipped, in place of the state.

        The gradients exist between the end of `ZeroEngine.accumulate` and the step, and include the loss scale.
        """
        for parameter, fragment in self._owned_fragments():
            gradient = self._gradient(cast(Any, parameter)).reshape(-1).narrow(0, 0, fragment.numel)
            yield replace(fragment, tensors={"gradient": gradient})

    def _owned_fragments(self) -> Iterator[tuple[nn.Parameter, Fragment]]:
        self._create_moments()
        for stage in self._engine.stages.values():
            for placed in stage.placed_parameters:
                has_copy = self._mesh.embedding is not None and placed.parameter is stage.tied_copy
                window = self._saved_window(prod(placed.shape)) if has_copy else None
                for fragment in self._fragment(placed):
                    yield placed.parameter, replace(fragment, window=window)

    def restore(self, source: TensorSource, scalar_state: Mapping[str, Any]) -> None:
        """Restore master weights, moments and scalar state from a checkpoint."""
        self._set_updates(int(scalar_state["updates"]))
        fill(self.fragments(), source, KINDS)
        self._set_loss_scale(scalar_state["loss_scale"])
        scheduler = self._engine.engine.lr_scheduler
        if scheduler is not None:
            # DeepSpeed: a scheduler sets the next step's rate at the end of a step, but not when it is loaded.
            state = scalar_state["scheduler"] or {"last_batch_iteration": int(scalar_state["updates"]) - 1}
            scheduler.step(state["last_batch_iteration"])

    def restore_weights(self, source: TensorSource) -> None:
        """Restore master weights alone."""
        fill(self.fragments(), source, ("weight",))

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
        """Return the state without tensors, as JSON values: AdamW's update count, loss scale, DeepSpeed's scheduler."""
        scheduler = self._engine.engine.lr_scheduler
        scale = None
        if self._has_loss_scale:
            scaler = self._zero.loss_scaler
            scale = {name: getattr(scaler, name) for name in _SCALER_COUNTERS if hasattr(scaler, name)}
        return {
            "updates": self._updates(),
            "loss_scale": scale,
            "scheduler": None if scheduler is None else dict(scheduler.state_dict()),
        }

    @property
    def _has_loss_scale(self) -> bool:
        return self._engine.dtype == torch.float16

    def _master_tensors(self) -> Iterable[Tensor]:
        """The tensors that AdamW updates: parameters at stage 0, else flat fp32 partitions."""
        if self._engine.zero_stage == 0:
            return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if self._engine.zero_stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _create_moments(self) -> None:
        """Create AdamW's state now with the values that its first update would create."""
        for master in self._master_tensors():
            state = self._optimizer.state[cast(nn.Parameter, master)]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state |= {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}

    def _set_updates(self, count: int) -> None:
        self._create_moments()
        for master in self._master_tensors():
            self._optimizer.state[cast(nn.Parameter, master)]["step"].fill_(count)
        for group in self._optimizer.param_groups:
            if "step" in group or "apex" in type(self._optimizer).__module__:  # apex counts updates per group
                group["step"] = count

    def _updates(self) -> int:
        counted = [group["step"] for group in self._optimizer.param_groups if "step" in group]
        counted += [state["step"] for state in self._optimizer.state.values() if "step" in state]
        return int(max(counted, default=0))

    def _saved_window(self, size: int) -> tuple[int, int]:
        """Return the range of elements that this stage saves of a tied table: the first or the last stage's half."""
        return (0, size // 2) if self._mesh.has_first_stage else (size // 2, size)

    def _fragment(self, placed: PlacedParameter) -> Iterator[Fragment]:
        """Yield this rank's fragment of a parameter, if ZeRO gives it one."""
        mesh, layout, parameter = self._mesh, self._mesh.layout, cast(Any, placed.parameter)
        start, tensors = 0, None
        if self._engine.zero_stage == 0:
            flat = {name: value.view(-1) for name, value in self._moments_of(parameter).items()}
            tensors = {"weight": parameter.detach().view(-1), **flat}
        elif self._engine.zero_stage == 3:
            # An even share of each parameter, with padding at the end.
            share = parameter.partition_numel()
            start = mesh.shard.rank * share
            length = min(share, parameter.ds_numel - start)
            if length > 0:
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                tensors = self._state_slice(self._zero.fp32_partitioned_groups_flat[group], int(offset), length)
        elif (mapping := parameter._hp_mapping) is not None:
            # DeepSpeed: it fills this mapping from parameters to optimizer state after the step of the first group,
            # so that the state of the other groups is missing. Only the addresses are used here.
            master = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            at, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            tensors = self._state_slice(master, at.start, at.numel)
        if tensors is not None:
            # The fragment is replicated along every axis that divides neither model, parameter nor optimizer state.
            divided = {"pipeline", *placed.shards[0].spec.sharding}
            divided |= set(layout.names_of("shard")) if self._engine.zero_stage else set()
            replicated = [axis for axis in mesh.axes if axis not in divided]
            copy, copies = layout.index(mesh.rank, *replicated), layout.size(*replicated)
            yield Fragment(placed.shards, placed.shape, start, tensors, copy, copies)

    def _gradient(self, parameter: Any) -> Tensor:
        if self._engine.zero_stage == 0:
            return parameter.grad
        if self._engine.zero_stage == 3:
            return self._zero.get_local_fp32_grad_for_param(parameter)
        # DeepSpeed: with an offloaded optimizer the mapping returns the gradient in host memory.
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _state_slice(self, master: Tensor, start: int, length: int) -> dict[str, Tensor]:
        state = {"weight": master.detach(), **self._moments_of(master)}
        return {name: value.narrow(0, start, length) for name, value in state.items()}

    def _moments_of(self, master: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[cast(nn.Parameter, master)]
        return {name: state[name] for name in MOMENTS}
