"""A run that stops and goes on is the run that did not: bit for bit on its layout, within tolerance on any other."""

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from harness import RankError, run_distributed
from resuming import BF16, FP16, PAIR, SMALL, Layout, assert_holds, assert_same_run, at, run, size, trained
from training import build_trainer

from megalite.checkpoint.reader import CheckpointReader
from megalite.planning.provenance import Provenance

LAYOUTS: list[Layout] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]


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
    pytest.param(
        (1, 2, 1),
        2,
        ["model.num_hidden_layers=4", "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"],
        marks=pytest.mark.full,
    ),
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
