"""Every pipeline schedule trains as one process of plain torch does (helpers/parity.py)."""

from itertools import product
from pathlib import Path

import pytest
from parity import check_parity


@pytest.mark.parametrize(
    "layout",
    [pytest.param((1, 2, 1), marks=pytest.mark.full), (1, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.full)],
    ids=lambda layout: "x".join(map(str, layout)),
)
def test_gpipe_trains_like_one_process(run_file: Path, corpus: Path, layout: tuple[int, int, int]) -> None:
    check_parity(run_file, corpus, layout, "parallel.schedule=gpipe", tied=True)


SCHEDULES = {
    "interleaved": ("parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"),
    "zb_h1": ("parallel.schedule=zb_h1",),
    "zb_v": ("parallel.schedule=zb_v", "parallel.virtual_stages=2"),
}


QUICK_SCHEDULES = {("interleaved", True, 3), ("zb_h1", True, 1), ("zb_v", True, 2), ("zb_v", True, 3)}


@pytest.mark.parametrize(
    ("schedule", "tied", "stage"),
    [
        pytest.param(*case, marks=() if case in QUICK_SCHEDULES else pytest.mark.full)
        for case in product(SCHEDULES, (True, False), (0, 1, 2, 3))
    ],
)
def test_every_schedule_trains_like_one_process(
    run_file: Path, corpus: Path, schedule: str, tied: bool, stage: int
) -> None:
    zero = f"deepspeed.zero_optimization.stage={stage}"
    check_parity(run_file, corpus, (1, 2, 1), zero, *SCHEDULES[schedule], tied=tied)


def test_a_schedule_composes_with_tensor_parallelism(run_file: Path, corpus: Path) -> None:
    check_parity(run_file, corpus, (2, 2, 1), "deepspeed.zero_optimization.stage=2", *SCHEDULES["zb_h1"], tied=True)


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_composes_with_tensor_and_data_parallelism(
    run_file: Path, corpus: Path, schedule: tuple[str, ...]
) -> None:
    check_parity(run_file, corpus, (2, 2, 2), "deepspeed.zero_optimization.stage=3", *schedule, tied=True)


def test_uneven_stages_train_like_one_process(run_file: Path, corpus: Path) -> None:
    check_parity(run_file, corpus, (1, 2, 1), "parallel.stage_layers=[3, 1]", tied=True)
