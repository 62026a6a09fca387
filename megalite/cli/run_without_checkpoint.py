"""What is said of a run's folder where a model is asked for, and the run has no checkpoint yet."""

from pathlib import Path
from typing import TYPE_CHECKING

from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.monitoring.run_status import RunStatus


def require_checkpoint(path: Path, otherwise: str = "") -> None:
    """Raise UserError, with the state of the run, where `path` is the folder of a run that has no checkpoint yet.

    `otherwise` says at the end what else can be had of such a run.
    """
    from megalite.convert.open import no_checkpoint_yet, run_of
    from megalite.monitoring.run_status import run_status

    told, run = no_checkpoint_yet(path), run_of(path)
    if told is not None and run is not None:
        raise UserError(f"{told}; {_state(run_status(run))}{otherwise}")


def _state(status: "RunStatus") -> str:
    step = status.steps[-1]["step"] if status.steps else 0
    state = f"it is {status.state}, at step {step:,} of {status.total_steps:,}"
    if status.state in ("starting", "running"):
        return f"{state}: wait for it (megalite status {status.folder})"
    if status.state == "done":
        return f"{state}: ask for one with checkpoint.last=true and start it again with resume=never"
    return f"{state}: start it again (megalite status {status.folder} says how it ended)"
