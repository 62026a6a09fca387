"""The result of a checkpoint save: bytes, seconds, failure, warnings."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class SaveReport:
    """The result of one save.

    `bytes` is the size over all ranks, `blocked_seconds` the time that training waited on this rank, `durable_seconds`
    the time until the checkpoint was on the disk. `failure` is the reason why there is no checkpoint, `warnings` are
    problems that did not prevent it, and `reported` tells that the run has reported the save.
    """

    step: int
    folder: Path
    bytes: int = 0
    blocked_seconds: float = 0.0
    durable_seconds: float = 0.0
    failure: str | None = None
    warnings: list[str] = field(default_factory=list)
    reported: bool = False
