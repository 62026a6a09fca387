"""How a run is doing, from the files in its folder: nobody has to be asked who may not answer."""

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
from megalite.files import file_clock
from megalite.monitoring.heartbeat import SILENT_SECONDS, Beat, laggards, read_beats
from megalite.monitoring.run_folder import DONE, STOPPED
from megalite.monitoring.run_state import RunState, read_state

State = Literal["starting", "running", "stopped", "done", "failed", "dead"]
TAIL_BYTES = 1 << 16
"""How much of a run's metrics is read, from the end: hundreds of steps."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What the files of a run tell of it at the time `now`, in seconds since 1970 by the clock of their file system.

    `state` is starting or running where a process has written of late, and dead where none has and the run left no word
    of its end.
    """

    folder: Path
    state: State
    now: float
    ranks: int
    total_steps: int
    steps: Sequence[dict[str, Any]]
    """The last lines of the metrics that are of training steps."""
    beats: Sequence[Beat]
    stopped: dict[str, Any]
    """The content of STOPPED.json, if there is one."""
    told: RunState | None = None
    """The content of STATE.json, if there is one."""

    @property
    def laggards(self) -> list[Beat]:
        """The ranks that hold the others up, or held them up; none of a run that has ended well or was starting."""
        return laggards(self.beats, self.now) if self.has_ranks else []

    @property
    def has_ranks(self) -> bool:
        """Whether the heartbeats are those of ranks in training, be it that they have ended without its end."""
        if self.state == "failed":
            return self.told is not None and not self.told.doing
        return self.state == "running" or (
            self.state == "dead" and (self.told is None or self.told.state != "starting")
        )

    @property
    def missing(self) -> list[int]:
        """The ranks that have not written yet."""
        return sorted(set(range(self.ranks)) - {beat.rank for beat in self.beats})

    @property
    def seconds_left(self) -> float | None:
        """How long the steps that are left will take at the pace of the last ones."""
        if not self.steps:
            return None
        return (self.total_steps - self.steps[-1]["step"]) * fmean(step["step_seconds"] for step in self.steps[-50:])


def run_status(path: Path) -> RunStatus:
    """Read the state of a run, given by its run file or its folder.

    Raises UserError where there is no run.
    """
    folder = path if path.is_dir() else load_run_config(path, [], section_of_weights).run.dir
    resolved, told = folder / "config.yaml", read_state(folder)
    if not resolved.is_file() and told is None:
        raise UserError(
            f"{folder}: holds no run: there is no {resolved.name}; give a run file, a run's folder, or a folder of runs"
        )
    now = file_clock(folder)
    if resolved.is_file() and (told is None or told.state in ("running", "done", "stopped")):
        config = load_run_config(resolved, [])
        ranks, steps = config.layout.world_size, config.train.steps
    else:  # the file is of an earlier start, or is not there yet
        assert told is not None
        ranks, steps = told.ranks, told.steps
    beats = read_beats(folder, ranks)
    return RunStatus(
        folder=folder,
        state=_state(folder, beats, told, now),
        now=now,
        ranks=ranks,
        total_steps=steps,
        steps=_last_steps(folder / "metrics.jsonl"),
        beats=beats,
        stopped=_read_json(folder / STOPPED),
        told=told,
    )


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder that is no run's, or in folders of it that are no run's, by name."""
    inside = _folders(folder) if run_of(folder) is None else []
    return [run for path in inside for run in ([path] if run_of(path) else filter(run_of, _folders(path)))]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _state(folder: Path, beats: Sequence[Beat], told: RunState | None, now: float) -> State:
    if told is not None and told.state == "starting":  # whatever an earlier run has left
        return "starting" if told.is_going_on(now, SILENT_SECONDS) else "dead"
    if told is not None and told.state == "failed":
        return "failed"
    if (folder / DONE).is_file():
        return "done"
    if (folder / STOPPED).is_file() or (told is not None and told.state == "stopped"):
        return "stopped"
    return "running" if any(not beat.is_silent(now) for beat in beats) else "dead"


def _last_steps(metrics: Path) -> list[dict[str, Any]]:
    found = []
    with suppress(OSError), metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            with suppress(ValueError):  # of a line that is cut, or being written
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
