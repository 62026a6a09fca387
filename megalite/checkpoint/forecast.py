"""What a run will keep, known before its first step: how many checkpoints, and the room that they take."""

import shutil
from dataclasses import dataclass

from megalite.checkpoint.discovery import CHECKPOINTS, checkpoints
from megalite.checkpoint.retention import kept
from megalite.config import RunConfig

MAKE_ROOM = "make room, keep fewer (checkpoint.keep_last), or set run.dir"


@dataclass(frozen=True, slots=True)
class Forecast:
    """The checkpoints of a run that goes to its last step."""

    steps: tuple[int, ...]
    """The steps that are saved."""
    at_once: int
    """How many are in the folder at the most: the oldest goes once the newest is whole."""
    bytes_each: int
    there: int
    """How many of them are in the folder already, from before."""
    free: int
    """Bytes that are free where the run writes."""

    @property
    def bytes_at_once(self) -> int:
        """Bytes that the folder takes at the most."""
        return self.at_once * self.bytes_each

    @property
    def fits(self) -> bool:
        """Whether there is room for as many as are there at a time."""
        return max(0, self.at_once - self.there) * self.bytes_each <= self.free


def forecast(config: RunConfig, bytes_each: int, free: int | None = None) -> Forecast:
    """Count what `config` will keep, of `bytes_each` a checkpoint; `free` is measured unless given."""
    settings, saved = config.checkpoint, _saved_steps(config)
    at_once = min(len(saved), len(kept(saved, settings.keep_last, settings.keep_every)) + 1)
    # Those of a run that begins anew are set aside, and stay.
    there = len(checkpoints(config.run.dir / CHECKPOINTS)) if config.resume == "auto" else 0
    return Forecast(tuple(saved), at_once, bytes_each, there, _free(config) if free is None else free)


def describe(config: RunConfig, bytes_each: int) -> str:
    """Return the line of a dry run on the checkpoints to come."""
    return _line(config, forecast(config, bytes_each))


def when_saved(config: RunConfig) -> str:
    """Return at which steps a run keeps checkpoints, or that it keeps none, and why."""
    settings = config.checkpoint
    if not _saved_steps(config):
        return f"none, the run leaves no model: {_why_none(config)}"
    every = [f"every {settings.every:,} steps"] if settings.every else []
    return " and ".join([*every, *(["at the last step"] if settings.last else [])])


def warnings(config: RunConfig, bytes_each: int) -> list[str]:
    """Return what a run should say of its checkpoints when it starts: that it keeps none, or that they do not fit."""
    expected = forecast(config, bytes_each)
    if not expected.steps:
        return [_line(config, expected)]
    return [] if expected.fits else [f"warning: {_line(config, expected)}"]


def _line(config: RunConfig, expected: Forecast) -> str:
    if not expected.steps:
        return f"checkpoints: {when_saved(config)}"
    line = (
        f"checkpoints: {when_saved(config)} | "
        f"{size(expected.bytes_each)} each | {expected.at_once:,} at most at a time, {size(expected.bytes_at_once)} | "
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
        return f"checkpoint.every={settings.every} is beyond the last step, {config.train.last_step:,}, and last=false"
    why = "checkpoint.every=0 and checkpoint.last=false"
    return f"{why}, since a checkpoint cannot read a state on NVMe" if config.deepspeed.on_nvme else why


def _free(config: RunConfig) -> int:
    folder = config.run.dir.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size(count: float) -> str:
    """Write a number of bytes with the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
