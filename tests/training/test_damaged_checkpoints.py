"""Saves that are killed, fail or are damaged: the run goes on from a whole checkpoint, or says why it cannot."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from harness import RankError, run_distributed
from resuming import BF16, KEPT, PAIR, SMALL, assert_holds, assert_same_run, at, run, tensors, trained
from training import build_trainer

from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.retention import retained_steps
from megalite.checkpoint.store import Part
from megalite.zero.optimizer_state import ZeroState

if TYPE_CHECKING:
    pass


POINTS = ["begun", "written", "recorded", "described", "published", "latest", "pruned"]


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sync", "async"])
@pytest.mark.parametrize(
    "point",
    [
        *(pytest.param(point, marks=() if point in ("written", "published") else pytest.mark.full) for point in POINTS),
        "written on the other rank",
    ],
)
def test_a_run_killed_in_a_save_goes_on_from_a_whole_checkpoint(
    run_file: Path, tmp_path: Path, point: str, asynchronous: bool
) -> None:
    overrides = [*KEPT, f"checkpoint.async={str(asynchronous).lower()}"]
    folder, rank = tmp_path / "run", int("other" in point)
    with pytest.raises(RankError, match="was killed by signal SIGKILL"):
        run(run_file, folder, PAIR, *overrides, kill=(point.split()[0], 2, rank))
    step, _ = run(run_file, folder, PAIR, *overrides)
    if "other" in point:  # rank 0 may still make a whole of what that rank has written
        assert step in (2, 4)
    else:
        assert step == (4 if point in ("published", "latest", "pruned") else 2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["LATEST", "step_6"]
    run(run_file, tmp_path / "whole", PAIR, *overrides)
    assert_same_run(folder, tmp_path / "whole")


def test_what_cannot_be_removed_ends_no_run(run_file: Path, tmp_path: Path) -> None:
    """An old checkpoint that was moved to another disk, a file of a save's name, LATEST that cannot be written."""
    folder, archive = tmp_path / "run", tmp_path / "archive"
    alone = [*at((1, 1, 1), 1), "checkpoint.every=2"]
    run(run_file, folder, (1, 1, 1), *alone, "train.stop_after=2")
    (folder / "checkpoints/step_2").rename(archive)
    (folder / "checkpoints/step_2").symlink_to(archive)
    (folder / "checkpoints/step_6.tmp").touch()
    (folder / "checkpoints/step_1.tmp").symlink_to("nowhere")
    (folder / "checkpoints/LATEST").unlink()
    (folder / "checkpoints/LATEST").mkdir()
    assert run(run_file, folder, (1, 1, 1), *alone, "checkpoint.keep_last=1")[0] == 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["LATEST", "step_6"]
    assert (archive / "manifest.json").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["checkpoint_bytes"] > 0 for line in lines if "checkpoint_bytes" in line] == [True, True, True]
    latest, link = [line["checkpoint_warning"] for line in lines if "checkpoint_warning" in line]  # each is told once
    assert latest == f"{folder}/checkpoints/LATEST: is not up to date: Is a directory"
    assert link.endswith(f"step_2: it is a link: the link is removed, and {archive} stays")


# -------------------------------------------------------------------------------------------- damaged, or another's


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = [
    (flip, "rank_00001.safetensors", "has another SHA-256"),
    (truncate, "rank_00000.safetensors", "bytes, not"),
    (Path.unlink, "rank_00001.safetensors", "is missing"),
    (flip, "state.json", "has another SHA-256"),
    (truncate, "manifest.json", "the checkpoint is broken"),
    (Path.unlink, "manifest.json", "not a checkpoint"),
]


@pytest.mark.parametrize(("damage", "file", "fault"), DAMAGE)
def test_damage_is_passed_over_by_auto_and_refused_by_path(
    run_file: Path, tmp_path: Path, damage: Callable[[Path], object], file: str, fault: str
) -> None:
    overrides = [*at(PAIR, 1), "checkpoint.every=2", "train.stop_after=4"]
    folder = tmp_path / "run"
    run(run_file, folder, PAIR, *overrides)
    damage(folder / "checkpoints/step_4" / file)
    with pytest.raises(RankError, match=fault) as refused:
        run(run_file, tmp_path / "other", PAIR, *overrides, f"resume={folder}/checkpoints/step_4")
    assert any(f"errors.{kind}: " in str(refused.value) for kind in ("UserError", "CommonError"))
    (folder / "checkpoints/step_9.tmp").mkdir()
    step, notes = run(run_file, folder, PAIR, *overrides)
    assert step == 2
    assert not (folder / "checkpoints/step_9.tmp").exists()
    assert fault in notes[0]
    assert notes[0].startswith("warning: skipped ")
    assert (folder / "earlier/1/checkpoints/step_4").is_dir()
    assert CheckpointReader(folder / "checkpoints/step_4").problems() == []


