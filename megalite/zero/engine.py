"""The ZeRO engine (arXiv:1910.02054): gradient reduction, clipping and updates by DeepSpeed, for a rank's stages.

The pipeline executor calls this engine, which calls DeepSpeed. Where DeepSpeed does not do what a pipeline of
tensor-parallel stages needs, a workaround stands beside a comment on DeepSpeed's behaviour (`DeepSpeed:`). A canary in
tests/zero/test_canaries.py fails as soon as DeepSpeed's behaviour has changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megalite.config import RunConfig
from megalite.model.gradients import (
    all_reduce_sequence_parallel_grads,
    all_reduce_tied_gradient,
    average_over_shard_replicas,
    clip_grad_norm,
    propagate_nonfinite,
    trained_parameters,
)
from megalite.model.microbatch import Microbatch
from megalite.model.precision import DTYPES
from megalite.model.stage import TOKEN_TABLE, Stage
from megalite.optim.outcome import StepOutcome
from megalite.optim.parameter_groups import ParameterSettings, optimizer_groups
from megalite.optim.torch_adamw import skip_dynamo_import
from megalite.parallel.mesh import Mesh
from megalite.pipeline.stage_io import StageOutput
from megalite.tensor_parallel.weight_grad_store import WeightGradStore
from megalite.zero.deepspeed_patches import patch_deepspeed, set_deepspeed_log_level
from megalite.zero.grad_norm import is_counted_in_norm, is_tied, mark_counted, mark_counted_in_norm
from megalite.zero.mpu import ModelParallelUnit
from megalite.zero.optimizer_state import ZeroState

skip_dynamo_import()

_STEPS_NEVER_REACHED = 10**12


class _Stages(nn.Module):
    """The stages of one rank as a single module, as DeepSpeed requires; `forward` takes the index of the stage."""

    def __init__(self, stages: Mapping[int, Stage], placeholders: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(index): stage for index, stage in stages.items()})
        self.placeholders = nn.ParameterList(placeholders)

    def forward(self, index: int, inputs: dict[str, Tensor], *, microbatch: Microbatch) -> StageOutput:
        return self.stages[str(index)](inputs, microbatch=microbatch)


class ZeroEngine:
    """Gradient accumulation, reduction over the data axis, clipping and the optimizer, at ZeRO stage 0 to 3.

    One optimizer step is ``with engine.accumulate(): <forwards and backwards>`` and then ``engine.step()``. An
    implementation of `megalite.training.engine.Engine`.
    """

    def __init__(
        self, stages: Mapping[int, Stage], config: RunConfig, mesh: Mesh, settings: Mapping[str, ParameterSettings]
    ) -> None:
        """Build the engine of `stages`; `settings` are those of every parameter of the model, by global name.

        Frozen parameters must not require gradients.
        """
        self.mesh, self.zero_stage = mesh, config.zero_stage
        self._gradient_precision = config.deepspeed.gradient_precision
        self._clip = config.gradient_clipping
        self.stages = dict(stages)
        for stage in stages.values():
            mark_counted_in_norm(stage, mesh)
        set_deepspeed_log_level(config.deepspeed.asks_deepspeed_to_report)
        patch_deepspeed(mesh)
        self._placeholders: list[nn.Parameter] = []
        self.optimizer = self._build_optimizer(config, settings)
        local_elements = sum(parameter.numel() for parameter in self._trained_parameters())
        engine, *_ = deepspeed.initialize(
            model=_Stages(stages, self._placeholders),
            optimizer=self.optimizer,
            config=self._engine_config(config, local_elements),
            mpu=ModelParallelUnit(mesh),
            dist_init_required=False,
        )
        self.engine = cast(DeepSpeedEngine, engine)
        # The pipeline decides when the accumulation is complete, not DeepSpeed's count of backwards.
        self.engine.set_gradient_accumulation_boundary(False)
        if self.zero_stage == 0:
            self.engine.enable_backward_allreduce = False
        if self.zero_stage == 3:
            self._match_norm_all_reduces()
        if self.dtype == torch.float16:
            # DeepSpeed: an overflow at the smallest loss scale raises. `NonFiniteGuard` counts such steps instead.
            self.zero_optimizer.loss_scaler.raise_error_at_min_scale = False
        if self.gradient_dtype != self.dtype:
            self._set_gradient_dtype()
        self._base_rate: float | None = None
        self.state = ZeroState(
            self.engine, self.optimizer, config.optimizer.declaration, self.stages, mesh, self.zero_stage
        )

    def _build_optimizer(self, config: RunConfig, settings: Mapping[str, ParameterSettings]) -> torch.optim.Optimizer:
        """Build the optimizer over this rank's trained parameters, in the groups that all ranks have.

        DeepSpeed: ZeRO drops empty groups and all-reduces the norm once per group, so all ranks hang unless every rank
        has the same number of groups. So an empty group gets a placeholder: a parameter with a gradient of zeros.

        The last few elements of a flat ZeRO partition are computed by other instructions than the rest. A tied table
        whose copies could differ by that is a separate group, which is partitioned at the same elements on both stages.
        """

        def placeholder() -> nn.Parameter:
            parameter = nn.Parameter(torch.zeros(self._placeholder_size, device=self.mesh.device))
            mark_counted(parameter)
            self._placeholders.append(parameter)
            return parameter

        stages = self.stages.values()
        names = {id(p.parameter): p.shards[0].spec.name for stage in stages for p in stage.placed_parameters}
        separate = config.model.tie_word_embeddings and self.mesh.tied_copies_may_differ
        groups = optimizer_groups(
            ((names[id(parameter)], parameter) for parameter in self._trained_parameters()),
            settings,
            separate=TOKEN_TABLE if separate else None,
            placeholder=placeholder,
        )
        return config.optimizer.declaration.build(groups, config.optimizer.hyperparameters, self.mesh.device)

    @property
    def _placeholder_size(self) -> int:
        """The number of elements of a placeholder: some for every rank that ZeRO partitions it over."""
        return 2 * self.mesh.shard.size

    def _trained_parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.stages.values())

    def _set_gradient_dtype(self) -> None:
        """Make autograd and DeepSpeed's reduction accumulate gradients in `gradient_dtype`."""
        for parameter in (*self._trained_parameters(), *self._placeholders):
            parameter.grad_dtype = self.gradient_dtype  # pyright: ignore[reportAttributeAccessIssue]
        if self.zero_stage < 3:
            # DeepSpeed: ZeRO-2 rounds gradients to the parameters' dtype when it copies them into its bucket, even
            # where they are accumulated and reduced in another dtype.
            self.zero_optimizer._gradient_reduction_buffer_dtype = lambda: self.gradient_dtype

    def _match_norm_all_reduces(self) -> None:
        """Add all-reduces of zero to the gradient norm, up to the largest number of sub-groups of any rank.

        DeepSpeed: at stage 3 the norm is all-reduced over the model-parallel ranks once per sub-group of
        ``sub_group_size``, although ranks may have different numbers of sub-groups, and then hang.
        """
        zero, group = self.zero_optimizer, self.mesh.model.process_group
        largest = torch.tensor(len(zero.fp16_groups), device=self.mesh.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        missing, local_norms = int(largest) - len(zero.fp16_groups), zero._get_norm_groups

        def padded_norms() -> list[Tensor]:
            norms: list[Tensor] = local_norms()
            for _ in range(missing):
                squares = torch.zeros((), dtype=norms[0].dtype, device=self.mesh.device)
                dist.all_reduce(squares, group=group)
                norms.append(squares.sqrt().to(norms[0].device))
            return norms

        if missing:
            zero._get_norm_groups = padded_norms

    def _engine_config(self, config: RunConfig, local_elements: int) -> dict[str, Any]:
        settings = config.deepspeed.engine_config(
            micro_batch_size=config.train.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        settings.setdefault("steps_per_print", _STEPS_NEVER_REACHED)
        # DeepSpeed: with CPU offload it requires its own CPUAdam by default, which is compiled at the first use.
        settings["zero_force_ds_cpu_optimizer"] = False
        settings["zero_allow_untested_optimizer"] = True
        zero = settings.setdefault("zero_optimization", {})
        # DeepSpeed: the reduction buffer has the size of the bucket, even if there are fewer gradients, and is
        # allocated again in every step; by default it has 2 GB for a model of any size.
        zero.setdefault("reduce_bucket_size", min(500_000_000, max(1, local_elements)))
        if config.precision != "fp32" and config.deepspeed.gradient_precision == "fp32":
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            # DeepSpeed: gradients are communicated in the parameters' dtype, unless this setting says otherwise.
            settings.setdefault("communication_data_type", "fp32")
            if self.zero_stage == 1:
                # DeepSpeed: with bf16 at stage 1 this selects BF16_Optimizer, which cannot reduce once per step and
                # whose norm is wrong under a pipeline. With one reduction per step, stage 2 is equal to stage 1.
                zero["stage"] = 2
        if self.zero_stage == 0:
            # DeepSpeed: at stage 0 it clips without returning the norm, and applies gradients with a nan norm.
            settings["gradient_clipping"] = 0.0
        return settings

    def local_parameters(self, stage: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield name, weight and gradient of a stage's parameters; at ZeRO-3 the partition of the weight."""
        for placed in self.stages[stage].placed_parameters:
            yield placed.name, getattr(placed.parameter, "ds_tensor", placed.parameter), placed.parameter.grad

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        return next(iter(self.stages.values())).activation_dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Dtype in which gradients are accumulated over microbatches and reduced over ranks."""
        return DTYPES[self._gradient_precision]

    def forward(self, stage: int, inputs: dict[str, Tensor], microbatch: Microbatch) -> StageOutput:
        """Run the forward of one stage on one microbatch; `inputs` are the activations of the previous stage."""
        # DeepSpeed: at stage 3 hooks replace the tensors in a dict of inputs by others, which have no `grad`.
        return self.engine(stage, dict(inputs), microbatch=microbatch)

    def backward(self, stage: int, scalar: Tensor, *, last: bool) -> None:
        """Backpropagate from one microbatch's scalar, times the loss scale.

        The gradients are reduced at the end of `accumulate`, whatever the stage and whether it is its last backward.
        """
        if self.zero_stage > 0:
            # DeepSpeed: ZeRO resets its count of gradient hooks at a forward, not at a backward. In a pipeline several
            # backwards follow a forward.
            self.zero_optimizer.clear_backward_seen_flag()
        # DeepSpeed: the hook of a tensor that a forward returned divides its gradient by the accumulation steps, in
        # spite of `scale_wrt_gas=False`. A view is another tensor.
        scalar = scalar.view_as(scalar)
        # The stages have already divided their losses by the number of microbatches.
        self.engine.backward(scalar, scale_wrt_gas=False)

    def defer_weight_grads(self, stage: int) -> AbstractContextManager[WeightGradStore]:
        """Defer the weight gradients of the stage's backwards inside the context."""
        return self.stages[stage].weight_grad_deferral.enabled()

    def compute_weight_grads(self, stage: int, store: WeightGradStore) -> None:
        """Compute deferred weight gradients and accumulate them."""
        store.run(self.accumulate_gradient)

    def reduce_gradients(self, stage: int) -> bool:
        """Do nothing: DeepSpeed reduces the gradients of all stages at the end of `accumulate`."""
        return False

    def accumulate_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Accumulate `gradient`, of the parameter's unpartitioned shape, for gradients outside of a backward.

        Deferred weight gradients are such (arXiv:2401.10241). The caller must not use the tensor afterwards.
        """
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
            return
        partitioned = parameter.data
        # DeepSpeed: at stage 3 a parameter that is not gathered has no elements, but torch requires that a gradient has
        # the parameter's shape. One expanded element has that shape and takes no memory.
        parameter.data = partitioned.new_empty(1).expand(gradient.shape)
        parameter.grad = gradient.to(self.gradient_dtype)
        parameter.data = partitioned

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate the gradients of one step; at the end all-reduce tied copies and average over ranks."""
        if self.zero_stage == 0:
            yield
            self._complete_gradients()
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
            return
        # DeepSpeed: without this, ZeRO reduces inside a backward. That would partition a tied gradient before the copy
        # on the other stage was added, and would run once per microbatch at stages 2 and 3.
        with self.engine.coalesce_grad_reduction():
            yield
            self._complete_gradients()
        self.engine.set_gradient_accumulation_boundary(True)

    def _complete_gradients(self) -> None:
        """Add what other model-parallel ranks contribute to this rank's gradients, before the data axis is reduced."""
        for parameter in self._placeholders:
            self.accumulate_gradient(parameter, parameter.new_zeros(self._placeholder_size))
        all_reduce_sequence_parallel_grads(self.stages.values(), self.mesh)
        all_reduce_tied_gradient(self.stages.values(), self.mesh)
        propagate_nonfinite(self._gradients(counted=False), self._gradients(counted=True))
        # DeepSpeed has one data-parallel group: it partitions over that group, and averages over no other rank.
        average_over_shard_replicas(self._trained_parameters(), self.mesh)

    def step(self, learning_rate: float | None) -> StepOutcome:
        """Clip the gradients and update; with `learning_rate` None the DeepSpeed JSON's scheduler sets the rate.

        Where any rank has a gradient that is not finite, every rank skips the update: parameters and optimizer state do
        not change, and the gradients are dropped.
        """
        self._base_rate = learning_rate
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
        scale = float(self.zero_optimizer.loss_scale) if self.dtype == torch.float16 else None
        norm, skipped = self._step_at_stage_0() if self.zero_stage == 0 else self._step_of_zero()
        self.engine.set_gradient_accumulation_boundary(False)
        self.state.updates += not skipped
        return StepOutcome(norm, skipped, scale)

    def on_update_progress(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `step` has updated some of the parameters, since a step may take long."""
        self.optimizer.register_step_pre_hook(lambda *_: callback())
        self.optimizer.register_step_post_hook(lambda *_: callback())

    def poison_gradients(self) -> None:
        """Set a gradient to inf, so that every rank skips the update. Call it in `accumulate`, after the backwards."""
        for parameter in self._trained_parameters():
            if parameter.grad is not None:
                parameter.grad.view(-1)[0] = math.inf
                return

    def sync_model_params_from_master(self) -> None:
        """Copy the optimizer's fp32 master weights into the parameters. Collective."""
        if self.zero_stage == 0:
            return
        if self.zero_stage < 3:
            self.zero_optimizer.update_lp_params()
            return
        # DeepSpeed: at stage 3 only step() copies master weights into the parameters, so re-partition and copy here.
        self.zero_optimizer._partition_all_parameters()
        for group in range(len(self.zero_optimizer.fp16_groups)):
            self.zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _step_at_stage_0(self) -> tuple[float, bool]:
        norm = clip_grad_norm(self._gradients(), self._gradients(counted=True), self._clip, self.mesh)
        if math.isfinite(norm):
            self.engine.step()
            return norm, False
        # DeepSpeed: at stage 0 its step would apply gradients that are not finite.
        for stage in self.stages.values():
            stage.zero_grad()
        return norm, True

    def _step_of_zero(self) -> tuple[float, bool]:
        self.engine.step()
        skipped = not self.engine.was_step_applied()
        if skipped and self.zero_stage < 3:
            # DeepSpeed: with CPU offload the averaged gradients of a skipped step are not cleared and would be added to
            # the next step's.
            self.zero_optimizer.averaged_gradients.clear()
        return float(self.engine.get_global_grad_norm() or 0.0), skipped

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer, which wraps the optimizer; at stage 0 the optimizer itself."""
        return self.engine.optimizer

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step, if that has no argument, without the factors of parameter groups.

        DeepSpeed's scheduler changes it at the end of a step, so read it before `step` for the rate that the step
        applies.
        """
        return float(self.optimizer.param_groups[0]["lr"]) if self._base_rate is None else self._base_rate

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the modules."""
        self.engine.destroy()

    def _gradients(self, *, counted: bool | None = None) -> list[Tensor]:
        """Return the gradients of this rank; those that it counts in the norm, or those that it does not.

        A tied copy counts as neither, since it is bit-equal to the table that another stage counts.
        """
        parameters = [p for p in (*self._trained_parameters(), *self._placeholders) if p.grad is not None]
        if counted is not None:
            parameters = [p for p in parameters if is_counted_in_norm(p) == counted and (counted or not is_tied(p))]
        return [p.grad for p in parameters if p.grad is not None]
