"""The ZeRO engine (arXiv:1910.02054) on DeepSpeed, over the stages that this rank holds.

DeepSpeed's engine drives one module; the pipeline drives the engine. What DeepSpeed does otherwise than a pipeline
over tensor-parallel stages needs is answered here, each answer beside the behaviour that asks for it (`DeepSpeed:`),
and each has a canary in tests/zero/test_canaries.py that fails once DeepSpeed no longer behaves so.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megalite.config import RunConfig
from megalite.model.dropout import DropoutStreams
from megalite.model.packing import PackedDocuments
from megalite.model.precision import DTYPES
from megalite.model.stage import Stage
from megalite.optim.adamw import make_adamw, params_of
from megalite.optim.outcome import StepOutcome
from megalite.optim.uncompiled import leave_the_compiler_out
from megalite.parallel.mesh import Mesh
from megalite.tensor_parallel.weight_grad_store import WeightGradStore
from megalite.zero.deepspeed_patches import adapt_deepspeed, quieten_deepspeed
from megalite.zero.grad_norm import counts_in_norm, is_tied, mark_for_norm
from megalite.zero.mpu import ModelParallelUnit

leave_the_compiler_out()

NEVER = 10**12


class _Stages(nn.Module):
    """The stages of one rank as the one module that a DeepSpeed engine takes, called with the stage's index."""

    def __init__(self, stages: Mapping[int, Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(index): stage for index, stage in stages.items()})

    def forward(
        self,
        index: int,
        inputs: Tensor,
        targets: Tensor | None,
        packing: PackedDocuments | None,
        loss_weights: Tensor | None,
        dropout: DropoutStreams | None,
    ) -> Tensor:
        stage = self.stages[str(index)]
        return stage(inputs, targets, packing=packing, loss_weights=loss_weights, dropout=dropout)


