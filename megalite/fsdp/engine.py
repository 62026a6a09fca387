"""The torch engine: gradient reduction by fully_shard, clipping, and updates of this rank's shares.

An implementation of `megalite.training.engine.Engine`. `megalite.fsdp.sharded_stage` says what each ZeRO stage divides.
Gradients that more than one rank holds beyond the data axis, of a tied table or under sequence parallelism, are summed
as shares, after the reduction over the data axis.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.config import RunConfig
from megalite.fsdp.loss_scale import LossScale
from megalite.fsdp.sharded_stage import Precision, Shard, ShardedStage
from megalite.fsdp.state import ShardedState
from megalite.model.gradients import all_reduce_as_one, squared_norm
from megalite.model.microbatch import Microbatch
from megalite.model.precision import DTYPES
from megalite.model.stage import Stage
from megalite.optim.outcome import StepOutcome
from megalite.optim.parameter_groups import ParameterSettings, optimizer_groups
from megalite.parallel.mesh import Mesh
from megalite.pipeline.stage_io import StageOutput
from megalite.tensor_parallel.weight_grad_store import WeightGradStore


class TorchEngine:
    """Gradient accumulation, reduction over the data axis, clipping and the optimizer, at ZeRO stage 0 to 3."""

    def __init__(
        self, stages: Mapping[int, Stage], config: RunConfig, mesh: Mesh, settings: Mapping[str, ParameterSettings]
    ) -> None:
        """Divide `stages`, whose parameters are on the meta device; `state.restore_weights` sets the weights.

        `settings` are those of every parameter of the model, by global name. Frozen parameters must not require
        gradients.
        """
        self.mesh, self.stages = mesh, dict(stages)
        precision = Precision(DTYPES[config.precision], DTYPES[config.deepspeed.gradient_precision])
        self._clip, self._precision = config.gradient_clipping, precision
        self._sharded = {
            index: ShardedStage(stage, mesh, config.zero_stage, precision) for index, stage in stages.items()
        }
        self._shards = [(sharded.stage, shard) for sharded in self._sharded.values() for shard in sharded.shards]
        self._trained = [shard for _, shard in self._shards if shard.master.requires_grad]
        self._counted = {id(shard) for stage, shard in self._shards if self._counts(stage, shard, config.zero_stage)}
        self.loss_scale = LossScale(config.deepspeed.document.get("fp16", {})) if config.precision == "fp16" else None
        self.optimizer = self._build_optimizer(config, settings)
        self._deferring: set[int] = set()
        self._poisoned = False
        self._rate = config.optimizer.lr
        self.state = ShardedState(
            self._shards,
            self.optimizer,
            config.optimizer.declaration,
            self.loss_scale,
            mesh,
            divided=config.zero_stage > 0,
        )

    def fsdp_parameters(self) -> Iterator[Any]:
        """Yield torch's record of each parameter (FSDPParam), which knows what of it is gathered."""
        for sharded in self._sharded.values():
            yield from (parameter for group in sharded.groups() for parameter in group.fsdp_params)

    def _build_optimizer(self, config: RunConfig, settings: Mapping[str, ParameterSettings]) -> torch.optim.Optimizer:
        """Build the optimizer over the masters of this rank's shares."""
        groups = optimizer_groups(
            ((shard.placed.shards[0].spec.name, shard.master) for shard in self._trained if shard.master.numel()),
            settings,
            separate=None,
            placeholder=lambda: nn.Parameter(torch.zeros(1, device=self.mesh.device)),
        )
        return config.optimizer.declaration.build(groups, config.optimizer.hyperparameters, self.mesh.device)

    def _counts(self, stage: Stage, shard: Shard, zero_stage: int) -> bool:
        """Return whether this rank counts a share in the gradient norm: each element is counted on one rank."""
        mesh, layout = self.mesh, self.mesh.layout
        divided = {"pipeline", *shard.placed.shards[0].spec.sharding}
        divided |= set(layout.names_of("shard")) if zero_stage > 0 else set()
        is_second_copy = stage.index > 0 and shard.placed.name == stage.tied_copy_name
        return not is_second_copy and mesh.is_first_along(*({*mesh.axes} - divided))

    def local_parameters(self, stage: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield the name, the master weight and the gradient of this rank's shares of a stage's parameters."""
        for shard in self._sharded[stage].shards:
            yield shard.placed.name, shard.master, shard.gradient

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the gathered parameters and of activations."""
        return self._precision.weights

    @property
    def learning_rate(self) -> float:
        """The rate of the last step."""
        return self._rate

    def forward(self, stage: int, inputs: dict[str, Tensor], microbatch: Microbatch) -> StageOutput:
        """Run the forward of one stage on one microbatch; `inputs` are the activations of the previous stage."""
        return self.stages[stage](inputs, microbatch=microbatch)

    def backward(self, stage: int, scalar: Tensor, *, last: bool) -> None:
        """Backpropagate from one microbatch's scalar, times the loss scale."""
        scaled = scalar if self.loss_scale is None else scalar * self.loss_scale.cur_scale
        self._sharded[stage].backward(scaled, last=last, deferred=stage in self._deferring)

    @contextmanager
    def defer_weight_grads(self, stage: int) -> Iterator[WeightGradStore]:
        """Defer the weight gradients of the stage's backwards inside the context."""
        self._deferring.add(stage)
        try:
            with self.stages[stage].weight_grad_deferral.enabled() as store:
                yield store
        finally:
            self._deferring.remove(stage)

    def compute_weight_grads(self, stage: int, store: WeightGradStore) -> None:
        """Compute deferred weight gradients of a stage and accumulate them."""
        sharded = self._sharded[stage]
        store.run(sharded.add)
        sharded.settle()

    def reduce_gradients(self, stage: int) -> bool:
        """Reduce the stage's gradients that its backwards have not reduced; return whether there were any."""
        return self._sharded[stage].reduce()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate the gradients of one step; at the end those of replicas beyond the data axis are summed."""
        yield
        self._sum_over_tensor_ranks()
        self._sum_tied()

    def _sum_over_tensor_ranks(self) -> None:
        """All-reduce the gradients of sequence-parallel parameters over the tensor group: one collective."""
        shards = [shard for stage, shard in self._shards if shard.placed.name in stage.sequence_parallel_names]
        gradients = [shard.gradient for shard in shards if shard.gradient is not None]
        if gradients:
            all_reduce_as_one(gradients, self.mesh.tensor.process_group)

    def _sum_tied(self) -> None:
        """Sum the gradient over the two copies of a tied table: two summands, so both get the same bits."""
        copies = [shard.gradient for stage, shard in self._shards if shard.placed.name == stage.tied_copy_name]
        copies = [gradient for gradient in copies if gradient is not None]
        if len(copies) == 2:  # this rank holds the first and the last stage
            copies[1].copy_(copies[0].add_(copies[1]))
        elif copies:
            assert self.mesh.embedding is not None
            dist.all_reduce(copies[0], group=self.mesh.embedding)

    def poison_gradients(self) -> None:
        """Make the gradient norm of this step infinite, so that every rank skips the update."""
        self._poisoned = True

    def step(self, learning_rate: float | None) -> StepOutcome:
        """Clip the gradients and update; every rank skips the update where any rank has a gradient that is not finite.

        Then weights and optimizer state do not change, and the gradients are dropped.
        """
        assert learning_rate is not None
        self._rate = learning_rate
        scale = 1.0 if self.loss_scale is None else self.loss_scale.cur_scale
        norm = self._grad_norm() / scale
        skipped = not math.isfinite(norm)
        if not skipped:
            self._update(learning_rate, scale, norm)
            self.state.updates += 1
        for shard in self._trained:
            shard.drop_gradient()
        self._poisoned = False
        if self.loss_scale is None:
            return StepOutcome(norm, skipped, None)
        self.loss_scale.update(overflow=skipped)
        return StepOutcome(norm, skipped, scale)

    def _update(self, learning_rate: float, scale: float, norm: float) -> None:
        factor = 1.0 / scale
        if self._clip > 0 and norm + 1e-6 > self._clip:
            factor *= self._clip / (norm + 1e-6)
        gradients = [shard.gradient for shard in self._trained]
        present = [gradient for gradient in gradients if gradient is not None]
        if factor != 1.0 and present:  # a stage may be frozen
            torch._foreach_mul_(present, factor)  # pyright: ignore[reportPrivateImportUsage]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        for shard, gradient in zip(self._trained, gradients, strict=True):
            shard.master.grad = gradient
        self.optimizer.step()
        for shard in self._trained:
            shard.master.grad = None
        self.sync_model_params_from_master()

    def _grad_norm(self) -> float:
        """Return the global norm of the gradients, times the loss scale; inf where any rank has one that is not finite.

        A rank also looks at gradients that another rank counts, since replicas may differ in what is not finite.
        """
        squares = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for shard in self._trained:
            if (gradient := shard.gradient) is None or not gradient.numel():
                continue
            rows = gradient.view(-1, shard.placed.shape[-1]) if len(shard.placed.shape) > 1 else gradient
            squares[0 if id(shard) in self._counted else 1] += squared_norm(rows)
        if self._poisoned:
            squares[1] = math.inf
        # What is not counted is only looked at: its sum counts as 0, and as nan where it is not finite.
        squares[1] *= 0.0
        total = squares.sum()
        dist.all_reduce(total)
        norm = float(total.sqrt())
        return norm if math.isfinite(norm) else math.inf

    def on_update_progress(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `step` has updated some of the parameters, since a step may take long."""
        self.optimizer.register_step_pre_hook(lambda *_: callback())
        self.optimizer.register_step_post_hook(lambda *_: callback())

    def sync_model_params_from_master(self) -> None:
        """Gather the master weights anew at the next forward."""
        for sharded in self._sharded.values():
            sharded.reshard()

    def close(self) -> None:
        """Nothing is left to remove: the stages end with the engine."""
