"""Launch of a run's ranks on this machine, after every check of a start that one process can make."""

import math
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from megalite.files import folder_lock
from megalite.launch import launch_local, start_id
from megalite.monitoring.run_state import RunStateWriter
from megalite.paths import escape
from megalite.planning.finished import finished_step
from megalite.planning.plan import Plan
from megalite.planning.preflight import check_data, check_start


def state_writer(plan: Plan, announce: Callable[[str], None]) -> RunStateWriter:
    """Return the writer of STATE.json for this start; `announce` is called with each step of the start-up."""
    config = plan.config
    start = start_id(os.environ, socket.gethostname(), os.getpid())
    return RunStateWriter(
        config.run.dir, start, ranks=plan.layout.world_size, steps=config.train.steps, announce=announce
    )


def check_before_launch(plan: Plan) -> int | None:
    """Make every check of a start; return the last step of a run that is finished already, else None.

    Raises UserError for what a rank would refuse, and where another run uses the folder.
    """
    check_start(plan)
    if (step := finished_step(plan)) is not None:
        return step
    check_data(plan)
    with folder_lock(plan.config.run.dir, f"run.dir={plan.config.run.dir}"):
        pass  # rank 0 takes it for the run; this ends a second run before its ranks start
    return None


def launch_ranks(
    plan: Plan, run: Path, overrides: Sequence[str], marker: RunStateWriter, failed: Callable[[str], None]
) -> int:
    """Start the ranks of a run on this machine and return the exit status, as `launch_local` does.

    `failed` is called with a description where the run fails for good. Call it from the main thread.
    """
    world_size = plan.layout.world_size
    marker.starting(f"starting {world_size:,} {'rank' if world_size == 1 else 'ranks'}")

    def mark_failed(reason: str) -> None:
        marker.failed(reason)
        failed(reason)

    return launch_local(
        ["train", escape(run), *overrides],
        world_size,
        plan.config.run.dir / "logs",
        stop_grace=math.inf,  # they save a checkpoint before they end
        max_restarts=plan.config.train.max_restarts,
        failed=mark_failed,
    )
