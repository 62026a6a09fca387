"""Runs of the command: started by every launcher, run to their end, or observed while they train."""

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import warm
from training import TINY_MODEL

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

DEADLINE = 15.0


def by_hand() -> list[str]:
    return ["-m", "megalite"]


def by_torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "megalite"]


def by_deepspeed() -> list[str]:
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    return ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--module", "megalite"]


LAUNCHERS = [by_hand, by_torchrun, by_deepspeed]

Launcher = Callable[[], list[str]]

TINY = (*TINY_MODEL, "data.split=[0.9, 0.1]")


def megalite(*arguments: str, status: int = 0, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; its processes are forked with all imported unless they are to be `fresh`."""
    done = warm.run([*warm.MEGALITE, *arguments], timeout=150, fresh=fresh)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}


def wait_for_steps(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    patience = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < patience, "the run does not come to its first steps"
        time.sleep(0.05)


def rank(process: subprocess.Popen[str], number: int) -> psutil.Process:
    for child in psutil.Process(process.pid).children(recursive=True):
        if warm.rank_of(child) == number:
            return child
    raise AssertionError(f"no rank {number}")
