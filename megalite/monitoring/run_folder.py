"""The files in a run's folder: their names, whether a run can keep them there, and what an earlier run left."""

import json
import os
from contextlib import suppress
from pathlib import Path

from megalite.errors import UserError
from megalite.files import require_writable_folder, write_atomically

STOP = "STOP"
"""A file of this name in the run's folder asks the run to stop."""
DONE = "DONE.json"
"""What a run leaves that went to its last step."""
STOPPED = "STOPPED.json"
"""What a run leaves that stopped before its last step since it was asked to."""

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "tensorboard",
    DONE,
    STOPPED,
    "loss.png",
    "timeline_step_*",
    "spikes",
    "checkpoints",
)
"""What a run leaves in its folder, the logs of its ranks aside."""

FOLDERS = ("checkpoints", "logs", "tensorboard", "heartbeats", "spikes", "earlier")
APPENDED = ("metrics.jsonl", ".lock")
FILES = (*APPENDED, "config.yaml", DONE, STOPPED, "STATE.json", "loss.png")


def require_run_folder(folder: Path) -> None:
    """Raise UserError where a run cannot keep its files in `folder`, which need not be there yet; makes nothing.

    Refused are files where the run keeps folders and folders where it keeps files, links that lead nowhere, and what
    this user cannot write. Links to folders are followed: checkpoints may lie on another disk.
    """
    what, fix = f"run.dir={folder}", "set another run.dir"
    require_writable_folder(folder, what, fix)
    for name in FOLDERS:
        require_writable_folder(folder / name, what, f"move it away, or {fix}")
    for path in (folder / name for name in FILES):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{what}: {path} is a link to {os.readlink(path)}, which is not there; remove the link")
        if path.is_dir():
            raise UserError(f"{what}: {path} is a folder, where the run keeps a file; move it away, or {fix}")
        if path.name in APPENDED and path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise UserError(f"{what}: {path} cannot be written; make it writable, or {fix}")


def set_aside_earlier_run(directory: Path) -> None:
    """Move what an earlier run left in its folder to ``earlier/1``, or the next number: nothing is written over."""
    left = [path for name in RUN_FILES for path in sorted(directory.glob(name))]
    if not left:
        return
    aside = next_aside(directory)
    aside.mkdir(parents=True)
    for path in left:
        path.rename(aside / path.name)


def next_aside(directory: Path) -> Path:
    """Return the folder below ``earlier`` that comes next."""
    numbers = [int(path.name) for path in (directory / "earlier").glob("*") if path.name.isdigit()]
    return directory / "earlier" / str(max(numbers, default=0) + 1)


def keep_metrics_until(path: Path, step: int) -> None:
    """Take out of a run's metrics what comes after `step`, and a last line that a crash tore."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with suppress(json.JSONDecodeError, KeyError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, b"".join(kept))
