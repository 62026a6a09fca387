"""Runs of a small model that are interrupted and resumed, on any layout, and their comparison to the last bit."""

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import run_distributed
from training import NARROW, build_trainer

from megalite.checkpoint.reader import CheckpointReader
from megalite.zero.optimizer_state import ZeroState

if TYPE_CHECKING:
    from megalite.training.trainer import Trainer

Layout = tuple[int, int, int]
BF16, FP16 = "deepspeed.bf16={enabled: true}", "deepspeed.fp16={enabled: true, initial_scale_power: 24, hysteresis: 1}"

PAIR: Layout = (1, 1, 2)

SMALL = (*NARROW, "model.num_hidden_layers=2", "model.vocab_size=300", "train.steps=6", "checkpoint.every=3")


def at(layout: Layout, stage: int) -> list[str]:
    axes = zip(("tensor", "pipeline", "data"), layout, strict=True)
    return [*(f"parallel.{axis}={n}" for axis, n in axes), f"deepspeed.zero_optimization.stage={stage}"]


def size(layout: Layout) -> int:
    return int(np.prod(layout))


class KillAt:
    """Kills this rank with signal 9 where a save passes a point for the `count`th time."""

    def __init__(self, point: str, count: int, rank: int) -> None:
        self.point, self.count, self.rank = point, count, rank

    def __call__(self, point: str) -> None:
        self.count -= point == self.point
        if point == self.point and self.count == 0 and int(os.environ["RANK"]) == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def run_on_rank(path: str, overrides: Sequence[str], kill: tuple[str, int, int] | None = None) -> tuple[int, list[str]]:
    """Run as ``megalite train`` does; return the step that it began after, and what it had to say of that."""
    trainer = build_trainer(path, overrides, KillAt(*kill) if kill else lambda point: None)
    trainer.run()
    trainer.close()
    return trainer.start.step, list(trainer.start.notes)


def run(
    path: Path, folder: Path, layout: Layout, *overrides: str, kill: tuple[str, int, int] | None = None
) -> tuple[int, list[str]]:
    given = [*SMALL, f"run.dir={folder}", *overrides]
    return run_distributed(run_on_rank, size(layout), str(path), given, kill)[0]


def trained(folder: Path) -> list[tuple[int, str, str | None, Any]]:
    """Step, loss, norm and scale of every step in a run's metrics, to the last bit; no norm where it overflowed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in lines if "loss" in m]
    return [(m["step"], m["loss"].hex(), m["grad_norm"] and m["grad_norm"].hex(), m["loss_scale"]) for m in steps]


def tensors(checkpoint: Path) -> dict[str, str]:
    """A digest of the elements of each file of tensors."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}


def assert_same_run(folder: Path, expected: Path) -> None:
    assert trained(folder) == trained(expected)
    assert tensors(folder / "checkpoints/step_6") == tensors(expected / "checkpoints/step_6")
    state, other = ((at / "checkpoints/step_6/state.json").read_text() for at in (folder, expected))
    assert state == other


KEPT = [*at(PAIR, 1), "checkpoint.every=2", "checkpoint.keep_last=1"]


def assert_holds(trainer: "Trainer", checkpoint: Path, kinds: Sequence[str]) -> None:
    """Every element that this rank updates is the checkpoint's, to the last bit."""
    reader = CheckpointReader(checkpoint)
    for fragment in ZeroState(trainer.engine).fragments():
        regions = list(fragment.regions(0, fragment.numel))
        assert regions, f"{fragment.shards[0].spec.name} is nowhere in its global tensor"
        for region, kind in product(regions, kinds):
            saved = np.empty(region.region.shape, np.float32)
            reader.read(f"{kind}/{region.name}", region.region, saved)
            elements = fragment.tensors[kind][region.start : region.start + region.region.numel]
            held = elements.detach().numpy().reshape(region.region.shape)
            assert np.array_equal(held, saved), f"{kind}/{region.name} at {region.region.offset}"
