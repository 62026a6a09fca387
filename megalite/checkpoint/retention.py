"""Checkpoint retention: which checkpoints of a run are kept; the others are renamed, then removed."""

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megalite.checkpoint.discovery import find_checkpoints
from megalite.checkpoint.store import REPLACED, TEMPORARY, remove_tree, rename_to_free
from megalite.errors import UserError


def retained_steps(steps: Sequence[int], keep_last: int | None, keep_every: int | None) -> set[int]:
    """Return the steps whose checkpoints are kept: the `keep_last` newest and every multiple of `keep_every`.

    >>> sorted(retained_steps([10, 20, 30, 40, 50], keep_last=2, keep_every=20))
    [20, 40, 50]
    """
    if keep_last is None:
        return set(steps)
    newest = sorted(steps)[-keep_last:]
    return {step for step in steps if step in newest or (keep_every and step % keep_every == 0)}


def prune(
    root: Path,
    keep_last: int | None,
    keep_every: int | None,
    warn: Callable[[Path, str], None] = lambda folder, reason: None,
) -> list[Path]:
    """Remove the checkpoints of `root` that are not kept, oldest first, and return the removed folders.

    Of a symbolic link only the link is removed. A checkpoint that cannot be removed, such as a mount or a file in use,
    does not end the run: `warn` is called with its folder and the reason.
    """
    found = find_checkpoints(root)
    retained = retained_steps([step for step, _ in found], keep_last, keep_every)
    removed = []
    for folder in (folder for step, folder in reversed(found) if step not in retained):
        try:
            leaving = rename_to_free(folder, folder.name)
        except OSError as error:
            warn(folder, f"it cannot be removed and stays: {_reason(error)}")
            continue
        removed.append(folder)
        if leaving.is_symlink():
            warn(folder, f"it is a link: the link is removed, and {os.readlink(leaving)} stays")
        if (error := remove_tree(leaving)) is not None:
            warn(folder, f"a part of it cannot be removed and stays in {leaving}: {_reason(error)}")
    return removed


def clean(root: Path) -> list[str]:
    """Remove the leftovers of killed saves and removals, and restore a replaced checkpoint whose successor is missing.

    Returns a warning for each leftover that cannot be removed, which does not prevent a start.
    """
    warnings = []
    for aside in sorted(root.glob(f"step_*{REPLACED}")) if root.is_dir() else ():
        folder = aside.with_name(aside.name.removesuffix(REPLACED))
        try:
            if not folder.exists():
                aside.rename(folder)
                continue
            error = remove_tree(aside)
        except OSError as refusal:
            error = refusal
        if error is not None:
            warnings.append(f"{aside}: cannot be removed and stays: {_reason(error)}")
    for left in sorted(root.glob(f"step_*{TEMPORARY}")) if root.is_dir() else ():
        if (error := remove_tree(left)) is not None:
            warnings.append(f"{left}: cannot be removed and stays: {_reason(error)}")
    return warnings


def set_aside_later(root: Path, step: int, aside: Path) -> tuple[list[str], Path]:
    """Move the checkpoints after `step` away, since the run resumes from `step`; return their names and the new folder.

    The new folder is `aside` or, if that is on another file system, a folder in `root`. Raises UserError if a
    checkpoint cannot be moved: the next start would resume from it.
    """
    moved = []
    for later, folder in find_checkpoints(root):
        if later > step:
            try:
                aside = _move(folder, aside, root)
            except OSError as error:
                raise UserError(
                    f"{folder}: is of a later step than {step:,}, from which the run resumes, and cannot be moved: "
                    f"{_reason(error)}; move it away"
                ) from error
            moved.append(folder.name)
    return moved, aside


def _move(folder: Path, aside: Path, root: Path) -> Path:
    """Move a folder into `aside`, or into a folder in `root` across file systems; return the folder it is in now."""
    aside.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(aside / folder.name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The folder `checkpoints` may be a link to another disk.
        beside = root / f"earlier_{aside.parent.name}"
        beside.mkdir(exist_ok=True)
        folder.rename(beside / folder.name)
        with suppress(OSError):
            aside.rmdir()
        return beside
    return aside


def _reason(error: OSError) -> str:
    file = f"{error.filename}: " if error.filename else ""
    return f"{file}{error.strerror or type(error).__name__}"