class ZeroEngine:
    """Gradients, their reduction over the data axis, clipping and AdamW, at ZeRO stage 0 to 3.

    One optimizer step is ``with engine.accumulate(): <forwards and backwards>`` and then ``engine.step()``.
    """

    def __init__(self, stages: Mapping[int, Stage], config: RunConfig, mesh: Mesh) -> None:
        self.mesh, self.zero_stage = mesh, config.zero_stage
        self._gradient_precision = config.deepspeed.gradient_precision
        self._clip = config.gradient_clipping
        self.stages = dict(stages)
        for stage in stages.values():
            mark_for_norm(stage, mesh)
        quieten_deepspeed(config.deepspeed.asks_deepspeed_to_report)
        adapt_deepspeed(mesh)
        apart = config.model.tie_word_embeddings and mesh.tied_copies_may_differ
        self.optimizer = make_adamw(stages, config.optimizer, device=mesh.device, table_apart=apart)
        local_elements = sum(parameter.numel() for parameter in params_of(stages))
        engine, *_ = deepspeed.initialize(
            model=_Stages(stages),
            optimizer=self.optimizer,
            config=self._engine_config(config, local_elements),
            mpu=ModelParallelUnit(mesh),
            dist_init_required=False,
        )
        self.engine = cast(DeepSpeedEngine, engine)
        # The pipeline says when a step is complete; DeepSpeed's own counting of backwards must not.
        self.engine.set_gradient_accumulation_boundary(False)
        if self.zero_stage == 0:
            self.engine.enable_backward_allreduce = False
        if self.zero_stage == 3:
            self._sum_norms_with_every_stage()
        if self.dtype == torch.float16:
            # DeepSpeed: an overflow at the smallest loss scale raises. Bad steps in a row are counted anyway.
            self.zero_optimizer.loss_scaler.raise_error_at_min_scale = False
        if self.gradient_dtype != self.dtype:
            self._widen_gradients()

    def _widen_gradients(self) -> None:
        """Have autograd, and DeepSpeed's reduction after it, add gradients up in `gradient_dtype`."""
        for stage in self.stages.values():
            for parameter in stage.parameters():
                parameter.grad_dtype = self.gradient_dtype  # pyright: ignore[reportAttributeAccessIssue]
        if self.zero_stage < 3:
            # DeepSpeed: ZeRO-2 rounds the gradients to the parameters' precision on their way into its bucket,
            # whatever they are accumulated and reduced in.
            self.zero_optimizer._gradient_reduction_buffer_dtype = lambda: self.gradient_dtype

    def _sum_norms_with_every_stage(self) -> None:
        """Take part in the norm's sums of stages that have more sub-groups of parameters than this rank.

        DeepSpeed: at stage 3 the norm is summed over the stages once for each sub-group of ``sub_group_size``, as if
        all had the same number.
        """
        zero, group = self.zero_optimizer, self.mesh.model.process_group
        most = torch.tensor(len(zero.fp16_groups), device=self.mesh.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        missing, norms_of_own = int(most) - len(zero.fp16_groups), zero._get_norm_groups

        def norms() -> list[Tensor]:
            found: list[Tensor] = norms_of_own()
            for _ in range(missing):
                squares = torch.zeros((), dtype=found[0].dtype, device=self.mesh.device)
                dist.all_reduce(squares, group=group)
                found.append(squares.sqrt().to(found[0].device))
            return found

        if missing:
            zero._get_norm_groups = norms

    def _engine_config(self, config: RunConfig, local_elements: int) -> dict[str, Any]:
        settings = config.deepspeed.engine_config(
            micro_batch_size=config.train.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        settings.setdefault("steps_per_print", NEVER)
        # DeepSpeed: with CPU offload it insists on its own CPUAdam, which is compiled at the first use.
        settings["zero_force_ds_cpu_optimizer"] = False
        settings["zero_allow_untested_optimizer"] = True
        zero = settings.setdefault("zero_optimization", {})
        # DeepSpeed: the buffer that gradients are reduced in is as large as the bucket, not as the gradients, and is
        # allocated anew every step; at the default it is 2 GB for a model of any size.
        zero.setdefault("reduce_bucket_size", min(500_000_000, max(1, local_elements)))
        if config.precision != "fp32" and config.deepspeed.gradient_precision == "fp32":
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            # DeepSpeed: gradients travel in the parameters' precision, unless it is told so beside.
            settings.setdefault("communication_data_type", "fp32")
            if self.zero_stage == 1:
                # DeepSpeed: with bf16 this means BF16_Optimizer at stage 1, which cannot reduce once a step and whose
                # norm is wrong under a pipeline. Where one reduction a step is asked for, stage 2 is stage 1.
                zero["stage"] = 2
        if self.zero_stage == 0:
            # DeepSpeed: at stage 0 it clips without telling the norm, and takes a norm that is no number in silence.
            settings["gradient_clipping"] = 0.0
        return settings

    @property
    def dtype(self) -> torch.dtype:
        """Precision of parameters and activations."""
        return next(iter(self.stages.values())).activation_dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Precision in which the gradients of a step are added up, over microbatches and over ranks."""
        return DTYPES[self._gradient_precision]

    def forward(
        self,
        stage: int,
        inputs: Tensor,
        targets: Tensor | None,
        packing: PackedDocuments | None = None,
        loss_weights: Tensor | None = None,
        dropout: DropoutStreams | None = None,
    ) -> Tensor:
        """Run one stage on one microbatch; hidden states, or the loss on the last stage."""
        return self.engine(stage, inputs, targets, packing, loss_weights, dropout)

    def backward(self, scalar: Tensor) -> None:
        """Differentiate one microbatch's scalar, times the loss scale, into gradients that stay on this rank."""
        if self.zero_stage > 0:
            # DeepSpeed: ZeRO starts its count of gradient hooks anew at a forward, not at a backward; in a pipeline
            # several backwards follow one forward.
            self.zero_optimizer.clear_backward_seen_flag()
        # DeepSpeed: where the very tensor that a forward returned is differentiated, its hook divides the gradient by
        # the accumulation steps, whatever it is told below. A view is another tensor.
        scalar = scalar.view_as(scalar)
        # The last stage has divided by the number of microbatches already.
        self.engine.backward(scalar, scale_wrt_gas=False)

    def defer_weight_grads(self, stage: int) -> AbstractContextManager[WeightGradStore]:
        """While it is open, a backward of the stage puts the products for its weights' gradients off."""
        return self.stages[stage].weight_grad_deferral.enabled()

    def compute_weight_grads(self, store: WeightGradStore) -> None:
        """Compute weight gradients that were put off, and add them to the others."""
        store.run(self.accumulate_gradient)

    def accumulate_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add `gradient`, of the parameter's whole shape on this rank, to what autograd has accumulated for it.

        For gradients that are computed outside of a backward (arXiv:2401.10241). The tensor is taken over.
        """
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
            return
        partitioned = parameter.data
        # DeepSpeed: at stage 3 a parameter that is not in use has no elements, and torch takes a gradient of the
        # parameter's own shape alone; one element, repeated, has that shape and costs nothing.
        parameter.data = partitioned.new_empty(1).expand(gradient.shape)
        parameter.grad = gradient.to(self.gradient_dtype)
        parameter.data = partitioned

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gather the gradients of one step; reduce them once, at the end, over tied copies and the data axis."""
        if self.zero_stage == 0:
            yield
            self._sum_partial_gradients()
            self._reduce_tied_gradient()
            self._spread_what_no_norm_counts()
            self._average_over_shard_replicas()
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
            return
        # DeepSpeed: the reductions that ZeRO starts inside a backward would cut a tied gradient up before the copy on
        # the other stage was added, and run once a microbatch at stages 2 and 3.
        with self.engine.coalesce_grad_reduction():
            yield
            self._sum_partial_gradients()
            self._reduce_tied_gradient()
            self._spread_what_no_norm_counts()
            self._average_over_shard_replicas()
        self.engine.set_gradient_accumulation_boundary(True)

    def step(self, learning_rate: float | None) -> StepOutcome:
        """Clip and apply the gathered gradients; `learning_rate` None leaves it to the JSON's scheduler.

        A step whose gradient is not finite on some rank is skipped on every rank: parameters and moments stay as they
        are, and the gradients are dropped.
        """
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        scale = float(self.zero_optimizer.loss_scale) if self.dtype == torch.float16 else None
        norm, skipped = self._step_at_stage_0() if self.zero_stage == 0 else self._step_of_zero()
        self.engine.set_gradient_accumulation_boundary(False)
        return StepOutcome(norm, skipped, scale)

    def spoil(self) -> None:
        """Have the next `step` skip its update, on every rank. Inside of `accumulate`, after the last backward."""
        witness = next(p.grad for stage in self.stages.values() for p in stage.parameters() if p.grad is not None)
        witness.view(-1)[0] = math.inf

    def publish_weights(self) -> None:
        """Have the parameters be what the optimizer's master weights are, once these were set. Collective."""
        if self.zero_stage == 0:
            return
        if self.zero_stage < 3:
            self.zero_optimizer.update_lp_params()
            return
        # DeepSpeed: at stage 3 its own step is what does this. What it keeps gathered is gathered anew when it is used.
        self.zero_optimizer._partition_all_parameters()
        for group in range(len(self.zero_optimizer.fp16_groups)):
            self.zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _step_at_stage_0(self) -> tuple[float, bool]:
        norm = self._clip_at_stage_0()
        if math.isfinite(norm):
            self.engine.step()
            return norm, False
        # DeepSpeed: at stage 0 it would apply them.
        for stage in self.stages.values():
            stage.zero_grad()
        return norm, True

    def _step_of_zero(self) -> tuple[float, bool]:
        self.engine.step()
        skipped = not self.engine.was_step_applied()
        if skipped and self.zero_stage < 3:
            # DeepSpeed: under CPU offload what it has reduced in fp32 outlives a step that it skips, and is added to.
            self.zero_optimizer.averaged_gradients.clear()
        return float(self.engine.get_global_grad_norm() or 0.0), skipped

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer around AdamW; at stage 0 AdamW itself."""
        return self.engine.optimizer

    @property
    def learning_rate(self) -> float:
        """The rate that the next step applies, where it is given none: after a step of DeepSpeed's scheduler another
        than the step applied."""
        return float(self.optimizer.param_groups[0]["lr"])

    def close(self) -> None:
        """Take DeepSpeed's hooks off the modules."""
        self.engine.destroy()

    def _sum_partial_gradients(self) -> None:
        """Sum what sequence parallelism left in parts: one all-reduce over the tensor group, in fp32."""
        partial = [parameter for stage in self.stages.values() for parameter in stage.partial_parameters()]
        if not partial:
            return
        gradients = [parameter.grad for parameter in partial if parameter.grad is not None]
        assert len(gradients) == len(partial)
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(flat, group=self.mesh.tensor.process_group)
        for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))

    def _reduce_tied_gradient(self) -> None:
        """Sum the gradient over the copies of a tied table, such that the copies stay equal to the last bit.

        The reductions over the data axis that follow are one for each stage, in an order that depends on what else is
        in the bucket: of three summands or more, the last bit does. So with three data ranks the whole sum is taken
        here, in one all-reduce that ends alike on all ranks, and the reductions add zeros to it, which is exact.
        """
        if self.mesh.embedding is None:
            return
        for stage in self.stages.values():
            copy = stage.tied_copy
            if copy is not None:
                assert copy.grad is not None
                dist.all_reduce(copy.grad, group=self.mesh.embedding_replicas or self.mesh.embedding)
                if self.mesh.embedding_replicas is not None and self.mesh.gradient.rank > 0:
                    copy.grad.zero_()

    def _spread_what_no_norm_counts(self) -> None:
        """Make the norm infinite where a gradient is not finite that only another rank's copy stands for in it."""
        held = [(p, p.grad) for stage in self.stages.values() for p in stage.parameters() if p.grad is not None]
        uncounted = [torch.isfinite(gradient).all() for p, gradient in held if not counts_in_norm(p) and not is_tied(p)]
        if uncounted and not bool(torch.stack(uncounted).all()):
            witness = next(gradient for p, gradient in held if counts_in_norm(p))
            witness.view(-1)[0] = math.inf

    def _average_over_shard_replicas(self) -> None:
        """Average the gradients over the ranks that hold the same share of what ZeRO divides.

        DeepSpeed knows one data-parallel group: it divides over it, and averages over no more.
        """
        group = self.mesh.shard_replicas
        if group is None:
            return
        for stage in self.stages.values():
            for parameter in stage.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(group.size), group=group.process_group)

    def _clip_at_stage_0(self) -> float:
        gradients = {parameter: parameter.grad for parameter in params_of(self.stages) if parameter.grad is not None}
        counted = [gradient for parameter, gradient in gradients.items() if counts_in_norm(parameter)]
        square = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for gradient in counted:
            # Row by row, then in double: over millions of elements at once, fp32 on a CPU is off by 1e-4.
            square += torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()
        dist.all_reduce(square, group=self.mesh.model.process_group)
        norm = float(square.sqrt())
        if math.isfinite(norm) and self._clip > 0 and norm + 1e-6 > self._clip:
            scale = self._clip / (norm + 1e-6)
            for gradient in gradients.values():
                gradient.mul_(scale)
        return norm
