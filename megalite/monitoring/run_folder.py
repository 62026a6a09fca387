"""The files of a run's folder: their names, checks before a start, and moving an earlier run's files away."""

import json
import os
from contextlib import suppress
from pathlib import Path

from megalite.checkpoint.discovery import CHECKPOINTS
from megalite.checkpoint.retention import clean, set_aside_later
from megalite.config import RunConfig
from megalite.errors import UserError
from megalite.files import require_writable_folder, write_atomically, writing

STOP = "STOP"
"""A file of this name in the run's folder asks the run to stop."""
DONE = "DONE.json"
"""The file that a run writes after its last step."""
STOPPED = "STOPPED.json"
"""The file that a run writes if it stops on request before its last step."""

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
"""The files of a run in its folder, as glob patterns, without the logs of its ranks."""

FOLDERS = ("checkpoints", "logs", "tensorboard", "heartbeats", "spikes", "earlier")
APPENDED = ("metrics.jsonl", ".lock")
FILES = (*APPENDED, "config.yaml", DONE, STOPPED, "STATE.json", "loss.png")


def require_run_folder(folder: Path) -> None:
    """Raise UserError if a run cannot write its files in `folder`, which need not exist yet. Creates nothing.

    Errors are files in place of folders and folders in place of files, dangling links, and paths that this user cannot
    write. Links to folders are followed: checkpoints may be on another disk.
    """
    what, fix = f"run.dir={folder}", "set another run.dir"
    require_writable_folder(folder, what, fix)
    for name in FOLDERS:
        require_writable_folder(folder / name, what, f"move it away, or {fix}")
    for path in (folder / name for name in FILES):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{what}: {path} is a link to {os.readlink(path)}, which does not exist; remove the link")
        if path.is_dir():
            raise UserError(f"{what}: {path} is a folder, but must be a file; move it away, or {fix}")
        if path.name in APPENDED and path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise UserError(f"{what}: {path} is not writable; make it writable, or {fix}")


def prepare_run_folder(config: RunConfig, *, step: int, continues: bool) -> list[str]:
    """Prepare the folder of a run that starts after `step`; return lines about it for the console.

    A run that `continues` keeps its files up to `step`, and moves later checkpoints to ``earlier``. Any other run moves
    all files of the run before there.
    """
    folder, messages = config.run.dir, []
    with writing(folder, "make it writable, or set another run.dir"):
        folder.mkdir(parents=True, exist_ok=True)
        if continues:
            messages += [f"warning: {line}" for line in clean(folder / CHECKPOINTS)]
            for name in (DONE, STOPPED):  # they are about the end of the earlier start
                (folder / name).unlink(missing_ok=True)
            aside = next_earlier_folder(folder) / CHECKPOINTS
            moved, place = set_aside_later(folder / CHECKPOINTS, step, aside)
            if moved:
                messages.append(f"set aside: {', '.join(moved)}, to {place}")
            truncate_metrics(folder / "metrics.jsonl", step)
        else:
            set_aside_earlier_run(folder)
        write_atomically(folder / "config.yaml", config.to_yaml().encode())
    return messages


def set_aside_earlier_run(directory: Path) -> None:
    """Move an earlier run's files to ``earlier/1``, or the next free number, so that none is overwritten."""
    left = [path for name in RUN_FILES for path in sorted(directory.glob(name))]
    if not left:
        return
    aside = next_earlier_folder(directory)
    aside.mkdir(parents=True)
    for path in left:
        path.rename(aside / path.name)


def next_earlier_folder(directory: Path) -> Path:
    """Return the next free numbered folder in ``earlier``."""
    numbers = [int(path.name) for path in (directory / "earlier").glob("*") if path.name.isdigit()]
    return directory / "earlier" / str(max(numbers, default=0) + 1)


def truncate_metrics(path: Path, step: int) -> None:
    """Remove the lines after `step` from a run's metrics, and lines cut off by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with suppress(json.JSONDecodeError, KeyError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, b"".join(kept))
