"""STATE.json in a run's folder: what the run is doing before it trains, and how it ended.

A start writes the file from its first second and writes it again every few seconds until training begins, so that
`status` can tell a start that goes on from one that was killed. From then on the heartbeats of the ranks tell that, and
the file says ``running`` until the run ends. DONE.json and STOPPED.json stay what scripts may rely on.
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
_WORDS = 2000
"""Characters of a failure's message that are kept."""

State = Literal["starting", "running", "stopped", "failed", "done"]


@dataclass(frozen=True, slots=True)
class RunState:
    """The content of STATE.json. `start` is a name that the processes of one start share, `time` is when the file was
    last written by the clock of its file system, in seconds since 1970."""

    state: State
    start: str
    ranks: int
    steps: int
    """Of the whole run."""
    host: str
    pid: int
    doing: str = ""
    """What a start is doing, or was when it failed; empty once training has begun."""
    reason: str | None = None
    """Why the run stopped or failed."""
    step: int | None = None
    """After which it ended."""
    checkpoint: str | None = None
    """From which it can go on."""
    time: float = 0.0

    def is_going_on(self, now: float, silent_seconds: float) -> bool:
        """Whether a start has written of late, or its process runs on this host and may be about to."""
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
    """Return what a run's STATE.json says; None where there is none, or none that can be understood."""
    path = folder / STATE
    with suppress(OSError, ValueError, TypeError):
        found = RunState(**{**json.loads(path.read_bytes()), "time": path.stat().st_mtime})
        numbers = (found.ranks, found.steps, found.pid, *(() if found.step is None else (found.step,)))
        if found.state in get_args(State) and all(isinstance(number, int) for number in numbers):
            return found
    return None


class RunMarker:
    """Writes STATE.json for one start, from one process at a time: the launcher, then rank 0.

    It never writes over the word of another run that is in the folder, and nothing that it cannot write is an error.
    """

    def __init__(
        self, folder: Path, start: str, *, ranks: int, steps: int, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Write for the start that its processes call `start`; `tell` hears what the start is doing."""
        self._folder, self._tell = folder, tell
        self._now = RunState("starting", start, ranks, steps, socket.gethostname(), os.getpid())
        self._lock, self._over = threading.Lock(), threading.Event()
        self._began = False

    def starting(self, doing: str) -> None:
        """Say what the start is doing, to the console and to `status`."""
        self._tell(doing)
        self._write(replace(self._now, doing=doing))

    def keep_fresh(self) -> None:
        """Write the file again every few seconds, in a thread, as long as the start goes on."""
        threading.Thread(target=self._refresh, name="run-state", daemon=True).start()

    def running(self) -> None:
        """Say that training begins."""
        self._over.set()
        self._write(replace(self._now, state="running", doing=""))

    def ended(self, state: State, *, step: int, reason: str | None = None, checkpoint: str | None = None) -> None:
        """Say how the run ended, and after which step."""
        self._over.set()
        self._write(replace(self._now, state=state, doing="", reason=reason, step=step, checkpoint=checkpoint))

    def failed(self, reason: str) -> None:
        """Say that the run failed, unless another process of this start has said so before."""
        self._over.set()
        before = read_state(self._folder)
        if before is None or not self._began or not self._is_our_failure(before):
            # Rank 0 may have gone on where the launcher has left the word to it.
            ours = before is not None and before.start == self._now.start
            doing = before.doing if before is not None and ours else self._now.doing
            self._write(replace(self._now, state="failed", doing=doing, reason=reason[-_WORDS:]))

    def cleared(self) -> None:
        """Remove the file where it still says that this start goes on: it was refused, or had nothing to do."""
        self._over.set()
        before = read_state(self._folder)
        if before is not None and (before.state, before.start) == ("starting", self._now.start):
            with suppress(OSError):
                (self._folder / STATE).unlink()

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
            del content["time"]  # the file system's clock says it: those of two hosts may differ
            partial.write_bytes(json.dumps(content).encode() + b"\n")
            os.replace(partial, path)

    def _is_in_use(self) -> bool:
        try:
            require_unlocked(self._folder, "run.dir")
        except UserError:
            return True
        return False
