"""Packed, blended, masked and ramped-up batches train under every layout as in one process of plain torch."""

from pathlib import Path

import numpy as np
import pytest
from harness import run_distributed
from training import FEW_TOKENS, Trace, resized, train_in_plain_torch, train_rank

from megalite.data.indexed.writer import IndexedDatasetWriter

TOLERANCE = 1e-5
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]
PACKED = ("data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true")
RAMPED = ("train.batch_size_rampup={start: 2, increment: 2, samples: 10}", "train.steps=8")


@pytest.fixture
def run_file(run_file: Path) -> Path:
    return resized(run_file, hidden_size=64, intermediate_size=176, vocab_size=FEW_TOKENS)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """A corpus whose every third stretch of tokens counts."""
    writer = IndexedDatasetWriter(tmp_path / "answers", np.uint16, with_loss_mask=True)
    for document in range(60):
        tokens = (document * 13 + np.arange(40)) % 211
        writer.add_documents(tokens.astype(np.uint16), [40], loss_mask=(np.arange(40) // 5 % 3 == 0).astype(np.uint8))
    writer.finalize()
    return tmp_path / "answers"


def check(run_file: Path, layout: tuple[int, int, int], *overrides: str) -> None:
    tensor, pipeline, data = layout
    expected = train_in_plain_torch(run_file, overrides)
    place = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}")
    traces = run_distributed(train_rank, tensor * pipeline * data, str(run_file), (*overrides, *place))
    for losses, norms in traces:
        Trace(losses, norms).assert_close(expected, TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_packed_batches_train_alike(run_file: Path, layout: tuple[int, int, int], architecture: str) -> None:
    gpt2 = ("model.architecture=gpt2", "model.num_key_value_heads=8") if architecture == "gpt2" else ()
    check(run_file, layout, *gpt2, *PACKED, *RAMPED)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
@pytest.mark.parametrize("micro_batch_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_blend_with_a_loss_mask_trains_alike(
    run_file: Path, corpus: Path, answers: Path, layout: tuple[int, int, int], micro_batch_size: int
) -> None:
    """Microbatches count different numbers of targets; the mean is over the targets of the global batch."""
    blend = f"data.train=[{{prefix: {corpus}, weight: 1}}, {{prefix: {answers}, weight: 3}}]"
    check(run_file, layout, blend, *PACKED[2:], f"train.micro_batch_size={micro_batch_size}")


@pytest.mark.parametrize(("layout", "stage"), [((1, 1, 1), 0), ((1, 1, 2), 0), ((1, 2, 1), 0), ((1, 1, 2), 3)])
def test_masked_targets_train_alike_at_every_zero_stage(
    run_file: Path, layout: tuple[int, int, int], stage: int
) -> None:
    """The gradient of a loss that nothing is divided by afterwards, which DeepSpeed would divide for its own count."""
    check(run_file, layout, *PACKED, "train.steps=4", f"deepspeed.zero_optimization.stage={stage}")


def test_three_data_ranks_train_alike(run_file: Path) -> None:
    """The order of a sum over two ranks never shows; a tied table has a sum of its own from three ranks on."""
    check(run_file, (1, 2, 3), *PACKED, "train.global_batch_size=6", "train.steps=4")
