"""Each workaround in megalite/zero answers a behaviour of DeepSpeed; these fail once DeepSpeed no longer behaves so.

A failure here is good news: the workaround named in the test can go.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import nn
from training import build_trainer

DIM = 8


def initialise(
    stage: int, *, optimizer: Callable[..., torch.optim.Optimizer] | None = None, **settings: Any
) -> tuple[Any, nn.Module]:
    """A DeepSpeed engine over two linears, on the ranks of the world as one data axis, without any of our answers."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))
    made = (optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)))(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000} | settings.pop("zero", {}),
        **settings,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config, dist_init_required=False)
    return engine, model


def shared_memory_is_compiled() -> bool:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    asked = []
    ShareMemCommBuilder.load = lambda self, verbose=True: asked.append(self) or self  # type: ignore[method-assign]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = True  # pyright: ignore[reportAttributeAccessIssue]
    build_shm_op()
    return bool(asked)


def test_it_compiles_a_shared_memory_all_reduce_at_every_start() -> None:
    assert run_distributed(shared_memory_is_compiled, 1) == [True]


def compare_numbers_of_other_stages() -> str:
    from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks

    initialise(0)
    try:
        assert_ints_same_as_other_ranks([1, dist.get_rank()])
    except RuntimeError as error:
        return str(error)
    return ""


def test_stage_3_compares_parameter_orders_with_rank_0_of_the_world() -> None:
    assert "isagreement" in run_distributed(compare_numbers_of_other_stages, 2)[1]


def hooks_counted_after_a_backward() -> int:
    engine, _ = initialise(1)
    loss = engine(torch.ones(1, DIM)).sum()
    with engine.coalesce_grad_reduction():
        engine.backward(loss, scale_wrt_gas=False)
    return int(engine.optimizer._backward_hook_state.hooks_fired_this_backward)


def test_hooks_are_counted_from_the_last_forward_on() -> None:
    assert run_distributed(hooks_counted_after_a_backward, 1) == [4]


def gradients_after_a_backward(stage: int) -> bool:
    engine, model = initialise(stage)
    engine.backward(engine(torch.ones(1, DIM)).sum())
    return any(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_backward_cuts_gradients_up_at_once(stage: int) -> None:
    """So tied copies could not be summed: `ZeroEngine.accumulate` coalesces."""
    assert all(run_distributed(gradients_after_a_backward, 2, stage))


def norm_at_stage_0() -> bool:
    engine, _ = initialise(0, gradient_clipping=0.1)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, DIM)).sum())
        engine.step()
    return engine.get_global_grad_norm() is None


def test_stage_0_does_not_tell_the_norm() -> None:
    assert run_distributed(norm_at_stage_0, 1) == [True]


def nan_at_stage_0() -> bool:
    engine, model = initialise(0)
    for _ in range(2):
        engine.backward(engine(torch.full((1, DIM), torch.nan)).sum())
        engine.step()
    return bool(next(model.parameters()).isnan().any())


def test_stage_0_takes_a_gradient_that_is_no_number() -> None:
    assert run_distributed(nan_at_stage_0, 1) == [True]


def half_precision_at_stage_0() -> str:
    engine, _ = initialise(0, bf16={"enabled": True})
    return type(engine.optimizer).__name__


def test_stage_0_keeps_no_fp32_zero_optimizer_in_bf16() -> None:
    """The configuration runs stage 0 in bf16 and fp16 as stage 1, and says so."""
    assert run_distributed(half_precision_at_stage_0, 1) == ["FP16_UnfusedOptimizer"]


def groups_after_an_empty_one() -> int:
    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": list(parameters)}, {"params": []}], lr=1e-3)

    engine, _ = initialise(1, optimizer=two_groups)
    return len(engine.optimizer.bit16_groups)


def test_empty_groups_are_dropped() -> None:
    """So the number of all-reduces of the norm would differ between stages: `make_adamw` leaves none empty."""
    assert run_distributed(groups_after_an_empty_one, 1) == [1]


def bucket_of_a_small_model() -> int:
    engine, _ = initialise(1, zero={"reduce_bucket_size": 500_000_000})
    return int(engine.optimizer.reduce_bucket_size)


def test_the_reduction_buffer_is_as_large_as_the_bucket() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig.model_validate({}).reduce_bucket_size == 500_000_000
    assert run_distributed(bucket_of_a_small_model, 1) == [500_000_000]


def offload_with_torch_adamw() -> str:
    try:
        initialise(2, zero={"offload_optimizer": {"device": "cpu"}})
    except Exception as error:
        return type(error).__name__
    return ""


def test_offload_insists_on_deepspeeds_own_adam() -> None:
    assert run_distributed(offload_with_torch_adamw, 1) == ["ZeRORuntimeException"]


def fp16_without_matrix_units() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(cast(Any, get_accelerator()).is_fp16_supported()) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_fp16_is_refused_where_the_cpu_has_no_units_for_it() -> None:
    assert run_distributed(fp16_without_matrix_units, 1) == [True]


def norm(path: str, marked: bool) -> float:
    from megalite.zero import engine

    if not marked:
        engine.mark_counted_in_norm = lambda stage, mesh: None
        engine.propagate_nonfinite = lambda uncounted, counted: None
    overrides = ["parallel.pipeline=2", "model.tie_word_embeddings=false", "deepspeed.zero_optimization.stage=3"]
    return build_trainer(path, overrides).step(1).outcome.grad_norm


