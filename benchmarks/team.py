"""The ranks of one contender at one layout, as processes that sleep between the steps they are told to run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from workload import LAYOUTS, Contender, Job

LOG_TAIL = 25


class TeamError(RuntimeError):
    """A rank died; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one team: wall seconds, CPU seconds of all ranks, and what else the machine did meanwhile."""

    wall_seconds: float
    cpu_seconds: float
    other_cpu_seconds: float
    loss: float


class Team:
    """Starts the ranks at once, and runs them one step at a time; a context manager that leaves no rank behind."""

    def __init__(self, contender: type[Contender], layout: str, job: Job, logs: Path) -> None:
        self.contender, self.layout, self.job = contender, layout, job
        self.world_size = LAYOUTS[layout].world_size
        self.threads = max(1, len(os.sched_getaffinity(0)) // self.world_size)
        self.label = f"{contender.name}@{layout}"
        self.cpu_seconds = 0.0
        self.memory_mib: list[float] = []
        port = free_port()
        self.logs = [logs / f"{contender.name}-{layout}-{rank}.log" for rank in range(self.world_size)]
        self.ranks = [self._start(rank, port) for rank in range(self.world_size)]

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            with suppress(BrokenPipeError):  # what a dead rank was not told any more
                pipe(rank.stdin).close()
        deadline = time.monotonic() + 20
        for rank in self.ranks:
            try:
                rank.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()

    def wait_until_ready(self) -> None:
        """Return once every rank has built its model; raise TeamError where one died instead."""
        self._hear()

    def step(self) -> Step:
        """Run one step on all ranks; raise TeamError where one died."""
        cpu_before, busy_before, begin = self.cpu_seconds, busy_seconds(), time.perf_counter()
        self._tell("step")
        losses = [reply["loss"] for reply in self._hear() if reply["loss"] is not None]
        wall = time.perf_counter() - begin
        cpu = self.cpu_seconds - cpu_before
        other = max(0.0, busy_seconds() - busy_before - cpu)
        return Step(wall, cpu, other, sum(losses) / len(losses) if losses else float("nan"))

    def observe(self, what: str) -> list[Any]:
        """Run one step on all ranks under an observation; what each rank saw. Raise TeamError where one died."""
        self._tell(what)
        return [reply["observed"] for reply in self._hear()]

    def _tell(self, word: str) -> None:
        with suppress(BrokenPipeError):  # a rank that has died is named when its reply is missing
            for rank in self.ranks:
                pipe(rank.stdin).write(f"{word}\n")

    def _hear(self) -> Sequence[dict[str, Any]]:
        replies = [self._reply(index) for index in range(self.world_size)]
        self.cpu_seconds = sum(reply["cpu_seconds"] for reply in replies)
        self.memory_mib = [reply["memory_mib"] for reply in replies]
        return replies

    def _reply(self, index: int) -> dict[str, Any]:
        line = pipe(self.ranks[index].stdout).readline()
        if not line:
            tails = "\n".join(self._end_of_log(rank) for rank in range(self.world_size))
            raise TeamError(f"{self.label}: rank {index} left its work; the ends of the logs:\n{tails}")
        return json.loads(line)

    def _end_of_log(self, rank: int) -> str:
        lines = self.logs[rank].read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return "\n".join([f"--- rank {rank}, status {self.ranks[rank].poll()}", *lines])

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        order = {
            "contender": self.contender.name,
            "layout": self.layout,
            "job": asdict(self.job),
            "rank": rank,
            "world_size": self.world_size,
            "port": port,
            "threads": self.threads,
        }
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world_size, "LOCAL_WORLD_SIZE": self.world_size}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in places.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.threads),
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(self.logs[rank].with_suffix(".extensions")),
            **self.contender.environment,
        }
        command = [sys.executable, str(Path(__file__).with_name("rank.py")), json.dumps(order)]
        with self.logs[rank].open("w") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )


def pipe(stream: IO[str] | None) -> IO[str]:
    """The stream that Popen was asked to open."""
    assert stream is not None
    return stream


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens to now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def busy_seconds() -> float:
    """CPU seconds that everything on this machine has used since boot."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts = map(int, fields[:7])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")
