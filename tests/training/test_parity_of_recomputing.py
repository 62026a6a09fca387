"""Dropout and recomputed activations train as one process of plain torch does (helpers/parity.py)."""

from pathlib import Path

import pytest
from parity import check_parity

DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
RECOMPUTED = {
    "kept": (),
    "selective": ("train.recompute=selective",),
    "full": ("train.recompute=full",),
    "full, one in two": ("train.recompute=full", "train.recompute_every=2"),
    "full, divided": ("deepspeed.activation_checkpointing={partition_activations: true, cpu_checkpointing: true}",),
    "full, two at once": ("deepspeed.pipeline={activation_checkpoint_interval: 2}",),
}
QUICK_RECOMPUTED = [
    ((1, 1, 1), 1, "kept"),
    ((2, 1, 1), 0, "full, divided"),
    ((1, 2, 1), 2, "selective"),
    ((1, 1, 2), 3, "full"),
    ((2, 2, 1), 1, "kept"),
    ((1, 2, 2), 3, "full, two at once"),
]


@pytest.mark.parametrize(("layout", "stage", "recompute"), QUICK_RECOMPUTED, ids=lambda x: str(x).replace(" ", ""))
def test_dropout_and_recomputing_train_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, recompute: str
) -> None:
    overrides = (f"deepspeed.zero_optimization.stage={stage}", *RECOMPUTED[recompute])
    check_parity(run_file, corpus, layout, *overrides, tied=True, model=DROPOUT)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize(
    "layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout))
)
def test_every_layout_trains_with_dropout_and_recomputing_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], recompute: str, stage: int
) -> None:
    model = (*DROPOUT, "train.micro_batch_size=1", "data.reset_attention_mask=true", "data.reset_position_ids=true")
    overrides = (f"deepspeed.zero_optimization.stage={stage}", *RECOMPUTED[recompute])
    check_parity(run_file, corpus, layout, *overrides, tied=True, model=model)