def test_no_whole_checkpoint_is_no_reason_to_begin_anew(run_file: Path, tmp_path: Path) -> None:
    overrides = [*at((1, 1, 1), 1), "train.stop_after=3"]
    run(run_file, tmp_path / "run", (1, 1, 1), *overrides)
    flip(tmp_path / "run/checkpoints/step_3/rank_00000.safetensors")
    with pytest.raises(RankError, match="no checkpoint is whole; write resume=never to begin anew"):
        run(run_file, tmp_path / "run", (1, 1, 1), *overrides)
    assert run(run_file, tmp_path / "run", (1, 1, 1), *overrides, "resume=never")[0] == 0
    assert (tmp_path / "run/earlier/1/checkpoints/step_3").is_dir()


OTHERS = [
    ("model.hidden_size=128", r"model.hidden_size +128 +64"),
    ("model.num_hidden_layers=3", r"weight/layers.2.mlp.up.weight +176 x 64 +missing"),
    ("model.rope_theta=5.0e5", r"model.rope_theta +500000.0 +10000.0"),
]


@pytest.mark.parametrize(("override", "message"), OTHERS)
def test_another_runs_checkpoint_is_refused(run_file: Path, tmp_path: Path, override: str, message: str) -> None:
    run(run_file, tmp_path / "run", (1, 1, 1), *at((1, 1, 1), 1), "train.stop_after=3")
    with pytest.raises(RankError, match=message):
        run(run_file, tmp_path / "run", (1, 1, 1), *at((1, 1, 1), 1), override)
    assert (tmp_path / "run/checkpoints/step_3").is_dir()


# ------------------------------------------------------------------------------------------- failures and retention


def fail_on_rank(path: str, overrides: Sequence[str], limit: int) -> list[tuple[int, str | None]]:
    """Run where no file may be longer than `limit`; return what came of each save."""
    import resource

    trainer = build_trainer(path, overrides)
    trainer.step(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in (2, 3):
        trainer.step(step)
        trainer.save(step)
    trainer.checkpointer.wait()
    trainer.close()
    return [(report.step, report.failure) for report in trainer.checkpointer.take_reports()]


def save_slowly_on_rank(path: str, overrides: Sequence[str]) -> None:
    """Save while the copy takes its time and the next step is already on its way."""
    from dataclasses import replace

    from megalite.training import checkpointing

    def slow(part: Part) -> Part:
        def load() -> np.ndarray:
            time.sleep(0.02)
            return part.load()

        return replace(part, load=load)

    plain = checkpointing.parts
    checkpointing.parts = lambda fragments: map(slow, plain(fragments))
    trainer = build_trainer(path, overrides)
    for step in range(1, 4):
        trainer.step(step)
    trainer.save(3)
    trainer.step(4)
    trainer.checkpointer.wait()
    trainer.close()


def test_what_is_saved_in_the_background_is_the_state_at_the_save(run_file: Path, tmp_path: Path) -> None:
    for name in ("false", "true"):
        given = [*SMALL, *at(PAIR, 2), f"run.dir={tmp_path / name}", f"checkpoint.async={name}"]
        run_distributed(save_slowly_on_rank, 2, str(run_file), given)
    assert tensors(tmp_path / "true/checkpoints/step_3") == tensors(tmp_path / "false/checkpoints/step_3")


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_save_that_fails_stops_the_run_or_is_told(run_file: Path, tmp_path: Path, asynchronous: str) -> None:
    given = [*SMALL, *at(PAIR, 1), f"run.dir={tmp_path}", f"checkpoint.async={asynchronous}"]
    with pytest.raises(RankError, match="step_2: not written: rank . on .*: File too large; earlier checkpoints"):
        run_distributed(fail_on_rank, 2, str(run_file), given, 100_000)
    told = run_distributed(fail_on_rank, 2, str(run_file), [*given, "checkpoint.on_error=continue"], 100_000)[0]
    assert [step for step, _ in told] == [2, 3]
    assert all("File too large" in str(failure) for _, failure in told)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def save_on_a_full_disk(path: str, overrides: Sequence[str]) -> None:
    trainer = build_trainer(path, overrides)
    trainer.step(1)
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)  # type: ignore[attr-defined]
    shutil.disk_usage = lambda path: usage
    trainer.save(1)


