"""The torch engine: what it skips, holds, saves and gives back, on real ranks."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import run_distributed
from resuming import BF16, FP16, Layout, assert_same_run, at, run
from torch import Tensor
from training import TINY_MODEL, build_trainer, train_rank

if TYPE_CHECKING:
    from megalite.training.trainer import Trainer

TORCH, DEEPSPEED = "parallel.engine=torch", "parallel.engine=deepspeed"
SMALL = (*TINY_MODEL, "model.num_hidden_layers=4", "train.steps=8", TORCH)


def state_of(trainer: "Trainer") -> list[Tensor]:
    fragments = trainer.engine.state.fragments()
    return [tensor.clone() for fragment in fragments for tensor in fragment.tensors.values()]


# ---- steps that are skipped


def strike_every_rank(path: str, overrides: tuple[str, ...], world: int) -> tuple[bool, bool]:
    """Between two good steps, give each rank in turn a gradient that is not finite, in a matrix and in a vector.

    Returns whether every such step was skipped on this rank, and whether nothing of them is left.
    """
    trainer = build_trainer(path, overrides)
    trainer.step(1)
    before, skipped = state_of(trainer), []
    for rank in range(world):
        for dimensions in (1, 2):

            def strike(rank: int = rank, dimensions: int = dimensions) -> None:
                gradients: list[Any] = []
                for index, stage in trainer.engine.stages.items():
                    shapes = {placed.name: placed.shape for placed in stage.placed_parameters}
                    parameters = trainer.engine.local_parameters(index)
                    gradients += [g for name, _, g in parameters if g is not None and len(shapes[name]) == dimensions]
                if rank == trainer.mesh.rank:
                    next(gradient for gradient in reversed(gradients) if gradient.numel())[-1] = torch.nan

            outcome = trainer.step(2, before_update=strike).outcome
            skipped.append(outcome.skipped and not math.isfinite(outcome.grad_norm))
    same = all(torch.equal(a, b) for a, b in zip(before, state_of(trainer), strict=True))
    good = not trainer.step(2).outcome.skipped
    trainer.close()
    return all(skipped), same and good


@pytest.mark.parametrize(
    ("layout", "stage", "more"),
    [((2, 1, 2), 0, []), ((1, 2, 2), 1, [BF16]), ((2, 2, 1), 2, [FP16]), ((2, 1, 2), 3, [BF16])],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_every_rank_skips_a_step_with_a_gradient_that_is_not_finite(
    run_file: Path, layout: Layout, stage: int, more: list[str]
) -> None:
    world = math.prod(layout)
    given = (*SMALL, "parallel.sequence_parallel=true", *at(layout, stage), *more)
    assert run_distributed(strike_every_rank, world, str(run_file), given, world) == [(True, True)] * world


def test_the_loss_scale_falls_at_an_overflow_and_rises_again(run_file: Path) -> None:
    scaler = "deepspeed.fp16={enabled: true, initial_scale_power: 30, hysteresis: 1, loss_scale_window: 2}"
    given = (*SMALL, "train.steps=40", *at((1, 2, 1), 2), scaler)
    scales = run_distributed(scales_of, 2, str(run_file), given)
    assert scales[0] == scales[1]
    changes = [after / before for before, after in zip(scales[0], scales[0][1:], strict=False)]
    assert set(changes) == {0.5, 1.0, 2.0}
    assert changes[0] == 0.5


def scales_of(path: str, overrides: tuple[str, ...]) -> list[float]:
    trainer = build_trainer(path, overrides)
    scales = [trainer.step(step).outcome.loss_scale for step in range(1, 41)]
    trainer.close()
    return [scale for scale in scales if scale is not None]


# ---- precision


@pytest.mark.parametrize(
    ("layout", "stage", "precision"),
    [
        ((1, 2, 1), 2, FP16),
        ((2, 1, 2), 3, BF16),
        *(pytest.param((1, 1, 2), 1, precision, marks=pytest.mark.full) for precision in (BF16, FP16)),
    ],
    ids=["2-fp16", "3-bf16", "1-bf16", "1-fp16"],
)
def test_mixed_precision_follows_fp32(run_file: Path, layout: Layout, stage: int, precision: str) -> None:
    given = (*SMALL, *at(layout, stage))
    exact = run_distributed(train_rank, math.prod(layout), str(run_file), given)[0]
    mixed = run_distributed(train_rank, math.prod(layout), str(run_file), (*given, precision))[0]
    assert mixed[0] == pytest.approx(exact[0], rel=4e-3)
    assert mixed[0] != exact[0]


# ---- what a rank holds


def bytes_between_microbatches(path: str, overrides: tuple[str, ...]) -> tuple[int, int]:
    """Return the bytes of weights, gradients and optimizer state after the second microbatch, and the elements."""
    from megalite.fsdp.engine import TorchEngine
    from megalite.fsdp.memory import held_bytes

    trainer = build_trainer(path, overrides)
    engine = trainer.engine
    assert isinstance(engine, TorchEngine)
    trainer.step(1)
    held: list[int] = []
    backward = engine.backward

    def and_count(stage: int, scalar: Tensor, *, last: bool) -> None:
        backward(stage, scalar, last=last)
        held.append(held_bytes(engine).total)

    engine.backward = and_count  # type: ignore[method-assign]
    trainer.step(2)
    elements = sum(stage.num_parameters() for stage in trainer.engine.stages.values())
    trainer.close()
    return held[1], elements


@pytest.mark.parametrize(
    ("stage", "data"),
    [(1, 2), (2, 2), *(pytest.param(stage, 4, marks=pytest.mark.full) for stage in (1, 2)), (3, 2), (3, 4)],
)
def test_a_rank_holds_what_its_zero_stage_leaves_it(run_file: Path, data: int, stage: int) -> None:
    """Bytes per parameter in bf16 between microbatches, within 3 % of the textbook's."""
    wide = ("model.hidden_size=128", "model.intermediate_size=384", "model.vocab_size=512")
    given = (*SMALL, *wide, *at((1, 1, data), stage), BF16, "train.global_batch_size=16")
    textbook = {1: 6 + 12 / data, 2: 2 + 16 / data, 3: 16 / data}[stage]
    for held, elements in run_distributed(bytes_between_microbatches, data, str(run_file), given):
        assert held == pytest.approx(textbook * elements, rel=0.03)


