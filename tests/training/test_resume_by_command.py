"""Checkpoints from the command line: a run that is stopped by a signal, gone on with, and started again when done."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from commands import TINY, megalite

from megalite.checkpoint.discovery import find_checkpoints
from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import STOPPED_STATUS

GIVEN = (*TINY, "parallel.data=2", "checkpoint.every=1", "checkpoint.keep_last=3", "checkpoint.async=true")


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_a_run_stopped_by_a_signal_goes_on(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*warm.MEGALITE, "train", str(run_file), *GIVEN, "train.steps=100000"]
    with warm.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        while len(find_checkpoints(folder / "checkpoints")) < 2:
            assert running.poll() is None
            time.sleep(0.05)
        second = megalite("train", str(run_file), *GIVEN, "train.steps=100000", status=2).stderr
        assert f"run.dir={folder} is in use by process " in second
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=30)
    assert running.returncode == STOPPED_STATUS
    *of_start, last_words = said.splitlines()
    assert of_start[-1] == "megalite: building the model"
    assert last_words.startswith("megalite: asked to stop; ")
    found = find_checkpoints(folder / "checkpoints")
    assert all(CheckpointReader(path).problems() == [] for _, path in found)

    last = found[0][0] + 3
    done = megalite("train", str(run_file), *GIVEN, f"train.steps={last}").stdout
    assert f"resumed: {folder}/checkpoints/step_{last - 3}, step {last - 3}, " in done
    assert f"step {last}/{last} | checkpoint step_{last} | " in done
    assert steps(folder) == list(range(1, last + 1))
    assert [step for step, _ in find_checkpoints(folder / "checkpoints")] == [last, last - 1, last - 2]
    assert (folder / "checkpoints/LATEST").read_text() == f"step_{last}\n"
    assert (folder / "DONE.json").is_file()

    again = megalite("train", str(run_file), *GIVEN, f"train.steps={last}").stdout
    assert f"nothing is left to train: step {last} of {last} is done" in again
    assert steps(folder) == list(range(1, last + 1))


@pytest.mark.full
def test_another_models_checkpoint_is_refused_before_any_rank_starts(run_file: Path, tmp_path: Path) -> None:
    given = [*TINY, "train.steps=6", "checkpoint.every=2", "train.stop_after=2"]
    megalite("train", str(run_file), *given)
    refused = megalite("train", str(run_file), *given, "model.intermediate_size=64", status=2).stderr
    lines = refused.splitlines()
    assert lines[0].startswith(f"megalite: error: {tmp_path}/run/checkpoints/step_2: ")
    assert any(line.split()[2:] == ["model.intermediate_size", "64", "48"] for line in lines)
    assert all(fix in lines[-1] for fix in ("init_from", "resume=never"))
    wrong = megalite("train", str(run_file), *given, f"resume={tmp_path}/run/checkpoints/step_3", status=2).stderr
    assert "step_3: is not a checkpoint; did you mean" in wrong
    wrong = megalite("train", str(run_file), *given, f"resume={tmp_path}/run", status=2).stderr
    assert wrong.endswith(f"is not a checkpoint; the newest checkpoint there is {tmp_path}/run/checkpoints/step_2\n")
    dry = megalite("train", str(run_file), *given, "--dry-run").stdout
    assert dry.endswith(
        f"start: from {tmp_path}/run/checkpoints/step_2, step 2\nnothing is left to train: step 2 is done\n"
    )
    anew = megalite("train", str(run_file), *given, "resume=never").stdout
    assert "resumed" not in anew
    assert (tmp_path / "run/earlier/1/checkpoints/step_2/manifest.json").is_file()
