"""Atomic file writes, an exclusive lock on a folder, checks before writing, and the file system's clock."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalite.errors import UserError

LOCK = ".lock"


def require_writable_folder(folder: Path, what: str, fix: str) -> None:
    """Raise UserError if `folder` is not writable, or does not exist and could not be created. Creates nothing.

    `what` names the folder at the start of the message; `fix` ends the message.
    """
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            if existing.is_symlink():
                target = os.readlink(existing)
                raise UserError(
                    f"{what}: {existing} is a link to {target}, which does not exist; make that folder or remove the "
                    "link"
                )
            existing = existing.parent
    except OSError as error:
        raise UserError(f"{what}: {existing} cannot be reached: {error.strerror}; {fix}") from error
    if not existing.is_dir():
        raise UserError(f"{what}: {existing} is not a folder; {fix}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what}: the folder {existing} is not writable; {fix}")


@contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Turn an OSError raised while writing `path`, or a file beside it, into a UserError that ends with `fix`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path}: cannot be written: {error.filename or path}: {reason}; {fix}") from error


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock (flock) on a folder, which is created; the kernel releases it when this process ends.

    `what` names the folder in messages. Raises UserError if another process holds the lock, and if the folder cannot be
    created or written to. On a file system without locks several processes may enter.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what}: {error.filename or folder}: {error.strerror}; set another folder") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise _in_use(what, lock.read()) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def require_unlocked(folder: Path, what: str) -> None:
    """Raise UserError if another process holds the `folder_lock`. Creates and changes nothing."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(what, (folder / LOCK).read_text(encoding="utf-8")) from None
    except OSError:
        return  # there is no lock file yet, or the file system has no locks


def _in_use(what: str, holder: str) -> UserError:
    return UserError(f"{what} is in use by {holder.strip() or 'another run'}; wait for its end, or set another folder")


def filesystem_time(folder: Path) -> float:
    """Return the current time by the clock of a folder's file system, in seconds since 1970.

    A file server sets the times of files, and its clock may be minutes away from this host's. If the folder is not
    writable, this host's time is returned.
    """
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def to_filesystem_time(folder: Path, moment: float) -> float:
    """Convert a `moment` of this host's clock to the clock of a folder's file system, both in seconds since 1970.

    Returns `moment` itself if the clocks agree within a second: the kernel gives files slightly older times.
    """
    ahead = filesystem_time(folder) - time.time()
    return moment if abs(ahead) < 1.0 else moment + ahead


def partial_path(path: Path) -> Path:
    """Return the temporary name under which this process writes `path`: in the same folder, ending in ``.tmp``."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def publish(partial: Path, path: Path) -> None:
    """Rename a finished file atomically to its final name: flush it to the disk, rename it, flush the folder."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file atomically: a reader finds the old content or the new. Creates the folder."""
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
