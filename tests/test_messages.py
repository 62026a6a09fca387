"""The user errors that are met most, word for word: where, what was found, what is allowed, the nearest fix.

Other tests of messages ask for keys, values and that a fix is offered, so that only this file pins their wording.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalite.checkpoint import store
from megalite.checkpoint.manifest import Manifest
from megalite.cli import main
from megalite.config.load import load_run_config
from megalite.parallel.regions import Region

TRAIN = ("train", "run.yaml", "--dry-run")

MESSAGES = [
    (("trian", "run.yaml"), "there is no verb 'trian'; did you mean 'train'?"),
    (("train", "nowhere.yaml"), "nowhere.yaml: no such file; did you mean 'run.yaml'?"),
    ((*TRAIN, "train.stepz=3"), "command line: train.stepz is not a key; did you mean 'train.steps'?"),
    ((*TRAIN, "train.steps=many"), "command line: train.steps='many' is not an integer of at least 1"),
    (
        (*TRAIN, "parallel.tensor=3"),
        "command line: parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8",
    ),
    (
        (*TRAIN, "parallel.data=2", "train.global_batch_size=5"),
        "run.yaml: train.micro_batch_size=1 x data parallel 2 does not divide train.global_batch_size=5; use a global "
        "batch of 4 or 6",
    ),
    (
        (*TRAIN, "deepspeed.train_batch_size=8"),
        "command line: deepspeed.train_batch_size=8 disagrees with train.global_batch_size=4 of run.yaml; write 'auto' "
        "or 4",
    ),
    (
        (*TRAIN, "deepspeed.flops_profiler={enabled: true}"),
        "command line: deepspeed.flops_profiler.enabled=true is refused: it counts one stage's modules as the whole "
        "model; read mfu in metrics.jsonl",
    ),
    (
        ("train", "run.yaml", "data.train=[{prefix: nowhere}]"),
        "nowhere.idx: no such file; make the dataset with `megalite preprocess INPUT --output nowhere`",
    ),
    (
        (*TRAIN, "resume=step_3"),
        "resume=step_3: is not a checkpoint; write auto, never, or the path of a folder step_N",
    ),
    (
        (*TRAIN, "init_from=nowhere"),
        "init_from=nowhere: there is no such folder in HERE; give a checkpoint step_N, a run's folder, or a Hugging "
        "Face or Megatron folder on this machine",
    ),
    ((*TRAIN, "run.dir=run.yaml"), "run.dir=run.yaml: run.yaml is not a folder; set another run.dir"),
    (
        ("slurm", "run.yaml", "--dry-run", "--nodes", "3", "parallel.tensor=2"),
        "run.yaml: tensor 2 x pipeline 1 x data 1 is 2 ranks, which --nodes 3 does not divide; use one of 1, 2",
    ),
]


def errors_of(capsys: pytest.CaptureFixture[str], here: Path, *arguments: str) -> list[str]:
    """Return what the command says of the user's mistake, which ends it with status 2."""
    assert main([*arguments]) == 2
    lines = capsys.readouterr().err.replace(str(here), "HERE").splitlines()
    return [line.removeprefix("megalite: error: ") for line in lines if line.startswith("megalite: error: ")]


@pytest.mark.parametrize(("arguments", "message"), MESSAGES, ids=[" ".join(words) for words, _ in MESSAGES])
def test_message(
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(run_file.parent)
    assert errors_of(capsys, run_file.parent, *arguments) == [message]


def test_message_of_a_checkpoint_that_does_not_fit(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_file.parent)
    model = {**load_run_config(run_file, []).model.model_dump(mode="json"), "rope_theta": 5.0e5}
    folder, elements = Path("run/checkpoints/step_2"), np.zeros(1, np.float32)
    store.begin(folder)
    region = Region((0,), (1,))
    store.write_rank(folder, 0, [store.Part("exp_avg/final_norm.weight", (1,), region, lambda: elements)])
    store.finish(folder, ranks=1, manifest=replace(Manifest(2, {}, {}), model=model), state={})
    first, headings, setting, *_, fix = errors_of(capsys, run_file.parent, *TRAIN, "run.dir=run")
    assert first == "run/checkpoints/step_2: does not fit this run:"
    assert headings.split() == ["run", "file", "checkpoint"]
    assert setting.split() == ["model.rope_theta", "10000.0", "500000.0"]
    assert fix == (
        "resume from another checkpoint, use its weights alone with init_from, or start anew with resume=never"
    )
