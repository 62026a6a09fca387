"""A tied table stands on the first and on the last stage: the two copies stay equal to the last bit.

With three and more data-parallel ranks the order of a sum shows in its last bit, as it does not with two.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import run_distributed
from training import build_trainer, zero_engine

SMALL = (
    *("model.vocab_size=512", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
    *("model.intermediate_size=48", "data.sequence_length=24", "train.global_batch_size=6", "train.steps=8"),
    *("parallel.pipeline=2", "parallel.data=3", "deepspeed.gradient_clipping=0.1"),
)


def copies(path: str, overrides: Sequence[str]) -> tuple[int, list[torch.Tensor]]:
    """Train, and return which share of ZeRO's this rank has, and its copy of the table after each step."""
    trainer = build_trainer(path, overrides)
    (copy,) = [stage.tied_copy for stage in trainer.engine.stages.values() if stage.tied_copy is not None]
    found = []
    for step in range(1, trainer.config.train.steps + 1):
        trainer.step(step)
        held = copy.detach()
        if zero_engine(trainer).zero_stage == 3:  # a rank holds its share, the last one padded
            share: torch.Tensor = copy.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
            held = share[: 512 * 32 - trainer.mesh.shard.rank * share.numel()]
        found.append(held.clone())
    trainer.close()
    return trainer.mesh.shard.rank, found


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.full), 1, pytest.param(2, marks=pytest.mark.full), 3]
)
def test_tied_copies_stay_equal_at_three_data_ranks(run_file: Path, stage: int) -> None:
    ranks = run_distributed(copies, 6, str(run_file), [*SMALL, f"deepspeed.zero_optimization.stage={stage}"])
    for number in range(3):
        first, last = [found for data, found in ranks if data == number]
        assert not torch.equal(first[0], first[-1]), "nothing was trained"
        for step, (one, other) in enumerate(zip(first, last, strict=True), 1):
            assert torch.equal(one, other), f"data {number}: {int((one != other).sum())} elements differ at step {step}"
