"""Jobs on a true two-node Slurm: each launcher trains as one machine does; a run outlives what happens to its job."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from two_nodes import ON_CPU, Cluster

from megalite.cluster import LAUNCHERS

pytestmark = pytest.mark.cluster

# Pipeline 2 across the nodes, tensor 2 within each.
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
SMALL = ("model.hidden_size=32", "model.intermediate_size=64", "model.vocab_size=256")


@dataclass(frozen=True)
class Submitted:
    """A job, and where its run leaves what it leaves."""

    number: str
    name: str
    run_dir: Path
    folder: Path

    def output(self) -> str:
        return (self.folder / "logs" / self.name / f"{self.number}.log").read_text(errors="replace")

    def losses(self) -> dict[int, float]:
        return read_losses(self.run_dir)

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while max(self.losses(), default=0) < step:
            assert time.monotonic() < deadline, f"no step {step}: {self.output()}"
            time.sleep(0.1)


Submit = Callable[..., Submitted]


def read_losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step, the last word on it where it was run twice."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture
def submit(cluster: Cluster, run_file: Path, tmp_path: Path) -> Submit:
    """Submits a run of the small model by ``megalite slurm``."""

    def submit_run(name: str, launcher: str, *arguments: str) -> Submitted:
        run_dir = tmp_path / name
        command = [sys.executable, "-m", "megalite", "slurm", str(run_file), "--nodes", "2", "--launcher", launcher]
        said = cluster.call(*command, f"run.dir={run_dir}", *LAYOUT, *SMALL, *arguments, cwd=tmp_path)
        found = re.match(r"job (\d+): ", said)
        assert found, said
        return Submitted(found[1], name, run_dir, tmp_path)

    return submit_run


def train_here(run_file: Path, run_dir: Path, *overrides: str) -> dict[int, float]:
    """The losses of the same run on this machine, by hand."""
    command = [sys.executable, "-m", "megalite", "train", str(run_file), f"run.dir={run_dir}", *LAYOUT, *SMALL]
    done = subprocess.run([*command, *overrides], env=os.environ | ON_CPU, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read_losses(run_dir)


@pytest.mark.parametrize(
    "launcher", [name if name == "srun" else pytest.param(name, marks=pytest.mark.full) for name in LAUNCHERS]
)
def test_every_launcher_trains_as_one_machine_does(
    cluster: Cluster, submit: Submit, run_file: Path, tmp_path: Path, launcher: str
) -> None:
    job = submit("run", launcher, "train.steps=3", "checkpoint.every=0")
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 0), job.output()
    assert (job.run_dir / "DONE.json").exists()
    assert job.losses() == train_here(run_file, tmp_path / "here", "train.steps=3", "checkpoint.every=0")
    kept = job.folder / "logs" / job.name / job.number
    assert (kept / "run.yaml").read_bytes() == run_file.read_bytes()
    assert "train.steps=3" in (kept / "command").read_text()
