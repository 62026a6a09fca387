"""Bytes that a rank holds, against the bytes of tensors that torch and DeepSpeed make for it."""

from pathlib import Path

import pytest
from harness import run_distributed
from training import build_trainer, zero_engine

from megalite.planning.memory_estimate import RankBytes, rank_bytes
from megalite.planning.parameter_count import ParameterCounts
from megalite.planning.plan import prepare

SMALL = ("model.num_hidden_layers=1", "model.vocab_size=512", "train.steps=4", "data.sequence_length=16")


def planned(path: Path, *overrides: str) -> tuple[int, RankBytes]:
    plan = prepare(path, [*SMALL, *overrides], None)
    parameters = ParameterCounts(plan).of_rank(0)
    return parameters, rank_bytes(plan.config, parameters)


@pytest.mark.parametrize("replicas", [1, 3, 4])
@pytest.mark.parametrize(
    ("stage", "precision", "weight", "optimizer"),
    [
        (0, "fp32", 4, None),
        (1, "fp32", 4, 12),
        (2, "fp32", 4, 12),
        (3, "fp32", None, 12),
        (1, "bf16", 2, 12),
        (2, "fp16", 2, 12),
        (3, "bf16", None, 12),
    ],
)
def test_the_bytes_of_each_stage_and_precision(
    run_file: Path, stage: int, precision: str, weight: int | None, optimizer: int | None, replicas: int
) -> None:
    given = [f"deepspeed.zero_optimization.stage={stage}", f"train.precision={precision}"]
    parameters, held = planned(run_file, *given, f"parallel.data={replicas}", f"train.global_batch_size={4 * replicas}")
    share = -(-parameters // replicas)
    width = 4 if precision == "fp32" else 2
    assert held.weights == (weight * parameters if weight else width * share)
    assert held.gradients == 4 * parameters, "whole, in fp32, at every stage"
    assert held.optimizer == (optimizer * share if optimizer else 8 * parameters)
    assert held.reduction == 4 * parameters + (4 * share if stage else 0)
    assert held.total == held.weights + held.gradients + held.reduction + held.optimizer
    assert held.offloaded == 0


def test_what_lies_off_the_device_is_not_counted_on_it(run_file: Path) -> None:
    offload = "{stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}"
    parameters, held = planned(run_file, f"deepspeed.zero_optimization={offload}")
    assert (held.weights, held.optimizer, held.offloaded) == (0, 0, 16 * parameters)


def test_buckets_and_gradients_follow_the_json(run_file: Path) -> None:
    zero = "{stage: 2, reduce_bucket_size: 1000, overlap_comm: true}"
    parameters, held = planned(run_file, f"deepspeed.zero_optimization={zero}")
    assert held.reduction == 2 * 4 * 1000 + 4 * parameters
    half = "deepspeed.data_types.grad_accum_dtype=bf16"
    parameters, held = planned(run_file, "train.precision=bf16", half)
    assert (held.gradients, held.reduction) == (2 * parameters, 4 * parameters)


def held_in_training(path: str, overrides: list[str]) -> dict[str, int]:
    """Bytes of the tensors of one rank, by what they are, after the backwards and the step of one step."""
    trainer = build_trainer(path, overrides)
    engine = zero_engine(trainer)
    gradients = 0

    def count() -> None:
        nonlocal gradients
        kept = [p.grad for s in engine.stages.values() for p in s.parameters() if p.grad is not None]
        gradients = sum(gradient.nbytes for gradient in kept)

    reduce = engine._complete_gradients

    def before_reduction() -> None:
        count()
        reduce()

    engine._complete_gradients = before_reduction  # type: ignore[method-assign]
    trainer.step(1)
    weights = sum(p.data.nbytes for stage in engine.stages.values() for p in stage.parameters())
    moments = sum(
        value.nbytes for state in engine.optimizer.state.values() for value in state.values() if value.ndim > 0
    )
    masters = 0 if engine.zero_stage == 0 else sum(p.nbytes for g in engine.optimizer.param_groups for p in g["params"])
    trainer.close()
    return {"weights": weights, "gradients": gradients, "optimizer": moments + masters}


@pytest.mark.parametrize(("stage", "replicas"), [(0, 1), (1, 1), (2, 2)])
def test_the_plan_counts_the_tensors_that_training_holds(run_file: Path, stage: int, replicas: int) -> None:
    given = [*SMALL, f"deepspeed.zero_optimization.stage={stage}", f"parallel.data={replicas}"]
    _, held = planned(run_file, *given)
    found = run_distributed(held_in_training, replicas, str(run_file), given)[0]
    for name, counted in found.items():
        assert counted == pytest.approx(getattr(held, name), rel=0.001), name
