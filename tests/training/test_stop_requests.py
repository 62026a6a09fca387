"""A run that is asked to stop: all ranks agree on a step, save it, and the run goes on from there to the same end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import warm
from commands import (
    ON_CPU,
    TINY,
    Launcher,
    by_deepspeed,
    by_hand,
    by_torchrun,
    losses,
    megalite,
    rank,
    records,
    wait_for_steps,
)
from harness import run_distributed

from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import STOPPED_STATUS, UserError
from megalite.monitoring.run_folder import STOP
from megalite.planning.plan import prepare
from megalite.training.stop_requests import MAX_MINUTES, REASONS, StopRequests

# A learning rate that does not depend on how long the run is to be.
CONSTANT = "train.schedule={name: constant}"
GIVEN = (*TINY, "parallel.tensor=2", "checkpoint.every=1000", "train.steps=100000", CONSTANT)


@pytest.fixture
def start(run_file: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run and waits for its first steps."""
    started: list[subprocess.Popen[str]] = []

    def start_run(folder: Path, *overrides: str, launcher: Launcher = by_hand) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher(), "train", str(run_file), *GIVEN, f"run.dir={folder}", *overrides]
        process = warm.Popen(
            command, env=os.environ | ON_CPU, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        wait_for_steps(folder, process, 2)
        return process

    yield start_run
    for process in started:
        process.kill()
        process.communicate()


# ---- one rank


def test_nobody_asks_and_nobody_stops(tmp_path: Path) -> None:
    requests = StopRequests(tmp_path / STOP, minutes=1)
    assert requests.local_flags() == [0.0] * len(REASONS)
    requests.synchronize([0.0] * len(REASONS))
    assert requests.agreed is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request_and_its_handler_goes(number: signal.Signals) -> None:
    before, requests = signal.getsignal(number), StopRequests()
    with requests.signal_handlers():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a launcher and its terminal both send it
    assert signal.getsignal(number) == before
    requests.synchronize(requests.local_flags())
    assert requests.agreed == number.name


def test_a_file_and_the_time_are_requests(tmp_path: Path) -> None:
    by_file, by_time = StopRequests(tmp_path / STOP), StopRequests(minutes=1e-9)
    (tmp_path / STOP).touch()
    assert (sum(by_file.local_flags()), sum(by_time.local_flags())) == (1, 1)
    by_time.synchronize([a + b for a, b in zip(by_file.local_flags(), by_time.local_flags(), strict=True)])
    assert by_time.agreed == STOP
    by_time.synchronize([0.0] * len(REASONS))
    assert by_time.agreed == STOP, "an agreement is not taken back"


def test_a_file_of_an_earlier_start_is_none_and_a_folder_neither(tmp_path: Path) -> None:
    file = tmp_path / STOP
    requests = StopRequests(file, since=time.time() - 10)
    file.mkdir()
    assert sum(requests.local_flags()) == 0
    requests.discard()
    file.rmdir()
    file.touch()
    os.utime(file, (0, time.time() - 60))
    assert sum(requests.local_flags()) == 0
    assert requests.discard_stale_file() == file
    assert not file.exists()
    file.symlink_to("nowhere")
    assert requests.discard_stale_file() is None
    assert sum(requests.local_flags()) == 1
    requests.discard()
    assert not file.is_symlink()


# ---- all ranks


def steps_until_agreed(path: str, overrides: Sequence[str], asked: int) -> tuple[int, str | None]:
    """Train until the ranks agree to stop, which one rank alone is asked to in step 3."""
    from training import build_trainer

    trainer = build_trainer(path, overrides)
    step = 0
    with trainer.stop.signal_handlers():
        while trainer.stop.agreed is None and step < 6:
            step += 1
            if step == 3 and trainer.mesh.rank == asked:
                os.kill(os.getpid(), signal.SIGUSR1)
            trainer.step(step)
    trainer.close()
    return step, trainer.stop.agreed


@pytest.mark.parametrize("asked", [1, *(pytest.param(rank, marks=pytest.mark.full) for rank in (0, 2))])
def test_all_ranks_stop_after_the_same_step_whichever_was_asked(run_file: Path, asked: int) -> None:
    overrides = [*TINY, "parallel.pipeline=2", "parallel.data=2"]
    found = run_distributed(steps_until_agreed, 4, str(run_file), overrides, asked)
    assert found == [(3, "SIGUSR1")] * 4


def run_until_signal(path: str, overrides: Sequence[str], step: int | None) -> bool:
    """Train, and have rank 1 get a signal in the forward of `step`; return whether the run stopped."""
    from training import build_trainer

    trainer = build_trainer(path, overrides)
    forwards = 0

    def count(module: object, inputs: object) -> None:
        nonlocal forwards
        forwards += 1
        if trainer.mesh.rank == 1 and forwards == 2 * (step or 0):
            os.kill(os.getpid(), signal.SIGTERM)

    next(iter(trainer.engine.stages.values())).register_forward_pre_hook(count)
    with trainer.stop.signal_handlers():
        stopped = trainer.run()
    trainer.close()
    return stopped


@pytest.mark.parametrize(
    "saving", ["checkpoint.async=true", pytest.param("checkpoint.every=3", marks=pytest.mark.full)]
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(run_file: Path, tmp_path: Path, saving: str) -> None:
    overrides = [*TINY, "parallel.data=2", "train.steps=6", "checkpoint.every=100", saving]
    stopped = run_distributed(run_until_signal, 2, str(run_file), overrides, 3)
    assert stopped == [True, True]
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert run_distributed(run_until_signal, 2, str(run_file), overrides, None) == [False, False]
    whole = [*overrides, f"run.dir={tmp_path}/whole"]
    assert run_distributed(run_until_signal, 2, str(run_file), whole, None) == [False, False]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ends = [CheckpointReader(tmp_path / run / "checkpoints/step_6").manifest.files for run in ("run", "whole")]
    digests = [{name: file for name, file in end.items() if name.endswith(".safetensors")} for end in ends]
    assert digests[0] == digests[1] != {}


def test_a_request_in_the_last_step_changes_nothing(run_file: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "parallel.data=2", "train.steps=3"]
    assert run_distributed(run_until_signal, 2, str(run_file), overrides, 3) == [False, False]
    assert (tmp_path / "run/DONE.json").exists()
    assert not (tmp_path / "run/STOPPED.json").exists()


# ---- a whole run


def test_a_run_stops_for_its_file_and_goes_on_when_started_again(
    run_file: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "run"
    running = start(folder, "train.eval_every=2", "checkpoint.async=true")
    (folder / STOP).touch()
    said = running.communicate(timeout=60)[0]
    assert running.returncode == STOPPED_STATUS, said
    last = max(losses(folder))
    checkpoint = folder / f"checkpoints/step_{last}"
    stopped = json.loads((folder / "STOPPED.json").read_text())
    assert {name: stopped[name] for name in ("step", "reason", "checkpoint")} == {
        "step": last,
        "reason": "STOP",
        "checkpoint": str(checkpoint),
    }
    assert f"stopped after step {last:,} of 100,000, asked by STOP; checkpoint step_{last}" in said
    assert CheckpointReader(checkpoint).problems() == []
    assert not (folder / STOP).exists()
    assert not (folder / "DONE.json").exists()

    (folder / STOP).touch()
    given = [*GIVEN, f"train.steps={last + 3}"]
    again = megalite("train", str(run_file), *given).stdout
    assert f"removed {folder}/STOP, which was there before this start" in again
    assert not (folder / "STOPPED.json").exists()
    assert not (folder / STOP).exists()
    assert (folder / "DONE.json").exists()
    assert list(losses(folder)) == list(range(1, last + 4))


def test_a_run_that_keeps_no_checkpoint_says_so_when_its_time_is_over(run_file: Path, tmp_path: Path) -> None:
    overrides = [*GIVEN, "checkpoint.every=0", "checkpoint.last=false", "train.max_minutes=0.001"]
    said = megalite("train", str(run_file), *overrides, status=STOPPED_STATUS).stdout
    assert "checkpoints: none, the run leaves no model: checkpoint.every=0 and checkpoint.last=false" in said
    end = "no checkpoint of it is kept: checkpoint.last is false"
    assert f"stopped after step 1 of 100,000, asked by {MAX_MINUTES}; {end}" in said
    assert json.loads((tmp_path / "run/STOPPED.json").read_text())["checkpoint"] is None


def test_a_run_without_a_section_of_checkpoints_keeps_the_step_that_its_time_ends_with(
    run_file: Path, tmp_path: Path
) -> None:
    overrides = [*TINY, "train.steps=9", CONSTANT]
    said = megalite("train", str(run_file), *overrides, "train.max_minutes=0.001", status=STOPPED_STATUS).stdout
    assert f"asked by {MAX_MINUTES}; checkpoint step_1" in said
    said = megalite("train", str(run_file), *overrides, "train.stop_after=3").stdout
    assert "checkpoints/step_1, step 1, 4 samples" in said
    assert [folder.name for folder in sorted((tmp_path / "run/checkpoints").glob("step_*"))] == ["step_1", "step_3"]


@pytest.mark.full
@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_under_any_launcher(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], launcher: Launcher, number: signal.Signals
) -> None:
    running = start(tmp_path / "run", launcher=launcher)
    rank(running, 1).send_signal(number)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 0, said
    stopped = json.loads((tmp_path / "run/STOPPED.json").read_text())
    assert stopped["reason"] == number.name
    assert CheckpointReader(Path(stopped["checkpoint"])).problems() == []


# ---- started again


def test_ranks_are_started_again_only_where_they_can_go_on(run_file: Path) -> None:
    with pytest.raises(UserError, match=r"train\.max_restarts=2 .* resume='never'; use resume=auto"):
        prepare(run_file, [*TINY, "train.max_restarts=2", "resume=never"], None)
    with pytest.raises(UserError, match=r"train\.max_restarts=2 .* checkpoint\.every=0 there is none before"):
        prepare(run_file, [*TINY, "train.max_restarts=2", "checkpoint.every=0"], None)


def end_of(run_file: Path, folder: Path) -> dict[int, float]:
    """The losses of the run that nothing disturbs."""
    megalite("train", str(run_file), *GIVEN, "train.steps=40", f"run.dir={folder}")
    return losses(folder)


@pytest.mark.full
def test_a_run_whose_rank_is_killed_is_started_again_and_ends_the_same(
    run_file: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "run"
    running = start(folder, "train.steps=40", "train.max_restarts=1", "checkpoint.every=2")
    while not (folder / "checkpoints/step_2/manifest.json").exists():
        time.sleep(0.02)
    rank(running, 1).kill()
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 0, said
    assert "megalite: all ranks are started again, time 1 of 1" in said
    (restart,) = [record for record in records(folder) if "restart" in record]
    assert restart["restart"] == 1
    assert restart["step"] > 0
    assert f"restart 1: the run goes on after step {restart['step']}" in said
    assert losses(folder) == end_of(run_file, tmp_path / "whole")


@pytest.mark.full
def test_torchrun_starts_a_run_again_and_it_ends_the_same(
    run_file: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    def restarting() -> list[str]:
        interpreter_words = by_torchrun()
        return [*interpreter_words[:2], "--max-restarts", "1", *interpreter_words[2:]]

    folder = tmp_path / "run"
    running = start(folder, "train.steps=40", "checkpoint.every=2", launcher=restarting)
    while not (folder / "checkpoints/step_2/manifest.json").exists():
        time.sleep(0.02)
    rank(running, 1).kill()
    said = running.communicate(timeout=180)[0]
    assert running.returncode == 0, said
    (restart,) = [record for record in records(folder) if "restart" in record]
    assert restart["restart"] == 1
    assert restart["step"] > 0
    assert losses(folder) == end_of(run_file, tmp_path / "whole")
