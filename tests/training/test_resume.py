"""A run that stops and goes on is the run that did not: bit for bit on its layout, within tolerance on any other."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from harness import RankError, run_distributed
from resuming import KEPT, PAIR, SMALL, Layout, assert_same_run, at, run, size, tensors, trained
from training import build_trainer

from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.retention import retained_steps
from megalite.checkpoint.store import Part
from megalite.training.provenance import Provenance
from megalite.zero.optimizer_state import ZeroState

if TYPE_CHECKING:
    from megalite.training.trainer import Trainer

LAYOUTS: list[Layout] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]
BF16, FP16 = "deepspeed.bf16={enabled: true}", "deepspeed.fp16={enabled: true, initial_scale_power: 24, hysteresis: 1}"


STOPPED = [
    ((1, 1, 2), 0, []),
    pytest.param((2, 1, 2), 1, [], marks=pytest.mark.full),
    ((1, 2, 2), 2, []),
    pytest.param((1, 2, 2), 3, [], marks=pytest.mark.full),
    pytest.param((1, 2, 3), 2, ["train.global_batch_size=6"], marks=pytest.mark.full),
    pytest.param((2, 2, 1), 1, [BF16], marks=pytest.mark.full),
    ((1, 1, 2), 2, [BF16, "checkpoint.async=true"]),
    ((1, 2, 1), 3, [BF16]),
    pytest.param((1, 1, 2), 1, [FP16], marks=pytest.mark.full),
    pytest.param((2, 1, 1), 3, [FP16, "checkpoint.async=true"], marks=pytest.mark.full),
    ((1, 2, 1), 2, ["model.num_hidden_layers=4", "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"]),
    ((1, 2, 1), 1, ["model.num_hidden_layers=4", "parallel.schedule=zb_v", "parallel.virtual_stages=2"]),
    ((1, 2, 1), 1, ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.recompute=full"]),
]


@pytest.mark.parametrize(("layout", "stage", "more"), STOPPED, ids=lambda x: str(x).replace(" ", ""))
def test_a_resumed_run_is_the_uninterrupted_one(
    run_file: Path, tmp_path: Path, layout: Layout, stage: int, more: list[str]
) -> None:
    overrides = [*at(layout, stage), *more]
    run(run_file, tmp_path / "whole", layout, *overrides)
    run(run_file, tmp_path / "cut", layout, *overrides, "train.stop_after=3")
    step, notes = run(run_file, tmp_path / "cut", layout, *overrides)
    assert step == 3
    assert any("resumed: " in note for note in notes)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    if FP16 in more:
        scales = [scale for *_, scale in trained(tmp_path / "whole")]
        assert len(set(scales)) > 1, "the loss scale never moved"


def test_deepspeeds_scheduler_goes_on_where_it_was(run_file: Path, tmp_path: Path) -> None:
    warm = "deepspeed.scheduler={type: WarmupDecayLR, params: {warmup_num_steps: 2, total_num_steps: 6, " + (
        "warmup_max_lr: 5.0e-4, warmup_min_lr: 0.0}}"
    )
    overrides = [*at((1, 1, 2), 1), warm, "train.schedule=null"]
    run(run_file, tmp_path / "whole", (1, 1, 2), *overrides)
    run(run_file, tmp_path / "cut", (1, 1, 2), *overrides, "train.stop_after=3")
    assert run(run_file, tmp_path / "cut", (1, 1, 2), *overrides)[0] == 3
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_blend_goes_on_in_mid_epoch(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", f"{other}{suffix}")
    blend = f"data.train=[{{prefix: {corpus}, weight: 3}}, {{prefix: {other}, weight: 1}}]"
    layout, overrides = (1, 1, 2), [*at((1, 1, 2), 2), blend, "data.sequence_length=64"]
    run(run_file, tmp_path / "whole", layout, *overrides)
    run(run_file, tmp_path / "cut", layout, *overrides, "train.stop_after=3")
    assert run(run_file, tmp_path / "cut", layout, *overrides)[0] == 3
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    state = CheckpointReader(tmp_path / "cut/checkpoints/step_6").state
    assert [source["samples"] for source in state["data"]["sources"]] == [18, 6]


# ------------------------------------------------------------------------------------------------- from any layout


def save_on_rank(path: str, overrides: Sequence[str]) -> list[float]:
    """Three steps, a checkpoint, and the loss of the step after it."""
    trainer = build_trainer(path, overrides)
    for step in range(1, 4):
        trainer.step(step)
    trainer.save(3)
    report = trainer.step(4)
    trainer.close()
    return [report.loss, report.outcome.grad_norm]


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


def load_on_rank(path: str, overrides: Sequence[str], folders: Sequence[str]) -> list[list[float]]:
    """For each checkpoint: take it over, find every element of it as it was, and train a step."""
    traces = []
    for folder in folders:
        trainer = build_trainer(path, [*overrides, f"resume={folder}"])
        assert_holds(trainer, Path(folder), ("weight", "exp_avg", "exp_avg_sq"))
        report = trainer.step(4)
        trainer.close()
        traces.append([report.loss, report.outcome.grad_norm])
    return traces


Setup = tuple[Layout, int, *tuple[str, ...]]
"""A layout, a ZeRO stage, and what else is set."""


def exchange(path: Path, tmp_path: Path, saving: list[Setup], loading: list[Setup]) -> None:
    """Save at each of some setups, and load each of these checkpoints at each of others."""
    folders = {}
    for number, (layout, stage, *more) in enumerate(saving):
        folder = tmp_path / f"saved_{number}"
        given = [*SMALL, *at(layout, stage), *more, f"run.dir={folder}"]
        trace = run_distributed(save_on_rank, size(layout), str(path), given)[0]
        folders[str(folder / "checkpoints/step_3")] = trace
    for layout, stage, *more in loading:
        given = [*SMALL, *at(layout, stage), *more, f"run.dir={tmp_path / 'loaded'}"]
        found = run_distributed(load_on_rank, size(layout), str(path), given, list(folders), timeout=280)[0]
        for folder, trace in zip(folders, found, strict=True):
            np.testing.assert_allclose(
                trace, folders[folder], rtol=1e-5, err_msg=f"{folder} at {layout}, {stage}, {more}"
            )


def test_a_checkpoint_of_one_layout_is_taken_over_by_another(run_file: Path, tmp_path: Path) -> None:
    exchange(run_file, tmp_path, [((1, 2, 2), 2), ((2, 1, 1), 3)], [((2, 2, 1), 1), ((1, 1, 2), 3), ((1, 1, 1), 0)])


FOUR = "model.num_hidden_layers=4"
INTERLEAVED = (FOUR, "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2")
V = (FOUR, "parallel.schedule=zb_v", "parallel.virtual_stages=2")


def test_stages_of_any_schedule_are_taken_over_by_any_other(run_file: Path, tmp_path: Path) -> None:
    saving: list[Setup] = [((1, 2, 1), 2, *INTERLEAVED), ((2, 2, 1), 3, *V), ((1, 2, 1), 0, *V)]
    loading: list[Setup] = [((1, 2, 1), 1, *V), ((1, 2, 2), 3, *INTERLEAVED), ((2, 1, 1), 0, FOUR)]
    exchange(run_file, tmp_path, saving, loading)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_takes_over_every_other(run_file: Path, tmp_path: Path, layout: Layout, stage: int) -> None:
    everywhere: list[Setup] = [(layout, stage) for layout in LAYOUTS for stage in (1, 2, 3)]
    exchange(run_file, tmp_path, [(layout, stage)], everywhere)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [BF16]),
        *(pytest.param(*pair, marks=pytest.mark.full) for pair in (([BF16], []), ([BF16], [FP16]))),
        ([FP16], [BF16]),
    ],
)
def test_a_checkpoint_goes_on_in_another_precision(
    run_file: Path, tmp_path: Path, before: list[str], after: list[str]
) -> None:
    run(run_file, tmp_path / "run", (1, 1, 2), *at((1, 1, 2), 2), *before, "train.stop_after=3")
    assert run(run_file, tmp_path / "run", (1, 2, 1), *at((1, 2, 1), 1), *after)[0] == 3
    losses = [float.fromhex(loss) for _, loss, *_ in trained(tmp_path / "run")]
    assert len(losses) == 6
    run(run_file, tmp_path / "fp32", (1, 1, 1), *at((1, 1, 1), 1))
    expected = [float.fromhex(loss) for _, loss, *_ in trained(tmp_path / "fp32")]
    np.testing.assert_allclose(losses, expected, rtol=2e-2)


def test_the_micro_batch_may_change(run_file: Path, tmp_path: Path) -> None:
    run(run_file, tmp_path / "whole", (1, 1, 1), *at((1, 1, 1), 1))
    run(run_file, tmp_path / "cut", (1, 1, 1), *at((1, 1, 1), 1), "train.stop_after=3")
    assert run(run_file, tmp_path / "cut", (1, 1, 1), *at((1, 1, 1), 1), "train.micro_batch_size=2")[0] == 3
    losses, expected = ([float.fromhex(x) for _, x, *_ in trained(tmp_path / name)] for name in ("cut", "whole"))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def samples_of_steps(folder: Path) -> dict[int, list[int]]:
    provenance = Provenance(folder)
    return {step: sorted(seen.sample for seen in provenance.step(step)) for step in range(1, 7)}


RESIZED = [
    # The samples of steps 4, 5 and 6; steps 1 to 3 had four each.
    pytest.param(["train.global_batch_size=8"], [12, 20, 28, 36], "8 sequences a step from step 4 on,", id="larger"),
    pytest.param(["train.global_batch_size=2"], [12, 14, 16, 18], "2 sequences a step from step 4 on,", id="smaller"),
    pytest.param(
        ["train.global_batch_size=8", "train.batch_size_rampup={start: 2, increment: 2, samples: 24}"],
        [12, 16, 22, 28],  # a third of the increments for each 8 samples
        "4 sequences a step from step 4 on, growing to 8, and on from sample 12",
        id="growing",
    ),
]


@pytest.mark.parametrize(("override", "ends", "said"), RESIZED)
def test_a_run_goes_on_with_batches_of_another_size(
    run_file: Path, tmp_path: Path, override: list[str], ends: list[int], said: str
) -> None:
    folder, given = tmp_path / "run", [*at(PAIR, 2), "checkpoint.every=1"]
    run(run_file, folder, PAIR, *given, "train.stop_after=3")
    shutil.copytree(folder, tmp_path / "alone")
    step, notes = run(run_file, folder, PAIR, *given, *override, "train.stop_after=5")
    assert step == 3
    (note,) = [note for note in notes if note.startswith("batches of another size: ")]
    assert said in note
    # A second time nothing changes, and nothing is said.
    step, notes = run(run_file, folder, PAIR, *given, *override)
    assert step == 5
    state = CheckpointReader(folder / "checkpoints/step_6").state
    assert (state["consumed_samples"], state["optimizer"]["updates"]) == (ends[-1], 6)
    expected = {step: list(range(4 * step - 4, 4 * step)) for step in (1, 2, 3)}
    expected |= {step: list(range(*pair)) for step, pair in enumerate(pairwise(ends), 4)}
    assert samples_of_steps(folder) == expected
    run(run_file, tmp_path / "alone", (1, 1, 1), *at((1, 1, 1), 0), "checkpoint.every=1", *override)
    losses, alone = ([float.fromhex(x) for _, x, *_ in trained(one)] for one in (folder, tmp_path / "alone"))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_batches_of_another_size_are_refused_where_the_order_hangs_on_them(run_file: Path, tmp_path: Path) -> None:
    given = [*at((1, 1, 1), 1), "data.order=megatron"]
    run(run_file, tmp_path / "run", (1, 1, 1), *given, "train.stop_after=3")
    with pytest.raises(
        RankError, match=r"data\.order=megatron shuffles as many samples .*keep train\.global_batch_size"
    ):
        run(run_file, tmp_path / "run", (1, 1, 1), *given, "train.global_batch_size=8")


# ------------------------------------------------------------------------------------------------ killed in a save

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
