"""Find the checkpoints of a run, newest first, and those from which it may resume."""

from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.manifest import MANIFEST
from megalite.checkpoint.store import REPLACED, TEMPORARY
from megalite.config import RunConfig
from megalite.errors import UserError, nearest

CHECKPOINTS = "checkpoints"


def find_checkpoints(root: Path) -> Sequence[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, newest first.

    A checkpoint ``step_N.replaced``, which a new save of the same step set aside, counts while there is no ``step_N``.
    """
    found: dict[int, Path] = {}
    for path in sorted(root.glob("step_*")) if root.is_dir() else ():
        number = path.name.removeprefix("step_").removesuffix(REPLACED)
        if path.is_dir() and number.isdigit():
            found.setdefault(int(number), path)  # step_N is sorted before step_N.replaced
    return sorted(found.items(), reverse=True)


def unfinished_saves(root: Path) -> list[Path]:
    """Return the folders of saves that are under way, or whose ranks died."""
    return sorted(path for path in root.glob(f"step_*{TEMPORARY}") if path.is_dir())


def checkpoint_root(path: Path) -> Path | None:
    """Return the folder that holds checkpoints or unfinished saves: `path` or that of a run; None if neither does."""
    return next((root for root in (path, path / CHECKPOINTS) if find_checkpoints(root) or unfinished_saves(root)), None)


def resume_candidates(config: RunConfig) -> list[Path]:
    """Return the checkpoint folders that the setting `resume` allows, best first; none if the run starts anew."""
    if config.resume == "never":
        return []
    if config.resume == "auto":
        return [folder for _, folder in find_checkpoints(config.run.dir / CHECKPOINTS)]
    folder = Path(config.resume)
    if not (folder / MANIFEST).is_file() or folder.name.endswith(TEMPORARY):
        raise UserError(f"resume={folder}: is not a checkpoint; {_suggestion(config, folder)}")
    return [folder]


def _suggestion(config: RunConfig, folder: Path) -> str:
    """Suggest a value for `resume`: the newest checkpoint in the folder, or a checkpoint of a similar name."""
    for root in (folder, folder / CHECKPOINTS):
        if newest := find_checkpoints(root):
            return f"the newest checkpoint there is {newest[0][1]}"
    beside = [str(path) for root in (folder.parent, config.run.dir / CHECKPOINTS) for _, path in find_checkpoints(root)]
    close = nearest(str(folder), ["auto", "never", *beside]).removeprefix("; ")
    return close if close.startswith("did you mean") else "write auto, never, or the path of a folder step_N"
