"""What one save of a checkpoint came to: bytes, seconds, failure, warnings."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class SaveReport:
    """One save: its size in bytes over all ranks, the seconds that training waited for it on this rank, and those
    until it was on the disk. `failure` says why there is no checkpoint, `warnings` what else did not go as asked."""

    step: int
    folder: Path
    bytes: int = 0
    blocked_seconds: float = 0.0
    durable_seconds: float = 0.0
    failure: str | None = None
    warnings: list[str] = field(default_factory=list)
    told: bool = False
