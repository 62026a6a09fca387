"""A loss that jumps: told of, its update dropped, or its samples passed over from an earlier checkpoint on."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from harness import RankError, run_distributed
from torch import Tensor
from training import NARROW, build_trainer

from megalite.config import TrainSection
from megalite.config.sections import SpikeSection
from megalite.data.batch_schedule import BatchSchedule, SkippedSamples
from megalite.model.loss import LOSS
from megalite.planning.provenance import Provenance
from megalite.training.loss_spikes import LossSpikeDetector

if TYPE_CHECKING:
    from megalite.training.trainer import Trainer

SMALL = (
    *NARROW,
    *("model.num_hidden_layers=2", "model.vocab_size=300", "train.steps=6", "checkpoint.every=2", "data.prefetch=2"),
)
WATCH = "train.spike.window=2"


def test_a_jump_is_a_loss_above_the_usual_one() -> None:
    watch = LossSpikeDetector(SpikeSection(factor=2.0, window=3))
    found = [watch.update(loss) for loss in (9.0, 4.0, 4.0, 8.0, 8.1, 8.0)]
    assert [spike is not None for spike in found] == [False, False, False, False, True, False]
    assert found[4] is not None
    assert (found[4].loss, found[4].baseline) == (8.1, 4.0)
    assert watch.losses == [8.0, 8.1, 8.0]


def test_a_watch_goes_on_with_the_losses_that_it_kept() -> None:
    first = LossSpikeDetector(SpikeSection(factor=2.0, window=2))
    first.update(1.0)
    first.update(1.5)
    assert LossSpikeDetector(SpikeSection(factor=2.0, window=2), first.losses).update(3.0) is not None


def test_what_is_no_number_is_no_jump_and_is_not_kept() -> None:
    watch = LossSpikeDetector(SpikeSection(factor=2.0, window=1), [1.0])
    assert watch.update(math.nan) is None
    assert watch.update(math.inf) is None
    assert watch.losses == [1.0]


def test_without_a_rule_nothing_is_a_jump() -> None:
    watch = LossSpikeDetector(None, [1.0])
    assert watch.update(1e9) is None
    assert watch.losses == []


def test_samples_that_are_passed_over_belong_to_no_step() -> None:
    train = TrainSection(steps=6, global_batch_size=4, micro_batch_size=1)
    schedule = BatchSchedule(train, [SkippedSamples(after=2, samples=8), SkippedSamples(after=3, samples=1)])
    assert [schedule.samples(step).start for step in range(1, 6)] == [0, 4, 16, 21, 25]
    assert {len(schedule.samples(step)) for step in range(1, 6)} == {4}
    assert [schedule.position(step) for step in range(5)] == [0, 4, 16, 21, 25]
    assert schedule.consumed(4) == 16


def scale_losses(trainer: "Trainer", factor: Callable[[], int]) -> None:
    """Multiply the loss of each step that the trainer reads by a factor."""
    reduce = trainer.train_losses.reduce

    def scaled(losses: Mapping[str, Tensor], flags: Sequence[float]) -> tuple[dict[str, float], list[float]]:
        means, sums = reduce(losses, flags)
        return {**means, LOSS: means[LOSS] * factor()}, sums

    trainer.train_losses.reduce = scaled  # type: ignore[method-assign]


def jump_at(trainer: "Trainer", *steps: int) -> None:
    """Have the loss of the step that comes `step`th be ten times what it is, for each of `steps`."""
    calls = iter(range(1, 1000))
    scale_losses(trainer, lambda: 10 if next(calls) in steps else 1)


def run_with_a_jump(path: str, overrides: Sequence[str], *jumps: int) -> None:
    trainer = build_trainer(path, overrides)
    jump_at(trainer, *jumps)
    trainer.run()
    trainer.close()


def run_over_a_gap(path: str, overrides: Sequence[str], after: int, samples: int) -> None:
    trainer = build_trainer(path, overrides)
    trainer.schedule = BatchSchedule(trainer.config.train, [SkippedSamples(after, samples)])
    trainer.batches = trainer._prefetch()
    trainer.run()
    trainer.close()


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, str]:
    """The last loss of every step."""
    return {int(line["step"]): float(line["loss"]).hex() for line in lines(folder) if "loss" in line}  # type: ignore


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "checkpoints/step_6").glob("*.safetensors"))]


PRECISIONS = {
    "fp32": [],
    "bf16": ["deepspeed.bf16={enabled: true}"],
    "fp16": ["deepspeed.fp16={enabled: true, initial_scale_power: 8, hysteresis: 1}"],
    "offload": [
        "deepspeed.bf16={enabled: true}",
        "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
    ],
}
ROLLED_BACK = [
    ((1, 2, 1), 1, "bf16"),
    ((1, 1, 2), 3, "fp32"),
    pytest.param((1, 1, 1), 0, "fp32", marks=pytest.mark.full),
    pytest.param((2, 1, 1), 2, "fp16", marks=pytest.mark.full),
    pytest.param((1, 1, 2), 3, "bf16", marks=pytest.mark.full),
    pytest.param((1, 2, 1), 2, "offload", marks=pytest.mark.full),
    pytest.param((1, 1, 2), 3, "offload", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("layout", "stage", "precision"), ROLLED_BACK, ids=lambda x: str(x).replace(" ", ""))
def test_a_run_that_rolls_back_is_one_that_never_saw_the_samples(
    run_file: Path, tmp_path: Path, layout: tuple[int, int, int], stage: int, precision: str
) -> None:
    tensor, pipeline, data = layout
    given = [
        *(*SMALL, *PRECISIONS[precision], f"deepspeed.zero_optimization.stage={stage}"),
        *(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}"),
    ]
    world, back, there = tensor * pipeline * data, tmp_path / "back", tmp_path / "there"
    watch = [WATCH, "train.spike.action=rollback", "checkpoint.async=true", f"run.dir={back}"]
    run_distributed(run_with_a_jump, world, str(run_file), [*given, *watch], 4)
    (event,) = (line for line in lines(back) if "rolled_back_from" in line)
    samples = event["passed_over_samples"]
    assert (event["step"], event["rolled_back_from"]) == (3, 4)
    run_distributed(run_over_a_gap, world, str(run_file), [*given, f"run.dir={there}"], 2, samples)
    assert losses(back) == losses(there)
    assert weights(back) == weights(there)

    told = json.loads((back / "spikes/step_4.json").read_text())
    assert told["action"] == "rollback"
    assert {piece["sample"] for piece in told["pieces"]} == set(range(3 * samples // 2, 2 * samples))  # type: ignore
    seen = [seen.sample for seen in Provenance(back).step(3)]
    assert sorted(seen) == list(range(2 * samples, 5 * samples // 2))  # type: ignore


def test_a_rolled_back_run_goes_on_from_its_checkpoint(run_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = [*SMALL, WATCH, "train.spike.action=rollback"]
    run_distributed(run_with_a_jump, 1, str(run_file), [*given, f"run.dir={whole}"], 3)
    run_distributed(run_with_a_jump, 1, str(run_file), [*given, f"run.dir={cut}", "train.stop_after=4"], 3)
    run_distributed(run_with_a_jump, 1, str(run_file), [*given, f"run.dir={cut}"], 0)
    assert losses(cut) == losses(whole)
    assert weights(cut) == weights(whole)
    state, other = (json.loads((run / "checkpoints/step_6/state.json").read_text()) for run in (cut, whole))
    assert state == other
    assert [gap["after"] for gap in state["passed_over"]] == [2]


def test_what_is_usual_goes_back_with_the_run(run_file: Path, tmp_path: Path) -> None:
    given = [*SMALL, WATCH, "train.spike.factor=2", "train.spike.action=rollback", f"run.dir={tmp_path / 'run'}"]
    run_distributed(run_with_a_jump, 1, str(run_file), given, 4, 5)
    events = [line for line in lines(tmp_path / "run") if "rolled_back_from" in line]
    assert [(event["step"], event["rolled_back_from"]) for event in events] == [(3, 4), (3, 3)]
    batch = len({seen.sample for seen in Provenance(tmp_path / "run").step(1)})
    assert [event["passed_over_samples"] for event in events] == [2 * batch, 3 * batch]
    assert min(seen.sample for seen in Provenance(tmp_path / "run").step(3)) == 5 * batch


def test_the_losses_of_a_checkpoint_are_what_a_resumed_run_holds_its_own_against(
    run_file: Path, tmp_path: Path
) -> None:
    given = [*SMALL, WATCH, "train.spike.action=skip", f"run.dir={tmp_path / 'run'}"]
    run_distributed(run_with_a_jump, 1, str(run_file), [*given, "train.stop_after=2"], 0)
    run_distributed(run_with_a_jump, 1, str(run_file), given, 1)
    assert [line["step"] for line in lines(tmp_path / "run") if line.get("skipped")] == [3]


def forget_everything(path: str, overrides: Sequence[str]) -> float:
    trainer = build_trainer(path, overrides)
    trainer.step(1)
    for fragment in trainer.state.fragments():
        fragment.tensors["weight"].zero_()
    trainer.engine.sync_model_params_from_master()
    loss = trainer.step(2).loss
    trainer.close()
    return loss


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_forward_uses_the_weights_that_were_set(run_file: Path, tmp_path: Path, stage: int) -> None:
    given = [*SMALL, f"run.dir={tmp_path / 'run'}", f"deepspeed.zero_optimization.stage={stage}", "parallel.data=2"]
    found = run_distributed(forget_everything, 2, str(run_file), given)
    assert found == [pytest.approx(math.log(300), rel=1e-6)] * 2


def skip_a_step(path: str, overrides: Sequence[str]) -> None:
    trainer = build_trainer(path, overrides)
    jump_at(trainer, 3)
    trainer.step(1)
    trainer.step(2)

    def state() -> list[torch.Tensor]:
        return [t.clone() for fragment in trainer.state.fragments() for t in fragment.tensors.values()]

    before, numbers = state(), trainer.state.scalar_state()
    report = trainer.step(3)
    assert report.spike is not None
    assert report.outcome.skipped
    assert trainer.state.scalar_state() == numbers, "the loss scale and the count of updates stay"
    assert all(torch.equal(one, other) for one, other in zip(state(), before, strict=True))
    report = trainer.step(4)
    assert not report.outcome.skipped
    assert math.isfinite(report.outcome.grad_norm)
    assert not all(torch.equal(one, other) for one, other in zip(state(), before, strict=True))
    trainer.close()


SKIPPED = [
    ((1, 2, 1), 1, "fp16"),
    ((1, 1, 2), 2, "bf16"),
    pytest.param((2, 1, 1), 3, "fp32", marks=pytest.mark.full),
    pytest.param((1, 1, 1), 0, "fp32", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("layout", "stage", "precision"), SKIPPED, ids=lambda x: str(x).replace(" ", ""))
def test_the_update_of_a_jump_is_dropped(
    run_file: Path, tmp_path: Path, layout: tuple[int, int, int], stage: int, precision: str
) -> None:
    tensor, pipeline, data = layout
    given = [
        *(*SMALL, *PRECISIONS[precision], WATCH, "train.spike.action=skip", f"run.dir={tmp_path / 'run'}"),
        f"deepspeed.zero_optimization.stage={stage}",
        *(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}"),
    ]
    run_distributed(skip_a_step, tensor * pipeline * data, str(run_file), given)


def test_a_warning_changes_nothing(run_file: Path, tmp_path: Path) -> None:
    plain, warned = tmp_path / "plain", tmp_path / "warned"
    run_distributed(run_with_a_jump, 1, str(run_file), [*SMALL, f"run.dir={plain}"], 0)
    run_distributed(run_with_a_jump, 1, str(run_file), [*SMALL, WATCH, f"run.dir={warned}"], 4)
    assert weights(plain) == weights(warned)
    assert (warned / "spikes/step_4.json").is_file()
    assert not (plain / "spikes").exists()


def test_before_the_first_checkpoint_the_update_alone_is_dropped(run_file: Path, tmp_path: Path) -> None:
    given = [*SMALL, WATCH, "checkpoint.every=6", "train.spike.action=rollback", f"run.dir={tmp_path / 'run'}"]
    run_distributed(run_with_a_jump, 1, str(run_file), given, 4)
    assert [line["step"] for line in lines(tmp_path / "run") if line.get("skipped")] == [4]
    assert not any("rolled_back_from" in line for line in lines(tmp_path / "run"))


def jump_always(path: str, overrides: Sequence[str]) -> None:
    trainer = build_trainer(path, overrides)
    calls = iter(range(1000))
    scale_losses(trainer, lambda: 2 ** next(calls))
    trainer.run()


def test_a_run_goes_back_so_often_and_not_more(run_file: Path, tmp_path: Path) -> None:
    rule = "train.spike={window: 2, action: rollback, max_rollbacks: 2}"
    with pytest.raises(RankError, match=r"train\.spike\.max_rollbacks=2 times") as error:
        run_distributed(jump_always, 1, str(run_file), [*SMALL, rule, f"run.dir={tmp_path / 'run'}"])
    assert "train.spike.action=skip" in str(error.value)
    jumps = sorted(path.name for path in (tmp_path / "run/spikes").iterdir())
    assert len(jumps) == 3, "a jump at a step is not to write over one before"


def roll_back_on_a_lagging_disk(path: str, overrides: Sequence[str], lag: str) -> tuple[int | None, str]:
    """Train four steps and go back, where the disk shows rank 1 less than rank 0; return the step and the weights."""
    from megalite.checkpoint import discovery
    from megalite.training import resume

    trainer = build_trainer(path, overrides)
    trainer.run()
    if trainer.mesh.rank == 1:
        listed, digest, looks = discovery.find_checkpoints, resume._manifest_digest, iter(range(1000))
        if lag == "old listing":
            discovery.find_checkpoints = lambda root: listed(root)[1:]
        hidden = {"late": 5, "never": 1000}.get(lag, 0)

        def looking(folder: Path) -> str | None:
            return digest(folder) if folder.name != "step_4" or next(looks) >= hidden else None

        resume._manifest_digest = looking
    back = trainer.roll_back(4, SpikeSection(action="rollback"))
    weights = b"".join(bytes(f.tensors["weight"].numpy()) for f in trainer.state.fragments())
    trainer.close()
    return back, sha256(weights).hexdigest()


@pytest.mark.parametrize(("lag", "step"), [("old listing", 4), ("late", 4), ("never", 2)])
def test_ranks_go_back_to_one_checkpoint_whatever_the_disk_shows_them(
    run_file: Path, tmp_path: Path, lag: str, step: int
) -> None:
    given = [*SMALL, "train.stop_after=4", "parallel.data=2", "train.timeout_seconds=3"]
    given += ["deepspeed.zero_optimization.stage=0", f"run.dir={tmp_path / 'run'}"]
    found = run_distributed(roll_back_on_a_lagging_disk, 2, str(run_file), given, lag)
    assert found[0] == found[1]
    assert found[0][0] == step
