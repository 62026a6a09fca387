"""An evaluation is the mean over its set: every sample once, whatever the batch, the layout and what of them counts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_distributed
from training import build_trainer

from megalite.data.collate import SampleRules
from megalite.data.datasets import open_datasets
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup
from megalite.planning.plan import prepare
from megalite.training.microbatches import to_device

LENGTH, BATCH = 16, 8
SMALL = (
    *("model.vocab_size=256", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
    *("model.intermediate_size=48", f"data.sequence_length={LENGTH}", f"train.global_batch_size={BATCH}"),
    *("train.micro_batch_size=2", "train.eval_every=1", "train.eval_batches=3"),
)
SIZES = {"one": 1, "three": 3, "batch": 8, "more": 11, "masked": 5, "long": 40}
"""Samples of each set; of the last one an evaluation reads three batches."""


@pytest.fixture
def sets(tmp_path: Path) -> str:
    """The override that names the sets."""
    generator, named = np.random.default_rng(3), []
    for name, samples in SIZES.items():
        writer = IndexedDatasetWriter(tmp_path / name, np.uint16, with_loss_mask=name == "masked")
        tokens = generator.integers(0, 256, samples * LENGTH + 1).astype(np.uint16)
        mask = (np.arange(len(tokens)) // 7 % 3 == 0).astype(np.uint8) if name == "masked" else None
        writer.add_documents(tokens, [len(tokens)], loss_mask=mask)
        writer.finalize()
        named.append(f"{{prefix: {tmp_path / name}, name: {name}}}")
    return f"data.valid=[{', '.join(named)}]"


def evaluate(path: str, overrides: Sequence[str]) -> dict[str, float]:
    trainer = build_trainer(path, overrides)
    found = {name: trainer.evaluate(name) for name in SIZES}
    trainer.close()
    return found


def in_one_process(path: Path, overrides: Sequence[str]) -> dict[str, float]:
    """The mean over all targets of a set that count, as one batch of plain torch."""
    config = prepare(path, overrides, 1).config
    model = Stage(config.model, range(config.model.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    model.initialise(config.run.seed)
    found, datasets = {}, open_datasets(config)
    for name, samples in datasets.valid.items():
        assert samples.samples_per_epoch == SIZES[name]
        batch = SampleRules().microbatch(samples, range(min(SIZES[name], 3 * BATCH)))
        weight = None if batch.loss_mask is None else 1 / batch.loss_mask.sum()
        with torch.no_grad():
            microbatch = to_device(batch, torch.device("cpu"), token_weight=weight)
            found[name] = float(model({}, microbatch=microbatch).losses["loss"])
    return found


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ((1, 1, 1), ()),
        ((1, 2, 2), ("deepspeed.zero_optimization.stage=3",)),
        ((1, 1, 1), ("data.order=megatron",)),
        pytest.param((2, 1, 2), ("parallel.sequence_parallel=true",), marks=pytest.mark.full),
        pytest.param((1, 2, 1), ("parallel.schedule=zb_v", "parallel.virtual_stages=2"), marks=pytest.mark.full),
        pytest.param(
            (1, 2, 1), ("parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"), marks=pytest.mark.full
        ),
    ],
    ids=lambda given: str(given).replace(" ", ""),
)
def test_an_evaluation_covers_its_set(
    run_file: Path, sets: str, layout: tuple[int, int, int], more: tuple[str, ...]
) -> None:
    order = [word for word in more if word.startswith("data.")]
    expected = in_one_process(run_file, [*SMALL, sets, *order])
    axes = (f"parallel.{axis}={n}" for axis, n in zip(("tensor", "pipeline", "data"), layout, strict=True))
    ranks = run_distributed(evaluate, int(np.prod(layout)), str(run_file), [*SMALL, sets, *axes, *more])
    for found in ranks:
        assert found == pytest.approx(expected, rel=1e-5)
    if not more:
        lines = open_datasets(prepare(run_file, [*SMALL, sets], 1).config).describe()
        assert "validation: long | 40 samples, of which an evaluation reads 24" in lines
        assert "validation: three | 3 samples" in lines
