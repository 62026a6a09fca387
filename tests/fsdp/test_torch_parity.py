"""Parity of the torch engine: every ZeRO stage at every layout beside one process of plain torch."""

from pathlib import Path

import pytest
from parity import CELLS, check_parity


@pytest.mark.parametrize(("layout", "tied", "stage"), CELLS, ids=lambda x: str(x).replace(" ", ""))
def test_every_layout_and_zero_stage_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    engine = ("parallel.engine=torch", f"deepspeed.zero_optimization.stage={stage}")
    check_parity(run_file, corpus, layout, *engine, tied=tied)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full), 3])
def test_three_data_ranks_train_like_one_process(run_file: Path, corpus: Path, stage: int) -> None:
    """No dimension of the model divides by three: shares are uneven."""
    engine = ("parallel.engine=torch", f"deepspeed.zero_optimization.stage={stage}")
    check_parity(run_file, corpus, (1, 1, 3), *engine, tied=True, model=("train.global_batch_size=6",))


SCHEDULES = {
    "zb_h1, divided": ((2, 2, 1), 2, ["parallel.schedule=zb_h1", "parallel.sequence_parallel=true"]),
    "zb_v, one rank has both ends": ((1, 2, 1), 3, ["parallel.schedule=zb_v", "parallel.virtual_stages=2"]),
    "interleaved, recomputed": (
        (1, 2, 2),
        3,
        ["parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2", "train.recompute=full"],
    ),
    "gpipe": ((1, 2, 2), 1, ["parallel.schedule=gpipe"]),
}


@pytest.mark.parametrize(("layout", "stage", "more"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_schedule_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, more: list[str]
) -> None:
    engine = ("parallel.engine=torch", f"deepspeed.zero_optimization.stage={stage}")
    check_parity(run_file, corpus, layout, *engine, *more, tied=True)
