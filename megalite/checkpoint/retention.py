"""Which checkpoints of a run are kept, and how the others go: by a rename first, so that none is ever half there."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.reader import REPLACED, checkpoints
from megalite.checkpoint.store import TEMPORARY, remove


def kept(steps: Sequence[int], keep_last: int | None, keep_every: int | None) -> set[int]:
    """Return the steps whose checkpoints stay: the `keep_last` newest and every multiple of `keep_every`.

    >>> sorted(kept([10, 20, 30, 40, 50], keep_last=2, keep_every=20))
    [20, 40, 50]
    """
    if keep_last is None:
        return set(steps)
    newest = sorted(steps)[-keep_last:]
    return {step for step in steps if step in newest or (keep_every and step % keep_every == 0)}


def prune(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Remove the checkpoints of `root` that do not stay, the oldest first, and return them."""
    found = checkpoints(root)
    stay = kept([step for step, _ in found], keep_last, keep_every)
    gone = [folder for step, folder in reversed(found) if step not in stay]
    for folder in gone:
        leaving = folder.with_name(folder.name + TEMPORARY)
        folder.rename(leaving)
        shutil.rmtree(leaving)
    return gone


def clean(root: Path) -> None:
    """Remove what saves and removals that were killed have left; a checkpoint that stood aside for one of the same step
    gets its name back where that one is not there."""
    for aside in root.glob(f"step_*{REPLACED}") if root.is_dir() else ():
        folder = aside.with_name(aside.name.removesuffix(REPLACED))
        if folder.exists():
            remove(aside)
        else:
            aside.rename(folder)
    for left in root.glob(f"step_*{TEMPORARY}") if root.is_dir() else ():
        shutil.rmtree(left)


def set_aside_later(root: Path, step: int, aside: Path) -> list[str]:
    """Move checkpoints after `step` out of the way of a run that goes on from there; return their names."""
    moved = []
    for later, folder in checkpoints(root):
        if later > step:
            aside.mkdir(parents=True, exist_ok=True)
            folder.rename(aside / folder.name)
            moved.append(folder.name)
    return moved
