"""The preview of a run's start, for a dry run by one process."""

from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.discovery import resume_candidates
from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import UserError
from megalite.model.weights import Weights
from megalite.planning.plan import Plan
from megalite.planning.preflight import data_is_present
from megalite.planning.start import OpenedCheckpoint, Probe, choose_start

DIGESTED_BYTES = 4 << 30
"""The largest checkpoint whose digests a dry run verifies, in bytes: about ten seconds of reading."""


def preview_start(plan: Plan) -> list[str]:
    """Return the lines that a start of the run would print about its start, for a dry run by one process.

    The digests of a checkpoint's files are verified if the files have at most `DIGESTED_BYTES` in all; of larger
    checkpoints only the sizes are compared, and a line says so. Raises UserError as `find_start` does.
    """
    undigested: list[Path] = []

    def faults(reader: CheckpointReader) -> Sequence[str]:
        if sum(record.bytes for record in reader.manifest.files.values()) <= DIGESTED_BYTES:
            return reader.problems()
        undigested.append(reader.folder)
        return reader.problems(digests=False)

    def open_checkpoint(folder: Path) -> OpenedCheckpoint:
        try:
            reader = CheckpointReader(folder)
            found = faults(reader)
            if not found:
                _ = reader.state
        except UserError as error:
            return None, [str(error)]
        return reader, found

    def weights() -> Weights:
        from megalite.convert.open import open_weights  # with the readers of foreign formats

        assert plan.config.init_from is not None
        opened = open_weights(plan.config.init_from)
        plan.requirements.require_weights(opened)
        return opened

    alone = Probe(lambda: resume_candidates(plan.config), open_checkpoint, faults, weights)
    start = choose_start(plan, alone, data_is_present=data_is_present(plan.config))
    lines = [f"start: from {start.reader.folder}, step {start.step:,}" if start.reader else "start: anew"]
    if start.reader is None and start.weights is not None:
        lines = [f"start: with the weights of {plan.config.init_from}"]
    if undigested:
        lines[0] += ", if it is whole: its files have the right sizes, their digests are compared at the start"
    shown = (
        lines[0],
        *(
            note
            for note in start.notes
            if note.startswith(("warning", "not checked", "batches of another size", "init_from"))
        ),
    )
    last = plan.config.train.stop_after or plan.config.train.steps
    nothing_left = [f"nothing is left to train: step {start.step:,} is done"] if start.step >= last else []
    return [*shown, *nothing_left]
