"""Parent watchdog: a rank is killed when its launcher ends, however the launcher ends.

There are two mechanisms. The kernel's parent-death signal (PR_SET_PDEATHSIG) acts at once and does not need the
interpreter's lock, but covers the direct parent only. A thread checks every second that all launching processes above
the rank still run: ``deepspeed`` consists of two, and if the upper process is killed, the lower one goes on.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

from megalite.launch.environment import LAUNCHER_PID

POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1

_STARTS_FROM_ITS_MAIN_THREAD = (LAUNCHER_PID, "TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Variables of launchers for which the parent-death signal is safe: megalite, torchrun and deepspeed.

The kernel sends the signal when the *thread* that started this process ends. Daemons such as slurmstepd may start ranks
from a short-lived thread; they end their ranks themselves.
"""

_LAUNCHER_MODULES = frozenset(
    {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
)
_LAUNCHER_SCRIPTS = frozenset({"deepspeed", "deepspeed.pt", "ds", "torchrun"})


@dataclass(frozen=True, slots=True)
class _Process:
    """A process, identified by its id and its start time, a pair that the kernel does not reuse.

    The parent is not compared: it changes when the parent ends, as a shell does under ``nohup``.
    """

    pid: int
    started: str
    parent: int = field(compare=False)


def die_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """Kill this process with SIGKILL once its launcher has ended, even if the launcher was killed itself.

    Call it first in a rank, under any launcher. On systems other than Linux only the thread watches, and only the
    direct parent.
    """
    parent = int(environ.get(LAUNCHER_PID, os.getppid()))
    if sys.platform == "linux" and any(mark in environ for mark in _STARTS_FROM_ITS_MAIN_THREAD):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    above = _launchers_above()
    threading.Thread(target=_watch, args=(parent, above), name="die-with-parent", daemon=True).start()


def _watch(parent: int, above: tuple[_Process, ...]) -> None:
    # A parent that ended before the prctl call sends no signal: the first check here finds it.
    while os.getppid() == parent and all(map(_is_running, above)):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_running(process: _Process) -> bool:
    try:
        return _look_up(process.pid) == process
    except OSError:
        return True  # /proc cannot be read, for example without a free file descriptor: the process may still run.


def _launchers_above() -> tuple[_Process, ...]:
    """Return the processes from the parent up to the topmost launcher, with wrappers between, without a shell above."""
    chain = tuple(islice(_ancestors(), 16))
    topmost = max((depth for depth, process in enumerate(chain) if _is_launcher(process.pid)), default=0)
    return chain[: topmost + 1]


def _ancestors() -> Iterator[_Process]:
    pid = os.getppid()
    with suppress(OSError):
        while (process := _look_up(pid)) is not None:
            yield process
            pid = process.parent


def _look_up(pid: int) -> _Process | None:
    """Return a running process; None if it has ended, including a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The process name, in brackets, may itself contain brackets and blanks.
    state, parent, *rest = stat.rpartition(")")[2].split()
    return _Process(pid, started=rest[17], parent=int(parent)) if state not in "ZX" else None


def _is_launcher(pid: int) -> bool:
    try:
        interpreter, *words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if not Path(interpreter).name.startswith("python"):
        return Path(interpreter).name in _LAUNCHER_SCRIPTS
    # Skip the interpreter's options; the words after the program are the program's own.
    for word, following in pairwise(words):
        if word == "-m":
            return following in _LAUNCHER_MODULES
        if word == "-c" or not word.startswith("-"):
            return Path(word).name in _LAUNCHER_SCRIPTS
    return False
