"""A rank's life hangs on its launcher's: however the launcher ends, the rank ends too.

Two lines hold it. The kernel's parent-death signal acts at once and needs nothing of this process, not even the
interpreter's lock, but it knows only the direct parent. A thread looks every second at all the launching processes
above: ``deepspeed`` is two of them, and where the upper one is killed the lower one would go on.
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
"""Marks of megalite, torchrun and deepspeed. The parent-death signal comes when the *thread* that started this process
ends; daemons like slurmstepd may start ranks from a thread that does not last, and clear up after themselves."""

_LAUNCHER_MODULES = frozenset(
    {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
)
_LAUNCHER_SCRIPTS = frozenset({"deepspeed", "deepspeed.pt", "ds", "torchrun"})


@dataclass(frozen=True, slots=True)
class _Process:
    """A process by its id and the time of its start, which together are never used twice.

    The parent is no part of who it is: that changes when the parent ends, as a shell does under ``nohup``.
    """

    pid: int
    started: str
    parent: int = field(compare=False)


def die_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """End this process by SIGKILL once its launcher is gone, even when the launcher was killed itself.

    Call it first thing in a rank, under any launcher. Elsewhere than on Linux the watching thread alone does it, for
    the direct parent.
    """
    parent = int(environ.get(LAUNCHER_PID, os.getppid()))
    if sys.platform == "linux" and any(mark in environ for mark in _STARTS_FROM_ITS_MAIN_THREAD):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    above = _launchers_above()
    threading.Thread(target=_watch, args=(parent, above), name="die-with-parent", daemon=True).start()


def _watch(parent: int, above: tuple[_Process, ...]) -> None:
    # A parent that ended before the kernel was asked sends no signal any more: the first look finds it gone.
    while os.getppid() == parent and all(map(_is_running, above)):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_running(process: _Process) -> bool:
    try:
        return _look_up(process.pid) == process
    except OSError:
        return True  # Not to be seen, as when this process has no file descriptor left, is not the same as gone.


def _launchers_above() -> tuple[_Process, ...]:
    """Every process from the parent up to the topmost launcher: wrappers between them count, a shell above does not."""
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
    """Return a running process; None when it has ended, also when nobody has collected its status yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in brackets, may itself hold brackets and blanks.
    state, parent, *rest = stat.rpartition(")")[2].split()
    return _Process(pid, started=rest[17], parent=int(parent)) if state not in "ZX" else None


def _is_launcher(pid: int) -> bool:
    try:
        interpreter, *words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if not Path(interpreter).name.startswith("python"):
        return Path(interpreter).name in _LAUNCHER_SCRIPTS
    # Options aside, the program comes first; what follows it is its own.
    for word, following in pairwise(words):
        if word == "-m":
            return following in _LAUNCHER_MODULES
        if word == "-c" or not word.startswith("-"):
            return Path(word).name in _LAUNCHER_SCRIPTS
    return False
