"""What lies in a run's folder before the run starts: whether it can be used as what the run will keep there."""

import os
from pathlib import Path

from megalite.errors import UserError
from megalite.files import require_writable_folder

FOLDERS = ("checkpoints", "logs", "tensorboard", "heartbeats", "spikes", "earlier")
APPENDED = ("metrics.jsonl", ".lock")
FILES = (*APPENDED, "config.yaml", "DONE.json", "STOPPED.json", "STATE.json", "loss.png")


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
