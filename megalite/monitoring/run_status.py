"""The state of a run, read from the files in its folder alone, so that it works for runs that hang or have died."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from megalite.config import load_run_config
from megalite.convert.open import run_of, section_of_weights
from megalite.errors import UserError
from megalite.files import filesystem_time
from megalite.monitoring.heartbeat import SILENT_SECONDS, Heartbeat, read_heartbeats, slow_ranks
from megalite.monitoring.run_folder import DONE, STOPPED
from megalite.monitoring.run_state import RunState, read_state

State = Literal["starting", "running", "stopped", "done", "failed", "dead"]
TAIL_BYTES = 1 << 16
"""The number of bytes that are read from the end of a run's metrics: hundreds of steps."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of a run at the time `now`, in seconds since 1970 by the clock of its files' file system.

    `state` is starting or running if a process wrote recently, and dead if none did and no file records an end.
    """

    folder: Path
    state: State
    now: float
    ranks: int
    total_steps: int
    steps: Sequence[dict[str, Any]]
    """The last lines of training steps in the metrics."""
    heartbeats: Sequence[Heartbeat]
    stopped: dict[str, Any]
    """The content of STOPPED.json; empty if it is missing."""
    state_file: RunState | None = None
    """The content of STATE.json; None if it is missing."""

    @property
    def slow_ranks(self) -> list[Heartbeat]:
        """The ranks that delay, or delayed, the others; empty for a run that was starting, stopped or is done."""
        return slow_ranks(self.heartbeats, self.now) if self.has_ranks else []

    @property
    def has_ranks(self) -> bool:
        """Whether the heartbeats are those of ranks in training, which may have died since."""
        if self.state == "failed":
            return self.state_file is not None and not self.state_file.doing
        return self.state == "running" or (
            self.state == "dead" and (self.state_file is None or self.state_file.state != "starting")
        )

    @property
    def missing(self) -> list[int]:
        """The ranks that have not written a heartbeat yet."""
        return sorted(set(range(self.ranks)) - {beat.rank for beat in self.heartbeats})

    @property
    def seconds_left(self) -> float | None:
        """The estimated time for the remaining steps, from the mean of the last steps."""
        if not self.steps:
            return None
        return (self.total_steps - self.steps[-1]["step"]) * fmean(step["step_seconds"] for step in self.steps[-50:])


def run_status(path: Path) -> RunStatus:
    """Read the state of a run, given by its run file or its folder.

    Raises UserError if there is no run.
    """
    folder = path if path.is_dir() else load_run_config(path, [], section_of_weights).run.dir
    resolved, state_file = folder / "config.yaml", read_state(folder)
    if not resolved.is_file() and state_file is None:
        raise UserError(
            f"{folder}: holds no run: it has no {resolved.name}; give a run file, a run's folder, or a folder of runs"
        )
    now = filesystem_time(folder)
    ranks, steps = _ranks_and_steps(resolved, state_file)
    heartbeats = read_heartbeats(folder, ranks)
    return RunStatus(
        folder=folder,
        state=_state(folder, heartbeats, state_file, now),
        now=now,
        ranks=ranks,
        total_steps=steps,
        steps=_last_steps(folder / "metrics.jsonl"),
        heartbeats=heartbeats,
        stopped=_read_json(folder / STOPPED),
        state_file=state_file,
    )


def _ranks_and_steps(resolved: Path, state_file: RunState | None) -> tuple[int, int]:
    """Return the number of ranks and of steps of a run, from its resolved run file or from STATE.json."""
    if state_file is not None and (not resolved.is_file() or state_file.state in ("starting", "failed")):
        return state_file.ranks, state_file.steps  # config.yaml is of an earlier start, or does not exist yet
    try:
        config = load_run_config(resolved, [])
    except UserError:  # such as a plugin that is in another working directory
        if state_file is None:
            raise
        return state_file.ranks, state_file.steps
    return config.layout.world_size, config.train.steps


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs in `folder` and in its subfolders, by name; none if `folder` itself is a run's."""
    inside = _folders(folder) if run_of(folder) is None else []
    return [run for path in inside for run in ([path] if run_of(path) else filter(run_of, _folders(path)))]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _state(folder: Path, heartbeats: Sequence[Heartbeat], state_file: RunState | None, now: float) -> State:
    if state_file is not None and state_file.state == "starting":  # the other files are of an earlier run
        return "starting" if state_file.is_alive(now, SILENT_SECONDS) else "dead"
    if state_file is not None and state_file.state == "failed":
        return "failed"
    if (folder / DONE).is_file():
        return "done"
    if (folder / STOPPED).is_file() or (state_file is not None and state_file.state == "stopped"):
        return "stopped"
    return "running" if any(not beat.is_silent(now) for beat in heartbeats) else "dead"


def _last_steps(metrics: Path) -> list[dict[str, Any]]:
    found = []
    with suppress(OSError), metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            with suppress(ValueError):  # the first line may be cut off, the last may be incomplete
                entry = json.loads(line)
                if isinstance(entry, dict) and _is_step(entry):
                    found.append(entry)
    return found


def _is_step(entry: dict[str, Any]) -> bool:
    numbers = [entry.get(name) for name in ("step", "tokens_per_second", "step_seconds")]
    return "loss" in entry and all(isinstance(number, int | float) for number in [*numbers, entry["loss"] or 0.0])


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}
