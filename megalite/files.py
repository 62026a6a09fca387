"""Files that are there whole or not at all."""

import os
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is whole; in the same folder, ending ``.tmp``."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name: flush it to the disk, rename it, flush the folder."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file such that nobody ever finds half of it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
