"""The engine: the gradient's norm and clipping, mixed precision, and what DeepSpeed's scheduler does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from torch import nn
from training import build_trainer, train_rank, zero_engine

from megalite.data.collate import SampleRules
from megalite.data.datasets import open_datasets
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup
from megalite.planning.plan import prepare
from megalite.training.microbatches import to_device

SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=48",
    "data.sequence_length=24",
)


Update = tuple[str, tuple[slice, ...], torch.Tensor]


def norm_and_updates(path: str, overrides: tuple[str, ...]) -> tuple[float, list[Update]]:
    """One step through the engine: the norm it tells, and by how much it moved which slice of which tensor."""
    from megalite.training.build import build_stages

    trainer = build_trainer(path, overrides)
    before = build_stages(trainer.plan, trainer.mesh)
    for stage in before.values():
        stage.initialise(trainer.config.run.seed)
    norm = trainer.step(1).outcome.grad_norm
    updates: list[Update] = []
    for index, stage in trainer.engine.stages.items():
        for after, start in zip(stage.placed_parameters, before[index].placed_parameters, strict=True):
            update = after.parameter.detach() - start.parameter.detach()
            for shard in after.shards:
                updates.append((shard.spec.name, shard.source.slices, update[shard.target.slices].clone()))
    return norm, updates


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)], ids=["2x2x1", "1x2x2"])
def test_norm_and_clipping_are_those_of_torch(run_file: Path, layout: tuple[int, int, int], stage: int) -> None:
    """Against nn.utils.clip_grad_norm_ over the whole model, on replicated, sharded and tied parameters alike."""
    # Without memory and with an epsilon of 1, AdamW moves a weight by -g / (|g| + 1): the clipped gradient shows.
    overrides = (
        *SMALL,
        "train.optimizer={name: adamw, lr: 1.0, betas: [0.0, 0.0], eps: 1.0, weight_decay: 0.0}",
        "train.schedule={name: constant, warmup_steps: 0}",
        "deepspeed.gradient_clipping=0.1",
        f"deepspeed.zero_optimization.stage={stage}",
        *(f"parallel.{axis}={n}" for axis, n in zip(("tensor", "pipeline", "data"), layout, strict=True)),
    )
    ranks = run_distributed(norm_and_updates, layout[0] * layout[1] * layout[2], str(run_file), overrides)

    plan = prepare(run_file, overrides, layout[0] * layout[1] * layout[2])
    model = Stage(plan.config.model, range(4), index=0, num_stages=1, group=TensorGroup())
    model.initialise(plan.config.run.seed)
    batch = SampleRules().microbatch(open_datasets(plan.config).train, range(4))
    model({}, microbatch=to_device(batch, torch.device("cpu"))).losses["loss"].backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    assert norm > 0.2
    gradients = {}
    for placed in model.placed_parameters:
        for shard in placed.shards:
            assert placed.parameter.grad is not None
            gradients[shard.spec.name] = placed.parameter.grad[shard.target.slices]
    for rank_norm, updates in ranks:
        assert abs(rank_norm / norm - 1) < 1e-5
        for name, source, update in updates:
            gradient = gradients[name][source]
            torch.testing.assert_close(update, -gradient / (gradient.abs() + 1.0), rtol=1e-3, atol=1e-7, msg=name)


QUICK_MIXED = [((2, 2, 1), 1), ((1, 2, 2), 2)]
MIXED = [
    pytest.param(layout, stage, precision, marks=() if (layout, stage) in QUICK_MIXED else pytest.mark.full)
    for layout in ((2, 2, 1), (1, 2, 2))
    for stage in (1, 2, 3)
    for precision in ("bf16", "fp16")
]


@pytest.mark.parametrize(("layout", "stage", "precision"), MIXED)
def test_mixed_precision_follows_fp32(run_file: Path, layout: tuple[int, int, int], stage: int, precision: str) -> None:
    settings: dict[str, Any] = {"enabled": True}
    if precision == "fp16":
        settings |= {"initial_scale_power": 8}
    overrides = (
        *SMALL,
        "train.steps=12",
        "train.optimizer.lr=0.01",
        f"deepspeed.zero_optimization.stage={stage}",
        *(f"parallel.{axis}={n}" for axis, n in zip(("tensor", "pipeline", "data"), layout, strict=True)),
    )
    world_size = layout[0] * layout[1] * layout[2]
    exact = run_distributed(train_rank, world_size, str(run_file), overrides)[0]
    halved = run_distributed(
        train_rank, world_size, str(run_file), (*overrides, f"deepspeed.{precision}={settings}".replace("'", ""))
    )
    assert all(rank == halved[0] for rank in halved), "ranks disagree on a loss or norm"
    for loss, expected in zip(halved[0][0], exact[0], strict=True):
        assert abs(loss / expected - 1) < 0.02
    assert halved[0][0][-1] < halved[0][0][0] - 0.2
    assert halved[0][0] != exact[0], "nothing was computed in half precision"


def overflowing(path: str, overrides: tuple[str, ...]) -> list[tuple[bool, float | None]]:
    trainer = build_trainer(path, overrides)
    outcomes = [trainer.step(step).outcome for step in range(1, 13)]
    return [(outcome.skipped, outcome.loss_scale) for outcome in outcomes]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_skips_the_step_on_every_rank_and_lowers_the_scale(run_file: Path, stage: int) -> None:
    overrides = (
        *SMALL,
        "train.steps=12",
        "parallel.pipeline=2",
        f"deepspeed.zero_optimization.stage={stage}",
        "deepspeed.fp16={enabled: true, initial_scale_power: 24, hysteresis: 1}",
    )
    ranks = run_distributed(overflowing, 2, str(run_file), overrides)
    assert ranks[0] == ranks[1]
    skipped = [skip for skip, _ in ranks[0]]
    assert skipped[0], "a scale of 2^24 overflows"
    assert not skipped[-1], "the scale came down until steps were taken"
    scales = [scale for _, scale in ranks[0]]
    assert scales[0] == 2.0**24
    assert scales[-1] is not None
    assert scales[-1] < 2.0**24


def rates(path: str, overrides: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """The rates that steps report, and those that their updates were applied with."""
    trainer, applied = build_trainer(path, overrides), []
    optimizer = zero_engine(trainer).optimizer
    optimizer.register_step_pre_hook(lambda *_: applied.append(float(optimizer.param_groups[0]["lr"])))
    reported = [trainer.step(step).learning_rate for step in range(1, 6)]
    return reported, applied[:: len(applied) // 5]


DECAY = "{type: WarmupDecayLR, params: {warmup_num_steps: 2, total_num_steps: 4, warmup_max_lr: 0.001, "
SCHEDULERS = {
    "warmup": "{type: WarmupLR, params: {warmup_min_lr: 0.0, warmup_max_lr: 0.001, warmup_num_steps: 4, "
    "warmup_type: linear}}",
    "decay": DECAY + "warmup_min_lr: 0.0, warmup_type: linear}}",
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # DeepSpeed's scheduler counts from the end of the first step: two steps have its first rate.
        (f"deepspeed.scheduler={SCHEDULERS['warmup']}", [0.0, 0.0, 0.00025, 0.0005, 0.00075]),
        (f"deepspeed.scheduler={SCHEDULERS['decay']}", [0.0, 0.0, 0.0005, 0.001, 0.0005]),
        ("train.optimizer.lr=0.001", None),
    ],
    ids=["warmup", "decay", "our own"],
)
@pytest.mark.parametrize("stage", [0, 1])
def test_the_rate_of_a_step_is_the_one_that_it_applied(
    run_file: Path, schedule: str, expected: list[float] | None, stage: int
) -> None:
    ours = () if expected is None else ("train.schedule=null",)
    given = (*SMALL, *ours, schedule, f"deepspeed.zero_optimization.stage={stage}")
    reported, applied = run_distributed(rates, 1, str(run_file), given)[0]
    assert reported == applied
    assert len(set(reported)) > 2
    if expected is not None:
        assert reported == pytest.approx(expected, abs=1e-9)
