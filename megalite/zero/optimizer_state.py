"""Where DeepSpeed's ZeRO keeps the optimizer's state, and how to put it there: what a checkpoint reads and restores.

What DeepSpeed does otherwise than one would think is said beside the code that minds it (`DeepSpeed:`).
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
    """The state of an engine's optimizer: tensors as fragments of parameters, the rest as plain numbers."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine, self._mesh = engine, engine.mesh
        self._optimizer, self._zero = engine.optimizer, engine.zero_optimizer

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank updates of its stages' parameters."""
        for _, fragment in self._updated():
            yield fragment

    def gradients(self) -> Iterator[Fragment]:
        """Yield the same fragments with their ``gradient``, reduced and not yet clipped, in place of the state.

        It stands between the end of `ZeroEngine.accumulate` and the step, and has the loss scale in it.
        """
        for parameter, fragment in self._updated():
            gradient = self._gradient(cast(Any, parameter)).reshape(-1).narrow(0, 0, fragment.numel)
            yield replace(fragment, tensors={"gradient": gradient})

    def _updated(self) -> Iterator[tuple[nn.Parameter, Fragment]]:
        self._require_moments()
        for stage in self._engine.stages.values():
            for placed in stage.placed_parameters:
                both = self._mesh.embedding is not None and placed.parameter is stage.tied_copy
                window = self._half(prod(placed.shape)) if both else None
                for fragment in self._fragment(placed):
                    yield placed.parameter, replace(fragment, window=window)

    def restore(self, source: TensorSource, numbers: Mapping[str, Any]) -> None:
        """Take over a checkpoint's master weights, moments and numbers."""
        self._set_updates(int(numbers["updates"]))
        fill(self.fragments(), source, KINDS)
        self._set_loss_scale(numbers["loss_scale"])
        scheduler = self._engine.engine.lr_scheduler
        if scheduler is not None:
            # DeepSpeed: a scheduler sets the rate of the next step at the end of a step, and not when it is loaded.
            state = numbers["scheduler"] or {"last_batch_iteration": int(numbers["updates"]) - 1}
            scheduler.step(state["last_batch_iteration"])

    def restore_weights(self, source: TensorSource) -> None:
        """Take over master weights alone."""
        fill(self.fragments(), source, ("weight",))

    @contextmanager
    def keeping_loss_scale(self) -> Iterator[None]:
        """Leave the loss scale as it is, whatever a step inside thinks of its gradients."""
        before = self.numbers()["loss_scale"]
        yield
        self._set_loss_scale(before)

    def _set_loss_scale(self, scale: Mapping[str, float] | None) -> None:
        if self._has_loss_scale and scale is not None:
            for name in scale.keys() & set(_SCALER_COUNTERS):
                setattr(self._zero.loss_scaler, name, scale[name])

    def numbers(self) -> dict[str, Any]:
        """Return the state that is no tensor, for JSON: AdamW's count of updates, loss scale, DeepSpeed's scheduler."""
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

    def _masters(self) -> Iterable[Tensor]:
        """The tensors that AdamW updates: parameters at stage 0, else flat fp32 partitions."""
        if self._engine.zero_stage == 0:
            return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if self._engine.zero_stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _require_moments(self) -> None:
        """AdamW makes its state at its first update; make it sooner, as that would."""
        for master in self._masters():
            state = self._optimizer.state[cast(nn.Parameter, master)]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state |= {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}

    def _set_updates(self, count: int) -> None:
        self._require_moments()
        for master in self._masters():
            self._optimizer.state[cast(nn.Parameter, master)]["step"].fill_(count)
        for group in self._optimizer.param_groups:
            if "step" in group or "apex" in type(self._optimizer).__module__:  # apex counts by group
                group["step"] = count

    def _updates(self) -> int:
        counted = [group["step"] for group in self._optimizer.param_groups if "step" in group]
        counted += [state["step"] for state in self._optimizer.state.values() if "step" in state]
        return int(max(counted, default=0))

    def _half(self, size: int) -> tuple[int, int]:
        """The elements that this stage saves of a table that the first and the last stage hold alike."""
        return (0, size // 2) if self._mesh.has_first_stage else (size // 2, size)

    def _fragment(self, placed: PlacedParameter) -> Iterator[Fragment]:
        mesh, layout, parameter = self._mesh, self._mesh.layout, cast(Any, placed.parameter)
        # Ranks along all other axes hold the same.
        divided = {"pipeline", *placed.shards[0].spec.sharding}
        divided |= set(layout.names_of("shard")) if self._engine.zero_stage else set()
        alike = [axis for axis in mesh.axes if axis not in divided]
        start, held = 0, None
        if self._engine.zero_stage == 0:
            flat = {name: value.view(-1) for name, value in self._moments_of(parameter).items()}
            held = {"weight": parameter.detach().view(-1), **flat}
        elif self._engine.zero_stage == 3:
            # Every parameter is divided evenly, the last share padded.
            share = parameter.partition_numel()
            start = mesh.shard.rank * share
            length = min(share, parameter.ds_numel - start)
            if length > 0:
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                held = self._narrowed(self._zero.fp32_partitioned_groups_flat[group], int(offset), length)
        elif (linked := parameter._hp_mapping) is not None:
            # DeepSpeed: it links the optimizer's state to parameters after the first group has stepped, and so the
            # state of the other groups never.
            master = self._zero.single_partition_of_fp32_groups[linked.param_group_index]
            at, start = linked.hp_fragment_address, linked.lp_fragment_address.start
            held = self._narrowed(master, at.start, at.numel)
        if held is not None:
            copy, copies = layout.index(mesh.rank, *alike), layout.size(*alike)
            yield Fragment(placed.shards, placed.shape, start, held, copy, copies)

    def _gradient(self, parameter: Any) -> Tensor:
        if self._engine.zero_stage == 0:
            return parameter.grad
        if self._engine.zero_stage == 3:
            return self._zero.get_local_fp32_grad_for_param(parameter)
        # DeepSpeed: with the optimizer offloaded its link leads to the gradient's place on the host.
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _narrowed(self, master: Tensor, start: int, length: int) -> dict[str, Tensor]:
        whole = {"weight": master.detach(), **self._moments_of(master)}
        return {name: value.narrow(0, start, length) for name, value in whole.items()}

    def _moments_of(self, master: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[cast(nn.Parameter, master)]
        return {name: state[name] for name in MOMENTS}
