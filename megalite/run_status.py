"""How a run is doing, from the files in its folder: nobody has to be asked who may not answer."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from megalite.checkpoint.weights import section_of_weights
from megalite.config import load_run_config
from megalite.errors import UserError
from megalite.heartbeat import Beat, laggards, read_beats
from megalite.stopping import DONE, STOPPED

State = Literal["running", "stopped", "done", "dead"]
TAIL_BYTES = 1 << 16
"""How much of a run's metrics is read, from the end: hundreds of steps."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What the files of a run tell of it at the time `now`, in seconds since 1970.

    `state` is running where a rank has written of late, and dead where none has and the run left no word of its end.
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

    @property
    def laggards(self) -> list[Beat]:
        """The ranks that hold the others up; none of a run that has ended."""
        return laggards(self.beats, self.now) if self.state in ("running", "dead") else []

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
    resolved = folder / "config.yaml"
    if not resolved.is_file():
        raise UserError(f"{folder}: holds no run: there is no {resolved.name}; give a run file, or a run's folder")
    config = load_run_config(resolved, [])
    now, ranks = time.time(), config.layout.world_size
    beats = read_beats(folder, ranks)
    return RunStatus(
        folder=folder,
        state=_state(folder, beats, now),
        now=now,
        ranks=ranks,
        total_steps=config.train.steps,
        steps=_last_steps(folder / "metrics.jsonl"),
        beats=beats,
        stopped=_read_json(folder / STOPPED),
    )


def _state(folder: Path, beats: Sequence[Beat], now: float) -> State:
    if (folder / DONE).is_file():
        return "done"
    if (folder / STOPPED).is_file():
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
