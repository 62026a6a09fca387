"""Small programs as ranks, started by `launch_local` in a process of its own; which of them are alive."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import psutil

DEADLINE = 15.0
"""Seconds within which processes start or end."""


# Every rank leaves its id in a file, so that a test can tell whether it lives.
PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from megalite.launch import die_with_parent
die_with_parent()
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
def leave_pid(name, pid):
    (here / f"{name}.tmp").write_text(str(pid))
    (here / f"{name}.tmp").rename(here / f"{name}.pid")
def wait_for_ranks(n):
    while len(list(here.glob("rank*.pid"))) < n: time.sleep(0.01)
leave_pid(f"rank{rank}", os.getpid())
"""


def program(body: str) -> list[str]:
    return [sys.executable, "-c", PRELUDE + dedent(body)]


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(folder: Path, count: int) -> list[int]:
    """Wait until `count` processes have left their ids, and return them."""
    wait_until(lambda: len(list(folder.glob("*.pid"))) >= count)
    return [int(path.read_text()) for path in sorted(folder.glob("*.pid"))]


def start_launcher(
    started: list[subprocess.Popen[str]], folder: Path, world_size: int, body: str, options: str = ""
) -> subprocess.Popen[str]:
    """Start `launch_local` in a process of its own, so that it can be killed."""
    code = (
        "import sys; from pathlib import Path; from megalite.launch import launch_local; folder = Path(sys.argv[1]); "
        f"sys.exit(launch_local([sys.argv[1]], {world_size}, folder / 'logs', command=sys.argv[2:], {options}))"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *program(body)], stderr=subprocess.PIPE, text=True
    )
    started.append(launcher)
    return launcher