# ---- checkpoints


@pytest.mark.parametrize(
    ("layout", "stage", "more"),
    [
        pytest.param((1, 1, 2), 0, [], marks=pytest.mark.full),
        ((1, 2, 2), 1, [BF16, "checkpoint.async=true"]),
        pytest.param((2, 1, 2), 2, [], marks=pytest.mark.full),
        ((1, 2, 1), 3, [FP16]),
        ((1, 2, 1), 1, ["model.num_hidden_layers=4", "parallel.schedule=zb_v", "parallel.virtual_stages=2"]),
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    run_file: Path, tmp_path: Path, layout: Layout, stage: int, more: list[str]
) -> None:
    overrides = [*at(layout, stage), *more, TORCH]
    run(run_file, tmp_path / "whole", layout, *overrides)
    run(run_file, tmp_path / "cut", layout, *overrides, "train.stop_after=3")
    assert run(run_file, tmp_path / "cut", layout, *overrides)[0] == 3
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((TORCH, (1, 1, 2), 2), (DEEPSPEED, (1, 2, 1), 1)),
        ((DEEPSPEED, (2, 1, 2), 1), (TORCH, (1, 2, 2), 3)),
        ((TORCH, (1, 2, 1), 3), (TORCH, (1, 1, 3), 1)),
    ],
    ids=lambda x: " ".join(map(str, x)).replace("parallel.engine=", ""),
)
def test_a_checkpoint_of_one_engine_is_resumed_by_another(
    run_file: Path, tmp_path: Path, first: tuple[str, Layout, int], then: tuple[str, Layout, int]
) -> None:
    batch = "train.global_batch_size=12"
    for folder, last in (("whole", ""), ("cut", "train.stop_after=3")):
        engine, layout, stage = first
        run(run_file, tmp_path / folder, layout, *at(layout, stage), engine, batch, *([last] if last else []))
    engine, layout, stage = then
    assert run(run_file, tmp_path / "cut", layout, *at(layout, stage), engine, batch)[0] == 3
    for kind in ("loss", "grad_norm"):
        cut, whole = ([step[kind] for step in metrics(tmp_path / folder)] for folder in ("cut", "whole"))
        assert cut == pytest.approx(whole, rel=1e-5)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def largest_difference_of_copies(path: str, overrides: tuple[str, ...]) -> float:
    trainer = build_trainer(path, overrides)
    for step in range(1, 51):
        trainer.step(step)
    (shares,) = [
        [weight for name, weight, _ in trainer.engine.local_parameters(index) if name == stage.tied_copy_name]
        for index, stage in trainer.engine.stages.items()
    ]
    others = [torch.empty_like(shares[0]) for _ in range(2)]
    torch.distributed.all_gather(others, shares[0].detach(), group=trainer.mesh.embedding)
    trainer.close()
    return float((others[0] - others[1]).abs().max())


@pytest.mark.parametrize("stage", [1, 3])
def test_copies_of_a_tied_table_stay_equal_to_the_bit(run_file: Path, stage: int) -> None:
    """Three summands: their order matters."""
    given = (*SMALL, *at((1, 2, 3), stage), "train.global_batch_size=6", "train.steps=50")
    assert run_distributed(largest_difference_of_copies, 6, str(run_file), given) == [0.0] * 6
