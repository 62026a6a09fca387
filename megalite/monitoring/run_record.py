"""Run record: writes to a run's folder that it runs, and how it ended."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from megalite.checkpoint.discovery import CHECKPOINTS
from megalite.files import write_atomically
from megalite.monitoring.callback import Callback, RunEnd, RunStart
from megalite.monitoring.run_folder import DONE, STOPPED
from megalite.monitoring.run_state import RunStateWriter


class RunRecord(Callback):
    """Writes STATE.json, and DONE.json or STOPPED.json at the end, on rank 0. Call it after the other callbacks."""

    def __init__(
        self, marker: RunStateWriter | None, info: Callable[[str], None], on_stopped: Callable[[], None]
    ) -> None:
        """`marker` writes STATE.json, `info` prints a line, and `on_stopped` is called after STOPPED.json is there."""
        self._marker, self._info, self._on_stopped = marker, info, on_stopped

    def on_start(self, start: RunStart) -> None:
        self._config, self._is_rank_zero = start.config, start.mesh.rank == 0
        if self._marker is not None:
            self._marker.running()

    def on_end(self, end: RunEnd) -> None:
        if not self._is_rank_zero:
            return
        config, folder = self._config, self._config.run.dir
        saved = folder / CHECKPOINTS / f"step_{end.step}"
        checkpoint = str(saved) if saved.is_dir() else None
        reason = end.stopped_by
        if end.complete:
            self._write(DONE, {"step": config.train.steps, "tokens": end.tokens})
        elif reason is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._write(STOPPED, {"step": end.step, "reason": reason, "checkpoint": checkpoint, "time": now})
            self._on_stopped()
        else:
            reason = f"train.stop_after={config.train.stop_after}"
        if self._marker is not None:
            state = "done" if end.complete else "stopped"
            self._marker.ended(state, step=end.step, reason=reason, checkpoint=checkpoint)
        self._info(f"run: {folder}")

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self._config.run.dir / name, json.dumps(content).encode() + b"\n")
