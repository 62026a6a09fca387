"""The nodes of `minislurm.sh` and what a user of them calls."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
MINISLURM = HERE / "minislurm.sh"
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    restarts: int
    exit_code: str


class Cluster:
    """The nodes node1 and node2, and what a user of them calls."""

    def __init__(self, state: Path) -> None:
        self.state = state
        # Jobs inherit what sbatch had: the checkout's package, and the tools beside this Python.
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            **ON_CPU,
            "SLURM_CONF": str(state / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
        }

    def call(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """Return what a command prints; it must end well."""
        environment = {**self.environment, **more}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> JobState:
        fields = dict(
            field.split("=", 1) for field in self.call("scontrol", "-o", "show", "job", number).split() if "=" in field
        )
        return JobState(fields["JobState"], int(fields["Restarts"]), fields["ExitCode"].partition(":")[0])

    def wait(self, number: str, seconds: float = 400) -> JobState:
        """Return the state of a job that has ended and is not to come again."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).state in RUNNING:
            assert time.monotonic() < deadline, f"job {number} is still {job.state}"
            time.sleep(0.3)
        return job

    def wait_until(self, number: str, state: str, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).state != state:
            assert time.monotonic() < deadline, f"job {number} is {job.state}, not {state}"
            time.sleep(0.2)

    def kill_node(self, name: str) -> None:
        self._minislurm("kill_node", name)

    def start_node(self, name: str) -> None:
        self._minislurm("start_node", name)

    def _minislurm(self, *arguments: str) -> None:
        variables = {**os.environ, "MINISLURM": str(self.state)}
        # Not captured: a node's processes would keep the pipe open.
        subprocess.run([str(MINISLURM), *arguments], env=variables, stdin=subprocess.DEVNULL, check=True)
