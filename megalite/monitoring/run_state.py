"""STATE.json in a run's folder: the steps of a start-up, and how the run ended.

A start writes the file at once and rewrites it every few seconds until training begins, so that `status` can
distinguish a start that goes on from a start that was killed. During training the ranks' heartbeats show that, and the
file says ``running`` until the run ends. Scripts should rely on DONE.json and STOPPED.json.
"""

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from megalite.errors import UserError
from megalite.files import partial_path, require_unlocked

STATE = "STATE.json"
REFRESH_SECONDS = 5.0
_ALIVE_SECONDS = 120.0
_MAX_REASON = 2000
"""The largest number of characters of a failure's message that are stored."""

State = Literal["starting", "running", "stopped", "failed", "done"]


@dataclass(frozen=True, slots=True)
class RunState:
    """The content of STATE.json.

    `start` is an identifier that the processes of one start share (`launch.start_id`). `time` is the modification time
    of the file by its file system's clock, in seconds since 1970.
    """

    state: State
    start: str
    ranks: int
    steps: int
    """The number of steps of the whole run."""
    host: str
    pid: int
    doing: str = ""
    """The current step of the start-up, or the step in which the start failed; empty after training has begun."""
    reason: str | None = None
    """The reason why the run stopped or failed."""
    step: int | None = None
    """The last training step before the end."""
    checkpoint: str | None = None
    """The checkpoint from which the run can resume."""
    time: float = 0.0

    def is_alive(self, now: float, silent_seconds: float) -> bool:
        """Whether a start wrote the file recently, or less recently while its process still runs on this host."""
        quiet = now - self.time
        return quiet <= silent_seconds or (quiet <= _ALIVE_SECONDS and self._runs_here())

    def _runs_here(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass
        except (OSError, OverflowError):
            return False
        return self.host == socket.gethostname()


def read_state(folder: Path) -> RunState | None:
    """Return the content of a run's STATE.json; None if it is missing or invalid."""
    path = folder / STATE
    with suppress(OSError, ValueError, TypeError):
        found = RunState(**{**json.loads(path.read_bytes()), "time": path.stat().st_mtime})
        numbers = (found.ranks, found.steps, found.pid, *(() if found.step is None else (found.step,)))
        if found.state in get_args(State) and all(isinstance(number, int) for number in numbers):
            return found
    return None


class RunStateWriter:
    """Writes STATE.json for one start, from one process at a time: the launcher, then rank 0.

    It does not overwrite the state of another run that uses the folder. A failed write is not an error.
    """

    def __init__(
        self, folder: Path, start: str, *, ranks: int, steps: int, announce: Callable[[str], None] = lambda text: None
    ) -> None:
        """Write for the start with the identifier `start`; `announce` is called with each step of the start-up."""
        self._folder, self._announce = folder, announce
        self._now = RunState("starting", start, ranks, steps, socket.gethostname(), os.getpid())
        self._lock, self._over = threading.Lock(), threading.Event()
        self._began = False

    def starting(self, doing: str) -> None:
        """Announce a step of the start-up, and write it for `status`."""
        self._announce(doing)
        self._write(replace(self._now, doing=doing))

    def start_refreshing(self) -> None:
        """Rewrite the file every few seconds, in a thread, until training begins."""
        threading.Thread(target=self._refresh, name="run-state", daemon=True).start()

    def running(self) -> None:
        """Write that training begins."""
        self._over.set()
        self._write(replace(self._now, state="running", doing=""))

    def ended(self, state: State, *, step: int, reason: str | None = None, checkpoint: str | None = None) -> None:
        """Write how the run ended, and after which step."""
        self._over.set()
        self._write(replace(self._now, state=state, doing="", reason=reason, step=step, checkpoint=checkpoint))

    def failed(self, reason: str) -> None:
        """Write that the run failed, unless another process of this start has written a failure before."""
        self._over.set()
        before = read_state(self._folder)
        if before is None or not self._began or not self._is_our_failure(before):
            # Rank 0 may have written a later step of the start-up than this process, the launcher, knows.
            ours = before is not None and before.start == self._now.start
            doing = before.doing if before is not None and ours else self._now.doing
            self._write(replace(self._now, state="failed", doing=doing, reason=reason[-_MAX_REASON:]))

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            self._write(self._now)

    def _is_our_failure(self, state: RunState) -> bool:
        return state.state == "failed" and state.start == self._now.start

    def _write(self, state: RunState) -> None:
        with self._lock, suppress(OSError):
            if state.state == "starting" and self._over.is_set():
                return
            before = read_state(self._folder)
            if before is not None and before.start != state.start and self._is_in_use():
                return
            if self._began and state.state == "starting" and before is not None and self._is_our_failure(before):
                return
            self._began, self._now = True, state
            path = self._folder / STATE
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = partial_path(path)
            content = asdict(state)
            del content["time"]  # readers use the file's modification time: the clocks of two hosts may differ
            partial.write_bytes(json.dumps(content).encode() + b"\n")
            os.replace(partial, path)

    def _is_in_use(self) -> bool:
        try:
            require_unlocked(self._folder, "run.dir")
        except UserError:
            return True
        return False