def test_a_full_disk_is_seen_before_anything_is_written(run_file: Path, tmp_path: Path) -> None:
    given = [*SMALL, *at(PAIR, 1), f"run.dir={tmp_path}"]
    with pytest.raises(RankError, match=r"not written: needs [\d,]+ bytes, and 1,000 are free there; earlier"):
        run_distributed(save_on_a_full_disk, 2, str(run_file), given)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "stay"),
    [(None, None, {10, 20, 30, 40}), (1, None, {40}), (2, 20, {20, 30, 40}), (9, None, {10, 20, 30, 40})],
)
def test_retention(keep_last: int | None, keep_every: int | None, stay: set[int]) -> None:
    assert retained_steps([10, 20, 30, 40], keep_last, keep_every) == stay


def begin_on_rank(path: str, overrides: Sequence[str], checkpoint: str) -> None:
    trainer = build_trainer(path, overrides)
    assert_holds(trainer, Path(checkpoint), ("weight",))
    assert ZeroState(trainer.engine).scalar_state()["updates"] == 0
    trainer.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_master_weights_are_not_rounded_at_the_start(run_file: Path, tmp_path: Path, stage: int) -> None:
    run(run_file, tmp_path / "run", (1, 1, 1), *at((1, 1, 1), 1), "train.stop_after=3")
    checkpoint = str(tmp_path / "run/checkpoints/step_3")
    given = [*SMALL, *at((1, 2, 1), stage), BF16, f"init_from={checkpoint}", f"run.dir={tmp_path / 'tuned'}"]
    run_distributed(begin_on_rank, 2, str(run_file), given, checkpoint)


def test_weights_alone_begin_another_run(run_file: Path, tmp_path: Path) -> None:
    wide = ("model.hidden_size=256", "model.intermediate_size=688")  # a narrow model learns too little in three steps
    run(run_file, tmp_path / "run", (1, 1, 2), *at((1, 1, 2), 1), *wide, "train.stop_after=3")
    start = [*at((2, 1, 1), 1), f"init_from={tmp_path}/run", *wide, "model.rope_theta=2.0e4", "train.stop_after=1"]
    step, notes = run(run_file, tmp_path / "tuned", (2, 1, 1), *start, "checkpoint.every=1")
    assert step == 0
    assert notes[1].startswith("warning: model.rope_theta=20000.0 ")
    assert " 10000.0 " in notes[1]
    fresh = float.fromhex(trained(tmp_path / "run")[0][1])
    assert float.fromhex(trained(tmp_path / "tuned")[0][1]) < fresh - 0.1
    with pytest.raises(RankError, match="holds the weights of another model"):
        run(run_file, tmp_path / "third", (2, 1, 1), *start, "model.vocab_size=400", "resume=never")
    flip(tmp_path / "run/checkpoints/step_3/rank_00000.safetensors")
    with pytest.raises(RankError, match="init_from=.*has another SHA-256.*the checkpoint is damaged, name another"):
        run(run_file, tmp_path / "third", (2, 1, 1), *start, "resume=never")


BROKEN_STATES = [
    (lambda state: state.pop("step"), "state.json: step: Field required"),
    (lambda state: state["optimizer"].update(updates="x"), "state.json: optimizer.updates: "),
    (lambda state: state.update(step=2), "state.json is of step 2, the manifest of step 3"),
]


@pytest.mark.parametrize(("edit", "problem"), BROKEN_STATES)
def test_a_state_that_is_none_is_refused(
    run_file: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], problem: str
) -> None:
    run(run_file, tmp_path / "run", (1, 1, 1), *at((1, 1, 1), 1), "train.stop_after=3")
    folder = tmp_path / "run/checkpoints/step_3"
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    edit(state)
    content = json.dumps(state).encode()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "state.json").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RankError, match=problem):
        run(run_file, tmp_path / "run", (1, 1, 1), *at((1, 1, 1), 1))
