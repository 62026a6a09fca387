"""A check for a finished run, from a few small files, before any rank is started."""

import json
from contextlib import suppress

from megalite.checkpoint.discovery import resume_candidates
from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import UserError
from megalite.monitoring.run_folder import DONE
from megalite.monitoring.run_state import read_state
from megalite.planning.plan import Plan


def finished_step(plan: Plan) -> int | None:
    """Return the last step of a run that has reached `train.steps` or `train.stop_after`; else None.

    The files of the run's folder say that it ended there, and every file of the checkpoint that it would resume from
    has its full size. In doubt the result is None: then the ranks start and read the files completely.
    """
    config = plan.config
    last = config.train.stop_after or config.train.steps
    if config.resume != "auto" or not _ended_at(plan, last):
        return None
    with suppress(UserError, OSError):
        for folder in resume_candidates(config):
            reader = CheckpointReader(folder)
            whole = all(
                (folder / name).stat().st_size == record.bytes for name, record in reader.manifest.files.items()
            )
            return reader.manifest.step if whole and reader.manifest.step >= last else None
    return None


def _ended_at(plan: Plan, last: int) -> bool:
    folder, state = plan.config.run.dir, read_state(plan.config.run.dir)
    if state is not None and state.state not in ("done", "stopped"):
        return False
    if last == plan.config.train.steps:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return json.loads((folder / DONE).read_bytes())["step"] == last
        return False
    return state is not None and state.step is not None and state.step >= last
