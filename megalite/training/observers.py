"""The callbacks of a run: megalite's own logs, then those that the run file and the caller name."""

from collections.abc import Sequence

from megalite.monitoring.callback import Callback, Callbacks
from megalite.monitoring.heartbeat import Phase, Progress
from megalite.monitoring.run_folder import prepare_run_folder
from megalite.monitoring.run_logger import RunLogger
from megalite.monitoring.run_record import RunRecord
from megalite.monitoring.run_state import RunStateWriter
from megalite.monitoring.timeline_recorder import TimelineRecorder
from megalite.parallel.mesh import Mesh
from megalite.planning.plan import Plan
from megalite.planning.start import Start
from megalite.registry import CALLBACKS
from megalite.training.stop_requests import StopRequests


class _ProgressCallback(Callback):
    """Reports each phase to the heartbeat thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_phase(self, phase: Phase, step: int) -> None:
        self._progress.enter(phase, step)


def own_callbacks(
    plan: Plan, mesh: Mesh, start: Start, stop: StopRequests, progress: Progress, marker: RunStateWriter | None
) -> list[Callback]:
    """Prepare the run's folder on rank 0, and return the callbacks of megalite's own logs."""
    config, notes = plan.config, [*start.notes]
    if mesh.rank == 0:
        if (request := stop.discard_stale_file()) is not None:
            notes.append(f"removed {request}, which was there before this start")
        notes += prepare_run_folder(config, step=start.step, continues=start.continues(plan.checkpoints))
    logger = RunLogger(notes, plan.checkpoint_bytes)
    return [
        _ProgressCallback(progress),
        logger,
        TimelineRecorder(logger.info),
        RunRecord(marker, logger.info, stop.discard),
    ]


def all_callbacks(own: Sequence[Callback], names: Sequence[str], given: Sequence[Callback]) -> Callbacks:
    """Return megalite's `own` callbacks, those of ``train.callbacks``, and those `given` by the caller of `train`."""
    return Callbacks([*own, *(CALLBACKS[name]() for name in names), *given])
