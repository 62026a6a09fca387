"""Whether a start has nothing to train, told from a few small files before any rank is started."""

import json
from contextlib import suppress

from megalite.checkpoint.discovery import resume_candidates
from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import UserError
from megalite.monitoring.run_folder import DONE
from megalite.monitoring.run_state import read_state
from megalite.training.plan import Plan


def step_of_a_finished_run(plan: Plan) -> int | None:
    """Return the step at which a run stands that has come to its end, `train.steps` or `train.stop_after`; else None.

    The run has left word that it ended there, and the checkpoint that it would go on from has every file at its full
    size. In doubt the answer is None: the ranks read the files themselves, and finish what a killed run has left open.
    """
    config = plan.config
    last = config.train.stop_after or config.train.steps
    if config.resume != "auto" or not _ended_at(plan, last):
        return None
    with suppress(UserError, OSError):
        for folder in resume_candidates(config):
            reader = CheckpointReader(folder)
            whole = all((folder / name).stat().st_size == told.bytes for name, told in reader.manifest.files.items())
            return reader.manifest.step if whole and reader.manifest.step >= last else None
    return None


def _ended_at(plan: Plan, last: int) -> bool:
    folder, told = plan.config.run.dir, read_state(plan.config.run.dir)
    if told is not None and told.state not in ("done", "stopped"):
        return False
    if last == plan.config.train.steps:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return json.loads((folder / DONE).read_bytes())["step"] == last
        return False
    return told is not None and told.step is not None and told.step >= last
