"""What a run of `preprocess` has finished so far: a folder beside its output, which one run at a time may hold."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalite.data.indexed.format import with_suffix
from megalite.data.preprocess.encode_shard import ShardFiles
from megalite.errors import UserError


class WorkFolder:
    """``PREFIX.work``: the tokens of the shards that are finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = False
        """Whether nobody will ever go on from it."""

    @property
    def keep(self) -> bool:
        """Whether there is something in it that the next run can go on from."""
        return not self.done and any(self.path.glob("*.json"))

    def shard(self, number: int) -> ShardFiles:
        """Return where the tokens of a shard belong."""
        return ShardFiles(self.path / f"{number:08d}")

    def how_to_resume(self) -> str:
        """Return what to tell the user of a run that did not end."""
        if not self.keep:
            return "nothing is kept, since no shard was finished"
        return f"finished shards stay in {self.path}: the same command again goes on from there"

    def folder(self, name: str) -> Path:
        """Return a new, empty folder within."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path


@contextmanager
def work_folder(prefix: Path) -> Iterator[WorkFolder]:
    """Hold the work folder of an output; it goes away at the end unless a run can go on from it.

    Raises UserError while another run holds it.
    """
    path = with_suffix(prefix, ".work")
    lock = _lock(path)
    folder = WorkFolder(path)
    try:
        yield folder
    finally:
        if not folder.keep:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _lock(path: Path) -> int:
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR)
        except FileNotFoundError:  # the run before has just taken its folder away
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path / "lock")):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"{path}: held by another run that writes the same output; wait for it, or give another --output"
            ) from None
        except FileNotFoundError:
            pass
        os.close(lock)
