"""Which checkpoints of a run are kept, and how the others go: by a rename first, so that none is ever half there."""

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megalite.checkpoint.discovery import checkpoints
from megalite.checkpoint.store import REPLACED, TEMPORARY, remove_what_can_be, rename_to_free
from megalite.errors import UserError


def kept(steps: Sequence[int], keep_last: int | None, keep_every: int | None) -> set[int]:
    """Return the steps whose checkpoints stay: the `keep_last` newest and every multiple of `keep_every`.

    >>> sorted(kept([10, 20, 30, 40, 50], keep_last=2, keep_every=20))
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
    tell: Callable[[Path, str], None] = lambda folder, why: None,
) -> list[Path]:
    """Remove the checkpoints of `root` that do not stay, the oldest first, and return those that went.

    Of a link the link goes, and what it leads to stays. One that cannot be removed, a mount or a file of it that is in
    use say, is no reason to end a run: `tell` is called with its folder and with what happened to it.
    """
    found = checkpoints(root)
    stay = kept([step for step, _ in found], keep_last, keep_every)
    gone = []
    for folder in (folder for step, folder in reversed(found) if step not in stay):
        try:
            leaving = rename_to_free(folder, folder.name)
        except OSError as error:
            tell(folder, f"it cannot be removed and stays: {_reason(error)}")
            continue
        gone.append(folder)
        if leaving.is_symlink():
            tell(folder, f"it is a link: the link is removed, and {os.readlink(leaving)} stays")
        if (error := remove_what_can_be(leaving)) is not None:
            tell(folder, f"a part of it cannot be removed and stays in {leaving}: {_reason(error)}")
    return gone


def clean(root: Path) -> list[str]:
    """Remove what saves and removals that were killed have left; a checkpoint that stood aside for one of the same step
    gets its name back where that one is not there.

    Returns a line for each that cannot be removed, which is no reason not to start.
    """
    warnings = []
    for aside in sorted(root.glob(f"step_*{REPLACED}")) if root.is_dir() else ():
        folder = aside.with_name(aside.name.removesuffix(REPLACED))
        try:
            if not folder.exists():
                aside.rename(folder)
                continue
            error = remove_what_can_be(aside)
        except OSError as refusal:
            error = refusal
        if error is not None:
            warnings.append(f"{aside}: cannot be removed and stays: {_reason(error)}")
    for left in sorted(root.glob(f"step_*{TEMPORARY}")) if root.is_dir() else ():
        if (error := remove_what_can_be(left)) is not None:
            warnings.append(f"{left}: cannot be removed and stays: {_reason(error)}")
    return warnings


def set_aside_later(root: Path, step: int, aside: Path) -> tuple[list[str], Path]:
    """Move checkpoints after `step` out of the way of a run that goes on from there; return their names, and where they
    are now: in `aside` or, where that is another file system, in a folder beside them.

    Raises UserError where one cannot be moved: the next start would go on from it.
    """
    moved = []
    for later, folder in checkpoints(root):
        if later > step:
            try:
                aside = _move(folder, aside, root)
            except OSError as error:
                raise UserError(
                    f"{folder}: is of a later step than {step:,}, from where the run goes on, and cannot be set aside: "
                    f"{_reason(error)}; move it away"
                ) from error
            moved.append(folder.name)
    return moved, aside


def _move(folder: Path, aside: Path, root: Path) -> Path:
    """Move a folder below `aside`; return where it is now."""
    aside.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(aside / folder.name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # `checkpoints` may be a link to another disk.
        beside = root / f"earlier_{aside.parent.name}"
        beside.mkdir(exist_ok=True)
        folder.rename(beside / folder.name)
        with suppress(OSError):
            aside.rmdir()
        return beside
    return aside


def _reason(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or type(error).__name__}"
