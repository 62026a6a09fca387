"""Files that are there whole or not at all."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalite.errors import UserError

LOCK = ".lock"


def require_writable_folder(folder: Path, what: str, fix: str) -> None:
    """Raise UserError where `folder` is none and cannot become one, or cannot be written in; makes nothing."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            if existing.is_symlink():
                target = os.readlink(existing)
                raise UserError(
                    f"{what}: {existing} is a link to {target}, which is not there; make that folder or remove the link"
                )
            existing = existing.parent
    except OSError as error:
        raise UserError(f"{what}: {existing} cannot be reached: {error.strerror}; {fix}") from error
    if not existing.is_dir():
        raise UserError(f"{what}: {existing} is no folder; {fix}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what}: the folder {existing} cannot be written in; {fix}")


@contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Turn the system's refusal to write `path`, or a file beside it, into a UserError that ends with `fix`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path}: cannot be written: {error.filename or path}: {reason}; {fix}") from error


@contextmanager
def sole_user(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, which is made; the system lets go when this process ends.

    Raises UserError where one is in, and where the folder cannot be made or written in. A file system that knows no
    locks keeps nobody out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what}: {error.filename or folder}: {error.strerror}; set another") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{what} is in use by {lock.read().strip() or 'another run'}; wait for its end, or set another"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def require_unused(folder: Path, what: str) -> None:
    """Raise UserError where `sole_user` would; makes and changes nothing."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = (folder / LOCK).read_text(encoding="utf-8").strip()
        raise UserError(f"{what} is in use by {text or 'another run'}; wait for its end, or set another") from None
    except OSError:
        return  # no lock yet, or a file system that knows none


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
