"""Disk space of a run's checkpoints, computed before the first step: how many are kept and how large they are."""

import shutil
from dataclasses import dataclass

from megalite.checkpoint.discovery import CHECKPOINTS, find_checkpoints
from megalite.checkpoint.retention import retained_steps
from megalite.config import RunConfig

MAKE_ROOM = "free disk space, keep fewer checkpoints (checkpoint.keep_last), or set another run.dir"


@dataclass(frozen=True, slots=True)
class Forecast:
    """The checkpoints of a run that trains to its last step."""

    steps: tuple[int, ...]
    """The steps that are saved."""
    peak_count: int
    """The largest number of checkpoints in the folder at a time: the oldest is removed after the newest is complete."""
    bytes_each: int
    existing: int
    """The number of checkpoints that are in the folder already."""
    free: int
    """Free disk space at the run's folder, in bytes."""

    @property
    def peak_bytes(self) -> int:
        """The largest size of all checkpoints together, in bytes."""
        return self.peak_count * self.bytes_each

    @property
    def fits(self) -> bool:
        """Whether the free disk space is enough for the checkpoints still to be written."""
        return max(0, self.peak_count - self.existing) * self.bytes_each <= self.free


def forecast(config: RunConfig, bytes_each: int, free: int | None = None) -> Forecast:
    """Return the checkpoints that a run will keep, each of `bytes_each`; `free` bytes are measured unless given."""
    settings, saved = config.checkpoint, _saved_steps(config)
    peak_count = min(len(saved), len(retained_steps(saved, settings.keep_last, settings.keep_every)) + 1)
    # A run that starts anew moves the checkpoints of an earlier run away and keeps them.
    existing = len(find_checkpoints(config.run.dir / CHECKPOINTS)) if config.resume == "auto" else 0
    return Forecast(tuple(saved), peak_count, bytes_each, existing, _free(config) if free is None else free)


def describe(config: RunConfig, bytes_each: int) -> str:
    """Return a line for the dry run: when checkpoints are saved, their size, and the free disk space."""
    return _line(config, forecast(config, bytes_each))


def when_saved(config: RunConfig) -> str:
    """Return at which steps a run keeps checkpoints, or that it keeps none, and why."""
    settings = config.checkpoint
    if not _saved_steps(config):
        return f"none, the run leaves no model: {_why_none(config)}"
    every = [f"every {settings.every:,} steps"] if settings.every else []
    return " and ".join([*every, *(["at the last step"] if settings.last else [])])


def warnings(config: RunConfig, bytes_each: int) -> list[str]:
    """Return the lines that a start prints if the run saves no checkpoint, or if its checkpoints do not fit."""
    expected = forecast(config, bytes_each)
    if not expected.steps:
        return [_line(config, expected)]
    return [] if expected.fits else [f"warning: {_line(config, expected)}"]


def _line(config: RunConfig, expected: Forecast) -> str:
    if not expected.steps:
        return f"checkpoints: {when_saved(config)}"
    line = (
        f"checkpoints: {when_saved(config)} | "
        f"{size(expected.bytes_each)} each | {expected.peak_count:,} at most at a time, {size(expected.peak_bytes)} | "
        f"{size(expected.free)} free"
    )
    return line if expected.fits else f"{line}; {MAKE_ROOM}"


def _saved_steps(config: RunConfig) -> list[int]:
    settings, last = config.checkpoint, config.train.last_step
    steps = {*range(settings.every, last + 1, settings.every)} if settings.every else set()
    return sorted(steps | ({last} if settings.last else set()))


def _why_none(config: RunConfig) -> str:
    settings = config.checkpoint
    if settings.every:
        return (
            f"checkpoint.every={settings.every} is beyond the last step, {config.train.last_step:,}, and "
            "checkpoint.last=false"
        )
    why = "checkpoint.every=0 and checkpoint.last=false"
    return f"{why}, since optimizer state on NVMe cannot be saved" if config.deepspeed.on_nvme else why


def _free(config: RunConfig) -> int:
    folder = config.run.dir.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size(count: float) -> str:
    """Format a number of bytes with a decimal unit: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
