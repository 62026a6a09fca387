"""The training process of one rank: rendezvous, lock of the run's folder, heartbeat, and the trainer."""

import datetime
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megalite.data.datasets import open_datasets
from megalite.errors import STOPPED_STATUS
from megalite.files import folder_lock, to_filesystem_time
from megalite.launch import LaunchEnvironment, start_time
from megalite.launch.rendezvous import rendezvous, run_on_rank_zero
from megalite.monitoring.callback import Callback
from megalite.monitoring.heartbeat import GROUP_EXTRA_SECONDS, HeartbeatThread, Progress
from megalite.monitoring.run_folder import STOP
from megalite.monitoring.run_state import RunStateWriter
from megalite.parallel.json_collectives import on_rank_zero
from megalite.parallel.mesh import Mesh, joined_mesh, local_device
from megalite.planning.plan import Plan
from megalite.planning.preflight import check_data, check_machine, check_start
from megalite.planning.run_facts import run_facts
from megalite.training.stop_requests import StopRequests
from megalite.training.trainer import Trainer


def train(
    plan: Plan,
    environment: LaunchEnvironment,
    *,
    marker: RunStateWriter | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Train as one rank of `plan`, observed by `callbacks`; all ranks of the layout call this.

    On rank 0 `marker` records the phases of the start, that training runs, and how it ended.

    Returns the exit status: `STOPPED_STATUS` where a request stopped the run before its end and megalite launched it,
    else 0, since other launchers treat any other status as a failure.

    Raises UserError for errors that the user can fix, such as ranks with different run files, code or data, and for
    `train.max_bad_steps` skipped steps in a row; RanksMissing where some ranks do not arrive.
    """
    config = plan.config
    progress = Progress()
    marker = marker if environment.rank == 0 else None
    doing = marker.starting if marker is not None else lambda text: None
    file = config.run.dir / STOP if environment.rank == 0 else None
    since = to_filesystem_time(config.run.dir, start_time(os.environ)) if file is not None else 0.0
    stop = StopRequests(file, config.train.max_minutes, since=since)
    # The heartbeat must detect a hang before the collectives time out: it names the ranks that are behind.
    timeout = datetime.timedelta(seconds=config.train.timeout_seconds + GROUP_EXTRA_SECONDS)
    device = local_device(environment.local_rank, environment.launcher)
    # DeepSpeed reads it from the environment, where not every launcher sets it.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    check_machine(config)
    if environment.world_size > 1:
        others = environment.world_size - 1
        doing(f"waiting for the other {others:,} ranks" if others > 1 else "waiting for the other rank")
    store = rendezvous(environment, run_facts(plan, environment.world_size), timeout)
    if environment.launcher != "megalite":  # megalite's launcher has checked already
        doing("checking the checkpoints and the data")
        run_on_rank_zero(store, environment, "check of start and data", lambda: _check(plan))
    with (
        ExitStack() as stack,
        joined_mesh(
            plan.layout, environment.rank, device=device, timeout=timeout, placement=plan.placement, store=store
        ) as mesh,
    ):
        lock_run_folder(config.run.dir, mesh, stack)
        heartbeat_thread = HeartbeatThread(
            config.run.dir, mesh.rank, plan.layout.world_size, progress, config.train.timeout_seconds
        )
        stack.enter_context(heartbeat_thread)
        doing("opening the data")
        datasets = open_datasets(config)
        doing("building the model")
        trainer = Trainer(
            *(plan, mesh, datasets),
            stop=stop,
            progress=progress,
            restarts=environment.restarts,
            marker=marker,
            callbacks=callbacks,
        )
        with stop.signal_handlers():
            stopped = trainer.run()
        trainer.close()
    return STOPPED_STATUS if stopped and environment.launcher == "megalite" else 0


def _check(plan: Plan) -> None:
    """Check start and data on one rank, since this reads whole files; raise UserError for errors that the user can fix.

    The comparison of the run's facts has already ensured that the other hosts have the same files.
    """
    check_start(plan)
    check_data(plan)


def lock_run_folder(folder: Path, mesh: Mesh, until: ExitStack) -> None:
    """Lock the run's folder on rank 0; raise UserError on every rank where another run has the lock. Collective."""
    on_rank_zero(lambda: until.enter_context(folder_lock(folder, f"run.dir={folder}")), mesh)
