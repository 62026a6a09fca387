"""A dataset, a loss and a callback of a plugin: equal on every layout, and after a resume, to one process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import run_distributed
from training import build_trainer

from megalite.config import load_run_config
from megalite.data.datasets import open_datasets
from megalite.data.registered import RegisteredSamples, TokenSample
from megalite.errors import UserError

RUN: dict[str, Any] = {
    "run": {"seed": 3},
    "model": {
        "architecture": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    },
    "data": {
        "sequence_length": 16,
        "train": [{"dataset": "counting", "options": {"stride": 2}}],
        "valid": [{"dataset": "counting"}],
    },
    "parallel": {"data": 1},
    "train": {
        "steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "eval_every": 2,
        "eval_batches": 1,
        "loss": "focal",
        "callbacks": ["writer"],
        "optimizer": {"name": "adamw", "lr": 1.0e-3},
        "cpu_attention": "written_out",
    },
    "checkpoint": {"every": 2},
    "plugins": ["plugin_example"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**RUN, "run": {"dir": str(tmp_path / "run"), "seed": 3}}))
    return run_file


def run_rank(path: str, overrides: list[str]) -> list[str]:
    trainer = build_trainer(path, overrides)
    trainer.run()
    trainer.close()
    return Path(trainer.config.run.dir, f"seen_by_rank_{trainer.mesh.rank}").read_text().splitlines()


def numbers(lines: list[str]) -> list[float]:
    """The losses of steps and evaluations that a callback saw, in their order."""
    return [float.fromhex(line.split()[-1]) for line in lines if line.startswith(("after", "evaluate"))]


@pytest.mark.parametrize("axis", ["data", "pipeline", "tensor"])
def test_two_ranks_see_what_one_process_sees(path: Path, tmp_path: Path, axis: str) -> None:
    (alone,) = run_distributed(run_rank, 1, str(path), [f"run.dir={tmp_path / 'alone'}"])
    both = run_distributed(run_rank, 2, str(path), [f"parallel.{axis}=2"])
    assert len(numbers(alone)) == 6
    for seen in both:
        assert numbers(seen) == pytest.approx(numbers(alone), rel=1e-5)
        assert [line.split()[:2] for line in seen if not line.startswith("checkpoint")] == [
            *(["start", "0"], ["before", "1"], ["after", "1"], ["before", "2"], ["after", "2"], ["evaluate", "2"]),
            *(["before", "3"], ["after", "3"], ["before", "4"], ["after", "4"], ["evaluate", "4"]),
            *(["end", "4"], ["close"]),
        ]
    assert [line for line in both[0] if line.startswith(("checkpoint", "end"))] == [
        *("checkpoint 2", "checkpoint 4", "end 4 True None")
    ]


def test_a_resumed_run_goes_on_in_the_order_of_the_dataset(path: Path, tmp_path: Path) -> None:
    (whole,) = run_distributed(run_rank, 1, str(path), [f"run.dir={tmp_path / 'whole'}"])
    run_distributed(run_rank, 1, str(path), ["train.stop_after=2"])
    (rest,) = run_distributed(run_rank, 1, str(path), [])
    assert rest[0] == "start 2"
    assert [line for line in whole if line.startswith("after")][2:] == [line for line in rest if "after" in line]
    state = json.loads((tmp_path / "run/checkpoints/step_4/state.json").read_text())
    assert state["data"]["sources"] == [{"prefix": "counting", "samples": 16}]


def test_another_loss_trains_another_model(path: Path, tmp_path: Path) -> None:
    (focal,) = run_distributed(run_rank, 1, str(path), ["train.steps=2"])
    plain = [f"run.dir={tmp_path / 'plain'}", "train.steps=2", "train.loss=null"]
    assert numbers(run_distributed(run_rank, 1, str(path), plain)[0])[0] > numbers(focal)[0]


# ------------------------------------------------------------------------------------------------------- the dataset


def samples_of(items: list[Any], length: int = 4, numbers: range | None = None) -> RegisteredSamples:
    return RegisteredSamples(
        items, "mine", sequence_length=length, seed=1, items=range(len(items)) if numbers is None else numbers
    )


def test_every_item_is_a_sample_once_an_epoch_and_padding_does_not_count() -> None:
    items = [np.arange(2 + number % 4) + 10 * number for number in range(7)]
    samples = samples_of(items)
    read = samples.tokens(np.arange(14))
    assert samples.tokens(np.arange(14)).dtype == np.int64
    firsts = read[:, 0] // 10
    assert sorted(firsts[:7]) == sorted(firsts[7:]) == list(range(7))
    assert list(firsts[:7]) != list(firsts[7:])
    masks = samples.loss_mask(np.arange(14))
    for row, mask, number in zip(read, masks, firsts, strict=True):
        size = len(items[number])
        assert list(row) == [*items[number], *[0] * (5 - size)]
        assert list(mask) == [1] * size + [0] * (5 - size)
    assert samples.pieces(0)[0].document == firsts[0]


def test_a_split_takes_its_own_items() -> None:
    samples = samples_of([[number, number] for number in range(10)], numbers=range(6, 10))
    assert sorted(samples.tokens(np.arange(4))[:, 0]) == [6, 7, 8, 9]
    with pytest.raises(UserError, match="dataset 'mine' has no item for this part of data.split; give it a larger"):
        samples_of([[1, 2]], numbers=range(1, 1))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (list(range(6)), r"item 0: has shape \[6\] and type int64; return 2 to 5 token ids, which is data.sequence"),
        ([1], r"item 0: has shape \[1\]"),
        ([0.5, 1.5], r"and type float64"),
        ([[1, 2]], r"has shape \[1, 2\]"),
        (TokenSample([1, 2, 3], [True]), r"item 0: has 3 tokens and a loss mask of shape \[1\]; make them equal"),
    ],
)
def test_an_item_that_is_no_sample_is_named(item: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        samples_of([item]).tokens(np.array([0]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train.0.options={strid: 2}", "dataset 'counting' cannot be opened with options {strid=2}: TypeError: "),
        (
            "data.train=[{dataset: countin}]",
            "data.train.0.dataset='countin' is no registered dataset; did you mean 'co",
        ),
        ("data.train=[{dataset: counting, prefix: x}]", "data.train.0.dataset='counting' stands beside prefix; keep"),
        ("data.train=[{prefix: x, options: {a: 1}}]", "data.train.0.options={...} belongs to a dataset, not to a pre"),
        ("data.train=[{weight: 2}]", "data.train.0.prefix is missing; write a path, or dataset: the name of a regist"),
        ("data.order=megatron", "data.order='megatron' is an order of tokenised corpora, and 'counting' is a register"),
        (
            "train.loss=focl",
            "train.loss='focl' is no registered loss; did you mean 'focal'?; name its module in plugin",
        ),
        (
            "train.callbacks=[writr]",
            "train.callbacks=['writr'] has 'writr', which is no registered callback; did you mean 'writer'?",
        ),
        ("train.callbacks=writer", "train.callbacks='writer' is not a list of names of registered callbacks"),
    ],
)
def test_a_name_that_is_not_registered_is_told_with_the_fix(path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        open_datasets(load_run_config(path, [override]).resolve(world_size=1, vocab_size=None))
    assert words in str(raised.value)
