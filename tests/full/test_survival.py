"""Ranks that are killed anywhere, any number of times: the run that goes on ends as the one that was left alone."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from commands import TINY
from harness import RankError, run_distributed
from resuming import Layout, assert_same_run, at, run, size
from training import NARROW, build_trainer

STEP = 5
"""The step in which a rank is killed: two after a checkpoint, one before the next."""
SMALL = (*NARROW, "model.num_hidden_layers=2", "model.vocab_size=300", "train.steps=6", "checkpoint.every=3")
KEPT = ("checkpoint.keep_last=2",)


def die_in(path: str, overrides: Sequence[str], point: str, rank: int) -> None:
    """Train until this rank is in the middle of its forwards, its backwards or its update in step STEP, and die."""
    trainer = build_trainer(path, overrides)
    engine = trainer.engine
    work, calls = getattr(engine, point), itertools.count(1)
    per_step = 1 if point == "step" else trainer.config.gradient_accumulation_steps

    def dying(*arguments: object, **keywords: object) -> object:
        result = work(*arguments, **keywords)
        if next(calls) == (STEP - 1) * per_step + 1 and trainer.mesh.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(engine, point, dying)
    trainer.run()


CASES: list[tuple[Layout, int]] = [((1, 2, 1), 2), ((1, 1, 2), 3), ((2, 2, 1), 1), ((2, 1, 2), 2), ((1, 2, 2), 3)]
QUICK = [((1, 2, 1), "backward", 1), ((1, 1, 2), "step", 1)]
EVERY_RANK = [
    pytest.param(layout, stage, point, rank, marks=() if (layout, point, rank) in QUICK else pytest.mark.full)
    for layout, stage in CASES
    for point in ("forward", "backward", "step")
    for rank in range(size(layout))
]


@pytest.mark.parametrize(("layout", "stage", "point", "rank"), EVERY_RANK, ids=lambda x: str(x).replace(" ", ""))
def test_a_rank_that_is_killed_in_a_step_costs_the_steps_since_the_checkpoint(
    run_file: Path, tmp_path: Path, layout: Layout, stage: int, point: str, rank: int
) -> None:
    overrides = [*at(layout, stage), *KEPT]
    given = [*SMALL, f"run.dir={tmp_path / 'run'}", *overrides]
    with pytest.raises(RankError, match="was killed by signal SIGKILL"):
        run_distributed(die_in, size(layout), str(run_file), given, point, rank)
    assert run(run_file, tmp_path / "run", layout, *overrides)[0] == 3
    run(run_file, tmp_path / "whole", layout, *overrides)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------- a soak

KILLS, SOAK_STEPS = 20, 1000
FORWARD = SOAK_STEPS // KILLS
"""How many steps a run comes forward at most before it is killed."""
SOAK = (
    *TINY,
    *("parallel.pipeline=2", "checkpoint.every=5", "checkpoint.keep_last=2", "checkpoint.async=true"),
    f"train.steps={SOAK_STEPS}",
)


def start(run_file: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megalite", "train", str(run_file), *SOAK, f"run.dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def final(folder: Path) -> dict[str, str]:
    """The digests of the last checkpoint's tensors."""
    manifest = json.loads((folder / f"checkpoints/step_{SOAK_STEPS}/manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


def reached(folder: Path) -> int:
    """The last step that a run has written down."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def kill_some(running: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> bool:
    """Kill the launcher or one of its ranks in some seconds or after some steps; return whether it had not ended."""
    steps, seconds = chance.randrange(-FORWARD // 3, FORWARD), chance.uniform(0.2, 4.0)
    goal, deadline = reached(folder) + steps, time.monotonic() + (seconds if steps <= 0 else 120)
    while running.poll() is None and time.monotonic() < deadline and (steps <= 0 or reached(folder) < goal):
        time.sleep(0.01)
    if running.poll() is not None:
        return False
    launcher = psutil.Process(running.pid)
    everybody = [launcher, *launcher.children(recursive=True)]
    chance.choice(everybody).kill()
    running.wait(30)
    assert psutil.wait_procs(everybody, timeout=15)[1] == [], "a rank was left behind"
    return True


def seconds_of_training(folder: Path) -> float:
    """The time of the steps that a finished run is made of, of each once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(line["step_seconds"] for line in lines if "loss" in line)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_twenty_times_ends_as_the_one_that_was_not(run_file: Path, tmp_path: Path) -> None:
    whole, soaked, chance = tmp_path / "whole", tmp_path / "soaked", random.Random(20)
    began = time.perf_counter()
    assert start(run_file, whole).wait() == 0
    undisturbed, training = time.perf_counter() - began, seconds_of_training(whole)

    began, kills = time.perf_counter(), 0
    while not (soaked / "DONE.json").exists():
        running = start(run_file, soaked)
        if kills < KILLS:
            kills += kill_some(running, soaked, chance)
        else:
            assert running.wait() == 0
    took = time.perf_counter() - began
    assert final(soaked) == final(whole)
    sys.stdout.write(
        f"{kills} kills: {took:.0f} s, of which {seconds_of_training(soaked) / took:.1%} are steps that stayed; "
        f"undisturbed {undisturbed:.0f} s, {training / undisturbed:.1%}\n"
    )
    assert kills == KILLS
