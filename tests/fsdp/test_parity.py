"""Parity of the torch engine: every ZeRO stage at every layout beside one process of plain torch."""

from pathlib import Path

import pytest
from parity import check_parity

LAYOUTS = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: str(x).replace(" ", ""))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_layout_and_zero_stage_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, tied: bool
) -> None:
    engine = ("parallel.engine=torch", f"deepspeed.zero_optimization.stage={stage}")
    check_parity(run_file, corpus, layout, *engine, tied=tied)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_data_ranks_train_like_one_process(run_file: Path, corpus: Path, stage: int) -> None:
    """No dimension of the model divides by three: shares are uneven."""
    engine = ("parallel.engine=torch", f"deepspeed.zero_optimization.stage={stage}")
    check_parity(run_file, corpus, (1, 1, 3), *engine, tied=True, model=("train.global_batch_size=6",))
