"""A step whose gradient is not finite is skipped by every rank, whoever has it; too many in a row end the run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import RankError, run_distributed
from torch import Tensor, nn
from training import after_the_backwards, build_trainer, zero_engine

if TYPE_CHECKING:
    from megalite.training.trainer import Trainer

SMALL = (
    "model.vocab_size=256",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=48",
    "data.sequence_length=16",
    "data.prefetch=0",
    "train.steps=40",
)
SWITCHES = {
    "fp32": (),
    "bf16": ("deepspeed.bf16={enabled: true}",),
    "fp16": ("deepspeed.fp16={enabled: true, initial_scale_power: 10, hysteresis: 1}",),
}
OFFLOAD = ("deepspeed.zero_optimization.offload_optimizer={device: cpu}",)


def layout_of(tensor: int, pipeline: int, data: int) -> tuple[str, ...]:
    return (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}")


def state_of(trainer: "Trainer") -> list[Tensor]:
    fragments = trainer.engine.state.fragments()
    return [tensor.clone() for fragment in fragments for tensor in fragment.tensors.values()]


def strike_every_rank(path: str, overrides: tuple[str, ...], world: int) -> list[float]:
    """Between two good steps, one for each rank and each kind of parameter in which only that rank has an inf.

    Returns the loss scales. What is left of it must be what the two good steps alone leave.
    """
    struck: list[tuple[int, int]] = []  # rank, dimensions of the parameter

    def strike() -> None:
        for rank, dimensions in struck:
            if rank == trainer.mesh.rank:
                (stage,) = trainer.engine.stages.values()
                gradients = [p.grad for p in stage.parameters() if p.grad is not None and p.grad.ndim == dimensions]
                gradients[-1].view(-1)[5] = torch.inf

    trainer = build_trainer(path, overrides)
    after_the_backwards(trainer, strike)
    scales = [trainer.step(1).outcome.loss_scale or 1.0]
    good = state_of(trainer)
    positions = [(rank, dimensions) for rank in range(world) for dimensions in (1, 2)]
    for step, position in enumerate(positions, start=2):
        struck[:] = [position]
        outcome = trainer.step(step).outcome
        assert outcome.skipped, f"rank, dimensions = {position}"
        assert not torch.isfinite(torch.tensor(outcome.grad_norm))
        assert all(torch.equal(now, then) for now, then in zip(state_of(trainer), good, strict=True)), position
        assert all(p.grad is None for stage in trainer.engine.stages.values() for p in stage.parameters())
        scales.append(outcome.loss_scale or 1.0)
    struck.clear()
    last = trainer.step(len(positions) + 2)
    assert not last.outcome.skipped
    unharmed = build_trainer(path, overrides)
    unharmed.step(1)
    if trainer.engine.dtype == torch.float16:
        zero_engine(unharmed).zero_optimizer.loss_scaler.cur_scale = last.outcome.loss_scale
    expected = unharmed.step(len(positions) + 2).outcome.grad_norm
    assert abs(last.outcome.grad_norm / expected - 1) < 1e-6
    for now, then in zip(state_of(trainer), state_of(unharmed), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-8)
    return scales


STRIKES = [
    ((2, 2, 1), 0, "fp32", ()),
    ((2, 2, 1), 2, "fp16", ()),
    ((2, 1, 2), 3, "bf16", ()),
    ((1, 2, 2), 1, "bf16", OFFLOAD),
    ((1, 1, 2), 3, "fp16", ()),
]
FULL = [
    (layout, stage, precision, offload)
    for layout in ((2, 2, 1), (1, 2, 2), (2, 1, 2))
    for precision in SWITCHES
    for stage in range(4)
    for offload in ((), OFFLOAD)
    if (layout, stage, precision, offload) not in STRIKES and (stage or not offload) and (stage or precision == "fp32")
]


@pytest.mark.parametrize(
    ("layout", "stage", "precision", "offload"),
    [*STRIKES, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
)
def test_an_inf_on_one_rank_skips_the_step_on_all(
    run_file: Path, layout: tuple[int, int, int], stage: int, precision: str, offload: tuple[str, ...]
) -> None:
    overrides = (*SMALL, *SWITCHES[precision], f"deepspeed.zero_optimization.stage={stage}", *offload)
    world = layout[0] * layout[1] * layout[2]
    ranks = run_distributed(strike_every_rank, world, str(run_file), (*overrides, *layout_of(*layout)), world)
    assert all(scales == ranks[0] for scales in ranks)
    if precision == "fp16":
        assert ranks[0] == [2.0**10, *(2.0 ** (10 - bad) for bad in range(2 * world))]


def run_until_it_ends(path: str, overrides: tuple[str, ...], spoil: str, rank: int) -> None:
    trainer = build_trainer(path, overrides)
    (stage,) = trainer.engine.stages.values()
    if trainer.mesh.rank == rank:
        name, kind = spoil.split(":")
        if kind == "output":
            stage.get_submodule(name).register_forward_hook(SpoilFrom(7))
        elif kind == "parameter":
            parameter: Any = stage.get_parameter(name)
            getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = torch.nan
        else:
            after_the_backwards(trainer, lambda: spoil_gradient(stage, name))
    trainer.run()


class SpoilFrom:
    """A forward hook whose outputs are not finite from the given call on."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * (torch.nan if self.calls >= self.call else 1.0)


