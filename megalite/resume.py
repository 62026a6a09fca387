"""Where training begins: with a checkpoint of this run, with other weights, or anew. The ranks decide together."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megalite.checkpoint.manifest import MANIFEST, STATE
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.selection import CHECKPOINTS, candidates
from megalite.checkpoint.weights import CheckpointWeights, Weights, open_weights
from megalite.config import RunConfig, TrainSection
from megalite.data.batches import BatchSchedule, PassedOver
from megalite.distributed import ProcessGrid, broadcast_json, gather_json, on_rank_zero
from megalite.errors import CommonError, UserError
from megalite.faults import validation_lines
from megalite.plan import Plan

SEEN_SECONDS = 60.0
"""How long a rank looks for a checkpoint that rank 0 sees: network file systems show old listings for so long."""


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
    consumed_samples: int = 0
    """Of the steps up to `step` and with it."""

    def batches(self, train: TrainSection) -> BatchSchedule:
        """Return the samples of the steps from here on."""
        return BatchSchedule(train, self.passed_over, after=self.step, consumed=self.consumed_samples)

    def continues(self, checkpoints: Path) -> bool:
        """Whether a run goes on whose checkpoints are in that folder."""
        return self.reader is not None and self.reader.folder.resolve().parent == checkpoints.resolve()


def find_start(plan: Plan, grid: ProcessGrid) -> Start:
    """Return where the run file's `resume` and `init_from` let training begin. Collective.

    Raises UserError where a checkpoint that is named is not whole, where none of several is, or where it does not fit.
    """
    passed_over: list[str] = []
    for folder in _candidates(plan.config, grid):
        reader, faults = _checked(folder, grid, patience=min(SEEN_SECONDS, plan.config.train.timeout_seconds / 2))
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
    weights = _opened_weights(plan, grid)
    if isinstance(weights, CheckpointWeights) and (faults := _faults(weights.reader, grid)):
        raise UserError(f"init_from={weights.origin}: {'; '.join(faults)}; the checkpoint is damaged, name another")
    notes = (
        f"weights: {weights.origin}",
        *(f"warning: {line}" for line in plan.expectation.differing_settings(weights)),
    )
    return Start(weights=weights, notes=notes)


def _candidates(config: RunConfig, grid: ProcessGrid) -> list[Path]:
    """Return the folders that rank 0 finds, where this host has them. Collective.

    No other rank lists the run's folder: a network file system may show a host an old listing for a minute, and ranks
    with different lists would go on from different checkpoints.
    """
    names = on_rank_zero(lambda: [folder.name for folder in candidates(config)], grid)
    if config.resume != "auto":
        return [Path(config.resume) for _ in names]
    return [config.run.dir / CHECKPOINTS / name for name in names]


def _opened_weights(plan: Plan, grid: ProcessGrid) -> Weights:
    """Open the weights of `init_from`; raise CommonError on every rank where one cannot use them. Collective."""
    assert plan.config.init_from is not None
    weights, found = None, []
    try:
        weights = open_weights(plan.config.init_from)
        plan.expectation.require_weights(weights)
    except UserError as error:
        found = [str(error)]
    if told := _together(found, grid):
        raise CommonError("\n".join(told))
    assert weights is not None
    return weights


def _checked(folder: Path, grid: ProcessGrid, patience: float) -> tuple[CheckpointReader | None, Sequence[str]]:
    """Open a checkpoint, and say what is wrong with it, the same on every rank; no reader where it cannot be opened.

    A rank that does not see rank 0's manifest looks for it again for `patience` seconds.
    """
    reader, found = None, _unlike_rank_zero(folder, grid, patience)
    if not found:
        try:
            reader = CheckpointReader(folder)
        except UserError as error:
            found = [str(error)]
    if told := _together(found, grid):
        return None, told
    assert reader is not None
    return reader, _faults(reader, grid)


def _unlike_rank_zero(folder: Path, grid: ProcessGrid, patience: float) -> list[str]:
    """Return a line where this rank does not see the manifest that rank 0 sees, or sees an older one. Collective."""
    wanted = broadcast_json(_manifest_digest(folder) if grid.rank == 0 else None, grid)
    deadline = time.monotonic() + patience
    while wanted is not None and _manifest_digest(folder) != wanted:
        if time.monotonic() > deadline:
            host = socket.gethostname()
            return [f"{folder}: rank {grid.rank} on {host} does not see the {MANIFEST} that rank 0 sees there"]
        time.sleep(0.1)
    return []


def _manifest_digest(folder: Path) -> str | None:
    try:
        return sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _faults(reader: CheckpointReader, grid: ProcessGrid) -> Sequence[str]:
    """What is wrong with a checkpoint, the same on every rank: each reads its share of the files for their digests,
    and the state, which it goes on with itself."""
    try:
        mine = dict.fromkeys([*sorted(reader.manifest.files)[grid.rank :: grid.layout.world_size], STATE])
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
    train, here = plan.config.train, BatchSchedule(plan.config.train).consumed(step)
    if here != consumed and plan.config.data.order == "megatron":
        raise UserError(
            f"{reader.folder}: stands at sample {consumed:,} after step {step:,}, where this run file's batches would "
            f"stand at {here:,}, and data.order=megatron shuffles as many samples as all steps take: of another number "
            "the order is another; keep train.global_batch_size and its ramp-up, or take the weights alone with "
            "init_from"
        )
    notes = [f"warning: passed over {line}" for line in passed_over]
    notes.append(
        f"resumed: {reader.folder}, step {step:,}, {consumed:,} samples; it was saved at {reader.manifest.layout}"
    )
    if here != consumed:
        next_size = len(BatchSchedule(train, after=step, consumed=consumed).samples(step + 1))
        grows = f", growing to {train.global_batch_size:,}" if next_size < train.global_batch_size else ""
        notes.append(
            f"batches of another size: {next_size:,} sequences a step from step {step + 1:,} on{grows}, and on from "
            f"sample {consumed:,}, where batches of the run file's size would stand at {here:,}; optimizer and "
            "learning rate go on by steps"
        )
    last = train.stop_after or train.steps
    if step > last:
        notes.append(f"warning: the checkpoint is past the last step that is asked for, {last:,}")
    if state.data.order_sha256 != plan.order_digest:
        notes.append(
            "warning: the data, their order or the seed are other than the checkpoint's: what follows is the new "
            "order from its sample of that number on, and some text may be seen twice"
        )
    return Start(
        step,
        CheckpointWeights(reader),
        reader,
        tuple(notes),
        tuple(state.passed_over),
        tuple(state.recent_losses),
        consumed,
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
