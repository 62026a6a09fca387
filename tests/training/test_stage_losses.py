"""Losses of single layers, such as a router's: every layout trains them like one process of plain torch.

Every block has a penalty on its output, so every stage adds losses of its own, the middle ones included.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from torch import Tensor, nn
from training import NARROW, Trace, build_trainer, resized, train_in_plain_torch

from megalite.model.stage import Stage

WEIGHT = 20.0
SHAPE = (*NARROW, "model.tie_word_embeddings=true", "train.optimizer.lr=2.0e-3", "train.steps=5")
TOLERANCE = 1e-5
LAYOUTS: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {
    "one rank": ((1, 1, 1), ()),
    "tensor 2": ((2, 1, 1), ()),
    "sequence parallel": ((2, 2, 1), ("parallel.sequence_parallel=true",)),
    "sequence parallel, recomputed": ((2, 1, 1), ("parallel.sequence_parallel=true", "train.recompute=full")),
    "pipeline 2, ZeRO-3": ((1, 2, 1), ("deepspeed.zero_optimization.stage=3",)),
    "pipeline 4": ((1, 4, 1), ()),
    "interleaved": ((1, 2, 1), ("parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2")),
    "zb_h1": ((1, 4, 1), ("parallel.schedule=zb_h1",)),
    "data 2, ZeRO-3": ((1, 1, 2), ("deepspeed.zero_optimization.stage=3",)),
    "all axes": ((2, 2, 2), ("train.recompute=full", "deepspeed.zero_optimization.stage=2")),
}


def penalise(stage: Stage) -> Stage:
    """Have every block of a stage return a loss of its own, the mean square of its output."""
    from megalite.tensor_parallel.collectives import reduce_from_group

    def with_penalty(block: nn.Module, inputs: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not stage.group.sequence_parallel:
            return x, {"penalty": WEIGHT * x.square().mean()}
        # The mean over the tokens of all ranks, of which x is a share.
        total = reduce_from_group(x.square().sum(), stage.group)
        return x, {"penalty": WEIGHT * total / (x.numel() * stage.group.size)}

    for block in stage.layers.values():
        block.register_forward_hook(with_penalty)
    return stage


class PlainPenalty:
    """The penalty of the plain model's last forward, by hooks that change nothing; `history` has that of each step."""

    def __init__(self) -> None:
        self.history: list[float] = []
        self.of_blocks: list[Tensor] = []

    def watch(self, model: Stage) -> Callable[[], Tensor]:
        for block in model.layers.values():
            block.register_forward_hook(lambda _block, _inputs, x: self.of_blocks.append(x.square().mean()))
        return self.total

    def total(self) -> Tensor:
        value = WEIGHT * torch.stack(self.of_blocks).sum()
        self.of_blocks.clear()
        self.history.append(float(value.detach()))
        return value


def train_penalised(path: str, overrides: tuple[str, ...]) -> tuple[list[float], list[float], list[float]]:
    """Losses, norms and penalties of each step."""
    from megalite.training import build

    plain: Any = build.Stage
    build.Stage = lambda *arguments, **settings: penalise(plain(*arguments, **settings))  # type: ignore[misc]
    trainer = build_trainer(path, overrides)
    reports = [trainer.step(step) for step in range(1, trainer.config.train.steps + 1)]
    assert all(report.other_losses.keys() == {"penalty"} for report in reports)
    trainer.close()
    penalties = [report.other_losses["penalty"] for report in reports]
    return [report.loss for report in reports], [report.outcome.grad_norm for report in reports], penalties


@pytest.mark.parametrize(("layout", "more"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_losses_of_layers_train_like_one_process(
    run_file: Path, layout: tuple[int, int, int], more: tuple[str, ...]
) -> None:
    tensor, pipeline, data = layout
    resized(run_file, vocab_size=509)
    penalty = PlainPenalty()
    expected = train_in_plain_torch(run_file, SHAPE, penalty.watch)
    axes = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}")
    found = run_distributed(train_penalised, tensor * pipeline * data, str(run_file), (*SHAPE, *axes, *more))
    for losses, norms, of_layers in found:
        Trace(losses, norms).assert_close(expected, TOLERANCE)
        assert of_layers == pytest.approx(penalty.history, rel=TOLERANCE)
    unpenalised = train_in_plain_torch(run_file, SHAPE)
    assert abs(unpenalised.norms[0] / expected.norms[0] - 1) > 100 * TOLERANCE, "the penalty has no effect"


def run_penalised(path: str, overrides: tuple[str, ...]) -> None:
    from megalite.training import build

    plain: Any = build.Stage
    build.Stage = lambda *arguments, **settings: penalise(plain(*arguments, **settings))  # type: ignore[misc]
    trainer = build_trainer(path, overrides)
    trainer.run()
    trainer.close()


def test_metrics_have_a_key_for_each_loss(run_file: Path) -> None:
    given = (*SHAPE, "train.steps=2", "parallel.pipeline=2", "deepspeed.fp16={enabled: true, initial_scale_power: 8}")
    run_distributed(run_penalised, 2, str(run_file), given)
    lines = (run_file.parent / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert len(steps) == 2
    assert all(step["losses.penalty"] > 0 for step in steps)
