"""The same run file under megalite's own launcher, torchrun and deepspeed: it trains alike, and ends whole."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import warm
from commands import DEADLINE, LAUNCHERS, ON_CPU, Launcher, by_deepspeed, by_hand, by_torchrun

SMALL = ("model.hidden_size=32", "model.intermediate_size=64", "model.vocab_size=256", "parallel.tensor=2")


QUICKLY_BY_HAND = [by_hand, *(pytest.param(launcher, marks=pytest.mark.full) for launcher in LAUNCHERS[1:])]


@dataclass(frozen=True)
class Run:
    """A started run: its launcher, its folder, and the file that has its output."""

    process: subprocess.Popen[bytes]
    directory: Path
    output: Path

    def family(self) -> list[psutil.Process]:
        """The launcher first, then all below it."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []


@pytest.fixture
def launch(run_file: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run by a launcher; what is left of it is killed after the test."""
    started: list[Run] = []

    def launch_run(launcher: Launcher, *overrides: str, fresh: bool = False) -> Run:
        directory, output = tmp_path / launcher.__name__, tmp_path / f"{launcher.__name__}.out"
        command = [sys.executable, *launcher(), "train", str(run_file), f"run.dir={directory}", *SMALL, *overrides]
        with output.open("wb") as out:
            start = subprocess.Popen if fresh else warm.Popen
            process = start(command, env=os.environ | ON_CPU, stdout=out, stderr=subprocess.STDOUT)
        started.append(Run(process, directory, output))
        return started[-1]

    yield launch_run
    for run in started:
        for left in run.family():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        run.process.wait()


def wait_for_first_step(run: Run) -> list[psutil.Process]:
    """Return the processes of a run that trains: its launcher first, rank 1 last."""
    metrics, patience = run.directory / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert run.process.poll() is None, run.output.read_text()
        assert time.monotonic() < patience, "the run does not come to its first step"
        time.sleep(0.1)
    return sorted(run.family(), key=warm.rank_of)


@pytest.mark.parametrize("launcher", QUICKLY_BY_HAND)
def test_a_killed_rank_ends_the_run(launch: Callable[..., Run], launcher: Launcher) -> None:
    run = launch(launcher, "train.steps=1000000")
    processes = wait_for_first_step(run)
    processes[-1].kill()
    assert run.process.wait(DEADLINE) != 0
    assert psutil.wait_procs(processes, timeout=0)[1] == []
    if launcher is by_hand:
        assert f"megalite: rank 1 on {socket.gethostname()} was killed by signal SIGKILL" in run.output.read_text()


@pytest.mark.parametrize("launcher", QUICKLY_BY_HAND)
def test_a_killed_launcher_leaves_nobody(launch: Callable[..., Run], launcher: Launcher) -> None:
    run = launch(launcher, "train.steps=1000000")
    processes = wait_for_first_step(run)
    run.process.kill()
    assert psutil.wait_procs(processes, timeout=DEADLINE)[1] == []


def test_a_run_file_trains_alike_under_every_launcher(launch: Callable[..., Run]) -> None:
    losses = {}
    for launcher in LAUNCHERS:
        run = launch(launcher, "train.steps=3", fresh=True)
        assert run.process.wait(120) == 0, run.output.read_text()
        assert (run.directory / "DONE.json").exists()
        records = [json.loads(line) for line in (run.directory / "metrics.jsonl").open()]
        losses[launcher] = [record["loss"] for record in records if "loss" in record]
        assert json.loads((run.directory / "STATE.json").read_text())["state"] == "done"
        for rank in (0, 1):
            log = run.directory / f"logs/rank_{rank}.log"
            assert log.exists()
            if launcher is not by_hand:
                assert f": rank {rank} on {socket.gethostname()}, process " in log.read_text().splitlines()[0]
    assert len(losses[by_hand]) == 3
    assert losses[by_hand] == losses[by_torchrun] == losses[by_deepspeed]
