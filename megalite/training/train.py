"""Train one rank's part of a plan: meet the other ranks, claim the run's folder, run."""

import datetime
import os
from contextlib import ExitStack
from pathlib import Path

from megalite.data.datasets import open_datasets
from megalite.errors import STOPPED_STATUS
from megalite.files import folder_lock, to_filesystem_time
from megalite.launch import LaunchEnvironment, start_time
from megalite.launch.rendezvous import rendezvous, run_on_rank_zero
from megalite.monitoring.heartbeat import GROUP_EXTRA_SECONDS, HeartbeatThread, Progress
from megalite.monitoring.run_folder import STOP
from megalite.monitoring.run_state import RunStateWriter
from megalite.parallel.json_collectives import on_rank_zero
from megalite.parallel.mesh import Mesh, joined_mesh, local_device
from megalite.training.plan import Plan
from megalite.training.run_facts import run_facts
from megalite.training.stop_requests import StopRequests
from megalite.training.trainer import Trainer


def train(plan: Plan, environment: LaunchEnvironment, *, marker: RunStateWriter | None = None) -> int:
    """Train one rank's part of `plan`; the other ranks of its layout run the same beside it.

    `marker` hears on rank 0 what the start is doing, that training begins, and how it ended.

    Returns the exit status: `STOPPED_STATUS` where the run was asked to stop before its end and megalite launched it,
    else 0, since other launchers take anything else for a failure.

    Raises UserError for what the user can mend, a rank of another run, code or data among it, and where
    `train.max_bad_steps` steps in a row had to be skipped; RanksMissing where some do not come.
    """
    config = plan.config
    progress = Progress()
    marker = marker if environment.rank == 0 else None
    doing = marker.starting if marker is not None else lambda text: None
    file = config.run.dir / STOP if environment.rank == 0 else None
    since = to_filesystem_time(config.run.dir, start_time(os.environ)) if file is not None else 0.0
    stop = StopRequests(file, config.train.max_minutes, since=since)
    # A rank's heartbeat_thread is to see a hang first: it can say who is behind, a collective that gives up cannot.
    timeout = datetime.timedelta(seconds=config.train.timeout_seconds + GROUP_EXTRA_SECONDS)
    device = local_device(environment.local_rank, environment.launcher)
    # DeepSpeed reads it from the environment, where not every launcher has put it.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    plan.check_machine()
    if environment.world_size > 1:
        others = environment.world_size - 1
        doing(f"waiting for the other {others:,} ranks" if others > 1 else "waiting for the other rank")
    store = rendezvous(environment, run_facts(plan, environment.world_size), timeout)
    if environment.launcher != "megalite":  # which has looked already
        doing("checking the checkpoints and the data")
        run_on_rank_zero(store, environment, "check of start and data", lambda: _check(plan))
    with (
        ExitStack() as stack,
        joined_mesh(
            plan.layout, environment.rank, device=device, timeout=timeout, placement=plan.placement, store=store
        ) as mesh,
    ):
        claim_folder(config.run.dir, mesh, stack)
        heartbeat_thread = HeartbeatThread(
            config.run.dir, mesh.rank, plan.layout.world_size, progress, config.train.timeout_seconds
        )
        stack.enter_context(heartbeat_thread)
        restarts = environment.restarts
        doing("opening the data")
        datasets = open_datasets(config)
        doing("building the model")
        trainer = Trainer(plan, mesh, datasets, stop=stop, progress=progress, restarts=restarts, marker=marker)
        with stop.heeding_signals():
            stopped = trainer.run()
        trainer.close()
    return STOPPED_STATUS if stopped and environment.launcher == "megalite" else 0


def _check(plan: Plan) -> None:
    """Check start and data; raise UserError for what the user can mend. It reads whole files, so one rank does it:
    that the other hosts have the same files, the ranks' facts have told."""
    plan.check_start()
    plan.check_data()


def claim_folder(folder: Path, mesh: Mesh, until: ExitStack) -> None:
    """Keep other runs out of a run's folder; raise UserError on every rank where one is in. Collective."""
    on_rank_zero(lambda: until.enter_context(folder_lock(folder, f"run.dir={folder}")), mesh)
