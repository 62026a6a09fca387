"""Where training begins: with a checkpoint of this run, with other weights, or anew. The ranks decide together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.selection import candidates
from megalite.checkpoint.weights import CheckpointWeights, Weights, open_weights
from megalite.data.batches import BatchSchedule, PassedOver
from megalite.distributed import ProcessGrid, gather_json
from megalite.errors import UserError
from megalite.faults import validation_lines
from megalite.plan import Plan


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of a run: after step `step`, with `weights`, None where they are drawn; `reader` has the rest of
    the state. `notes` are what the user should hear of it."""

    step: int = 0
    weights: Weights | None = None
    reader: CheckpointReader | None = None
    notes: tuple[str, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    recent_losses: tuple[float, ...] = ()
    """Of the steps before, as `SpikeWatch` keeps them."""

    def continues(self, checkpoints: Path) -> bool:
        """Whether a run goes on whose checkpoints are in that folder."""
        return self.reader is not None and self.reader.folder.resolve().parent == checkpoints.resolve()


def find_start(plan: Plan, grid: ProcessGrid) -> Start:
    """Return where the run file's `resume` and `init_from` let training begin. Collective.

    Raises UserError where a checkpoint that is named is not whole, where none of several is, or where it does not fit.
    """
    passed_over: list[str] = []
    for folder in candidates(plan.config):
        reader, faults = _checked(folder, grid)
        if reader is not None and not faults:
            return _resumed(plan, reader, passed_over)
        passed_over.append(f"{folder}: {'; '.join(fault.removeprefix(f'{folder}: ') for fault in faults)}")
        if plan.config.resume != "auto":
            raise UserError(f"resume={passed_over[0]}; the checkpoint is damaged, name another")
    if passed_over:
        raise UserError(
            "\n".join([*passed_over, "resume=auto: no checkpoint is whole; write resume=never to begin anew"])
        )
    if plan.config.init_from is None:
        return Start()
    weights = open_weights(plan.config.init_from)
    plan.expectation.require_weights(weights)
    if isinstance(weights, CheckpointWeights) and (faults := _faults(weights.reader, grid)):
        raise UserError(f"init_from={weights.origin}: {'; '.join(faults)}; the checkpoint is damaged, name another")
    notes = (
        f"weights: {weights.origin}",
        *(f"note: {line}" for line in getattr(weights, "notes", ())),
        *(f"warning: {line}" for line in plan.expectation.differing_settings(weights)),
    )
    return Start(weights=weights, notes=notes)


def _checked(folder: Path, grid: ProcessGrid) -> tuple[CheckpointReader | None, Sequence[str]]:
    """Open a checkpoint, and say what is wrong with it, the same on every rank; no reader where it cannot be opened."""
    try:
        reader = CheckpointReader(folder)
    except UserError as error:
        return None, _together([str(error)], grid)
    return reader, _faults(reader, grid)


def _faults(reader: CheckpointReader, grid: ProcessGrid) -> Sequence[str]:
    """What is wrong with a checkpoint, the same on every rank: each reads its share of the files for their digests."""
    try:
        mine = sorted(reader.manifest.files)[grid.rank :: grid.layout.world_size]
        found = reader.faults(mine)
        if not found and grid.rank == 0:
            _ = reader.state
    except UserError as error:
        found = [str(error)]
    return _together(found, grid)


def _together(found: Sequence[str], grid: ProcessGrid) -> Sequence[str]:
    return list(dict.fromkeys(fault for faults in gather_json(list(found), grid) for fault in faults))


def _resumed(plan: Plan, reader: CheckpointReader, passed_over: Sequence[str]) -> Start:
    plan.expectation.require_resumable(reader)
    state = _progress(reader)
    step, consumed = state.step, state.consumed_samples
    here = BatchSchedule(plan.config.train).consumed(step)
    if here != consumed:
        raise UserError(
            f"{reader.folder}: stands at sample {consumed:,} after step {step:,}, where this run file's batches would "
            f"stand at {here:,}; keep train.global_batch_size and its ramp-up, or take the weights alone with init_from"
        )
    notes = [f"warning: passed over {line}" for line in passed_over]
    notes.append(
        f"resumed: {reader.folder}, step {step:,}, {consumed:,} samples; it was saved at {reader.manifest.layout}"
    )
    if plan.config.init_from is not None:
        notes.append(plan.init_from_passed_over)
    last = plan.config.train.stop_after or plan.config.train.steps
    if step > last:
        notes.append(f"warning: the checkpoint is past the last step that is asked for, {last:,}")
    if state.data.order_sha256 != plan.order_digest:
        notes.append(
            "warning: the data, their order or the seed are other than the checkpoint's: what follows is the new "
            "order from its sample of that number on, and some text may be seen twice"
        )
    return Start(
        step, CheckpointWeights(reader), reader, tuple(notes), tuple(state.passed_over), tuple(state.recent_losses)
    )


@dataclass(frozen=True)
class _Data:
    order_sha256: str


@dataclass(frozen=True)
class _Optimizer:
    updates: Annotated[int, Field(ge=0)]
    loss_scale: dict[str, float] | None
    scheduler: dict[str, Any] | None


@dataclass(frozen=True)
class _Progress:
    """What of a checkpoint's state the run goes on with."""

    step: Annotated[int, Field(ge=0)]
    consumed_samples: Annotated[int, Field(ge=0)]
    data: _Data
    optimizer: _Optimizer
    passed_over: Sequence[PassedOver] = ()
    recent_losses: Sequence[float] = ()


def _progress(reader: CheckpointReader) -> _Progress:
    try:
        progress = TypeAdapter(_Progress).validate_python(reader.state)
    except ValidationError as error:
        told = validation_lines(error)[0]
        raise UserError(f"{reader.folder}: state.json: {told}; use another checkpoint") from error
    if progress.step != reader.manifest.step:
        raise UserError(
            f"{reader.folder}: state.json is of step {progress.step:,}, the manifest of step {reader.manifest.step:,}; "
            "use another checkpoint"
        )
    return progress
