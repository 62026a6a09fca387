"""Which checkpoints a run has, the newest first, and which of them it may go on from."""

from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.manifest import MANIFEST
from megalite.checkpoint.store import REPLACED, TEMPORARY
from megalite.config import RunConfig
from megalite.errors import UserError, nearest

CHECKPOINTS = "checkpoints"


def checkpoints(root: Path) -> Sequence[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, the newest first.

    A checkpoint that stands aside for one of the same step counts as long as that one is not there.
    """
    found: dict[int, Path] = {}
    for path in sorted(root.glob("step_*")) if root.is_dir() else ():
        number = path.name.removeprefix("step_").removesuffix(REPLACED)
        if path.is_dir() and number.isdigit():
            found.setdefault(int(number), path)  # step_N is sorted before step_N.replaced
    return sorted(found.items(), reverse=True)


def unfinished(root: Path) -> list[Path]:
    """Return the folders of saves that are under way, or died."""
    return sorted(path for path in root.glob(f"step_*{TEMPORARY}") if path.is_dir())


def folder_of_checkpoints(path: Path) -> Path | None:
    """Return which folder holds checkpoints or saves that did not end: `path`, or that of a run; None for neither."""
    return next((root for root in (path, path / CHECKPOINTS) if checkpoints(root) or unfinished(root)), None)


def candidates(config: RunConfig) -> list[Path]:
    """Return the folders that `resume` allows, the best first; none where the run begins anew."""
    if config.resume == "never":
        return []
    if config.resume == "auto":
        return [folder for _, folder in checkpoints(config.run.dir / CHECKPOINTS)]
    folder = Path(config.resume)
    if not (folder / MANIFEST).is_file() or folder.name.endswith(TEMPORARY):
        raise UserError(f"resume={folder}: is no checkpoint; {_nearest(config, folder)}")
    return [folder]


def _nearest(config: RunConfig, folder: Path) -> str:
    """What may have been meant: the newest of a folder of checkpoints, or one of a name that is close."""
    for root in (folder, folder / CHECKPOINTS):
        if newest := checkpoints(root):
            return f"the newest there is {newest[0][1]}"
    beside = [str(path) for root in (folder.parent, config.run.dir / CHECKPOINTS) for _, path in checkpoints(root)]
    close = nearest(str(folder), ["auto", "never", *beside]).removeprefix("; ")
    return close if close.startswith("did you mean") else "write auto, never, or the path of a folder step_N"