def test_without_marks_stage_3_loses_the_later_stages_from_the_norm(run_file: Path) -> None:
    right, wrong = (run_distributed(norm, 2, str(run_file), marked)[0] for marked in (True, False))
    assert wrong < 0.99 * right


WIDE: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def optimizer_of_wide_gradients(stage: int) -> str:
    engine, _ = initialise(stage, **WIDE)
    return type(engine.optimizer).__name__


def test_gradients_in_fp32_at_stage_1_in_bf16_mean_another_optimizer() -> None:
    """Which cannot coalesce, and whose norm is wrong under a pipeline: `ZeroEngine` runs stage 2 there."""
    assert run_distributed(optimizer_of_wide_gradients, 1, 1) == ["BF16_Optimizer"]
    assert run_distributed(optimizer_of_wide_gradients, 1, 2) == ["DeepSpeedZeroOptimizer"]


def dtypes_on_the_way(stage: int) -> list[torch.dtype]:
    engine, _ = initialise(stage, **WIDE)
    ways = [engine.communication_data_type, *engine.optimizer.ipg_buckets]
    return ways if stage == 3 else [*ways, engine.optimizer._gradient_reduction_buffer_dtype()]


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_in_fp32_travel_in_the_parameters_precision(stage: int) -> None:
    assert set(run_distributed(dtypes_on_the_way, 1, stage)[0]) == {torch.bfloat16}


def bucket_of_wide_gradients() -> torch.dtype:
    engine, _ = initialise(2, communication_data_type="fp32", **WIDE)
    return engine.optimizer._gradient_reduction_buffer_dtype()


def test_stage_2_rounds_gradients_in_its_bucket_even_where_they_travel_in_fp32() -> None:
    assert run_distributed(bucket_of_wide_gradients, 1) == [torch.bfloat16]


def gradient_of_a_parameter_at_rest() -> str:
    # The smallest are never taken apart, unless told so.
    _, model = initialise(3, zero={"stage3_param_persistence_threshold": 0})
    weight = cast(Any, next(model.parameters()))
    try:
        weight.grad = torch.ones(weight.ds_shape)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_parameter_at_rest_at_stage_3_takes_no_gradient_of_its_shape() -> None:
    assert (
        "gradient of size '[8, 8]' to a tensor of size '[0]'" in run_distributed(gradient_of_a_parameter_at_rest, 2)[0]
    )


def gradients_after_an_overflow_under_offload() -> bool:
    engine, _ = initialise(
        2, zero={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False,
        communication_data_type="fp32", **WIDE,
    )  # fmt: skip
    with engine.coalesce_grad_reduction():
        engine.backward(engine(torch.full((1, DIM), torch.nan, dtype=torch.bfloat16)).sum(), scale_wrt_gas=False)
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    assert not engine.was_step_applied()
    return any(group is not None for group in engine.optimizer.averaged_gradients.values())


def test_under_offload_the_gradients_of_a_skipped_step_stay() -> None:
    assert run_distributed(gradients_after_an_overflow_under_offload, 1) == [True]


def overflow_at_the_smallest_loss_scale() -> str:
    from deepspeed.accelerator import get_accelerator

    cast(Any, get_accelerator()).is_fp16_supported = lambda: True
    engine, _ = initialise(2, fp16={"enabled": True, "initial_scale_power": 0, "hysteresis": 1, "min_loss_scale": 1})
    with engine.coalesce_grad_reduction():
        engine.backward(engine(torch.full((1, DIM), torch.nan, dtype=torch.float16)).sum(), scale_wrt_gas=False)
    engine.set_gradient_accumulation_boundary(True)
    try:
        engine.step()
    except Exception as error:
        return str(error)
    return ""


def test_an_overflow_at_the_smallest_loss_scale_raises() -> None:
    assert "already at minimum" in run_distributed(overflow_at_the_smallest_loss_scale, 1)[0]


def gradients_of_an_output_and_of_a_view_of_it() -> tuple[float, float]:
    """The size of a gradient where a forward's own output is differentiated, and where a view of it is."""
    engine, model = initialise(0)
    engine.set_gradient_accumulation_boundary(False)
    sizes = []
    for view in (False, True):
        model.zero_grad()
        engine.module.forward = lambda x: nn.Sequential(*model.children())(x).sum()
        output = engine(torch.ones(1, DIM))
        engine.backward(output.view_as(output) if view else output, scale_wrt_gas=False)
        gradient = next(model.parameters()).grad
        assert gradient is not None
        sizes.append(float(gradient.norm()))
    return sizes[0], sizes[1]


def test_stage_0_divides_the_gradient_of_a_forwards_own_output() -> None:
    own, view = run_distributed(gradients_of_an_output_and_of_a_view_of_it, 1)[0]
    assert own == pytest.approx(view / 2)


def muon_is_compiled_as_it_is_defined() -> bool:
    from deepspeed.runtime.zero.muon import original_muon

    return hasattr(original_muon.muon_update, "_torchdynamo_orig_callable")


def test_an_import_of_muon_imports_torchs_compiler() -> None:
    assert run_distributed(muon_is_compiled_as_it_is_defined, 1) == [True]