def spoil_gradient(stage: nn.Module, name: str) -> None:
    gradient = stage.get_parameter(name).grad
    assert gradient is not None
    gradient.view(-1)[0] = torch.inf


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.full), 1, 3])
@pytest.mark.parametrize(
    ("spoil", "rank", "where", "steps"),
    [
        # The 7th forward is the third of the second step.
        ("layers.1.mlp:output", 2, "the output of layers.1.mlp in stage 1, microbatch 0", 4),
        ("layers.0.attention:output", 1, "the output of layers.0.attention in stage 0, microbatch 0", 4),
        ("layers.0.mlp.down.weight:parameter", 0, "parameter layers.0.mlp.down.weight of stage 0", 3),
        ("layers.1.mlp_norm.weight:gradient", 3, "the gradient of layers.1.mlp_norm.weight of stage 1", 3),
    ],
)
def test_too_many_in_a_row_end_the_run_and_name_the_first_tensor(
    run_file: Path, stage: int, spoil: str, rank: int, where: str, steps: int
) -> None:
    overrides = (*SMALL, *layout_of(2, 2, 1), f"deepspeed.zero_optimization.stage={stage}", "train.max_bad_steps=3")
    with pytest.raises(RankError) as ended:
        run_distributed(run_until_it_ends, 4, str(run_file), overrides, spoil, rank)
    message = str(ended.value)
    assert f"UserError: train.max_bad_steps=3 steps in a row, to step {steps}, had a gradient" in message
    assert f"rank {rank} (tensor {rank % 2}, pipeline {rank // 2}, data 0) was the first" in message
    assert where in message
    lines = (run_file.parent / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [False] * (steps - 3) + [True] * 3


def scales_of_hopeless_steps(path: str, overrides: tuple[str, ...]) -> tuple[list[float | None], str]:
    from megalite.errors import UserError

    trainer = build_trainer(path, overrides)
    (stage,) = trainer.engine.stages.values()
    after_the_backwards(trainer, lambda: spoil_gradient(stage, "final_norm.weight"))
    scales: list[float | None] = []
    for step in range(1, 7):
        outcome = trainer.step(step).outcome
        scales.append(outcome.loss_scale)
        try:
            trainer.nonfinite_guard.update(step, skipped=outcome.skipped, loss_scale=outcome.loss_scale)
        except UserError as error:
            return scales, str(error)
    return scales, ""


@pytest.mark.parametrize("stage", [2, 3])
def test_the_smallest_loss_scale_is_no_end_of_its_own(run_file: Path, stage: int) -> None:
    fp16 = "deepspeed.fp16={enabled: true, initial_scale_power: 2, hysteresis: 1, min_loss_scale: 1}"
    overrides = (*SMALL, fp16, f"deepspeed.zero_optimization.stage={stage}", "train.max_bad_steps=6")
    ((scales, message),) = run_distributed(scales_of_hopeless_steps, 1, str(run_file), overrides)
    assert scales == [4.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert "The loss scale is 1:" in message
