"""The start of training: from a checkpoint, from other weights, or from scratch. All ranks choose the same start."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megalite.checkpoint.discovery import CHECKPOINTS, resume_candidates
from megalite.checkpoint.manifest import MANIFEST, STATE
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.weights import CheckpointWeights
from megalite.config import RunConfig, TrainSection
from megalite.data.batch_schedule import BatchSchedule, PassedOver
from megalite.data.order.digest import order_digest_of_before
from megalite.errors import CommonError, UserError
from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.weights import Weights
from megalite.parallel.json_collectives import broadcast_json, gather_json, on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.settings.validation import validation_lines
from megalite.training.plan import Plan

VISIBILITY_SECONDS = 60.0
"""How long a rank waits for a checkpoint that rank 0 sees: network file systems may show an old state for so long."""


@dataclass(frozen=True, slots=True)
class Start:
    """The start of training: after step `step`, with `weights` (None: initialised) and the other state in `reader`.

    `notes` are lines about the start for the console.
    """

    step: int = 0
    weights: Weights | None = None
    reader: CheckpointReader | None = None
    notes: tuple[str, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    recent_losses: tuple[float, ...] = ()
    """The losses of the steps before, for `LossSpikeDetector`."""
    kernels: Kernels | None = None
    """The kernels of the checkpoint; None without a checkpoint."""
    consumed_samples: int = 0
    """Samples consumed up to and including `step`."""

    def batches(self, train: TrainSection) -> BatchSchedule:
        """Return the batch schedule of the steps from this start on."""
        return BatchSchedule(train, self.passed_over, after=self.step, consumed=self.consumed_samples)

    def continues(self, checkpoints: Path) -> bool:
        """Return whether this start resumes from a checkpoint in that folder."""
        if self.reader is None:
            return False
        # A checkpoint in the folder may be a link to another disk, and `resume` may name a link to a checkpoint there.
        folder = self.reader.folder
        return checkpoints.resolve() in (folder.parent.resolve(), folder.resolve().parent)


OpenedCheckpoint = tuple[CheckpointReader | None, Sequence[str]]
"""A checkpoint, None where it cannot be opened, and its problems."""


def find_start(plan: Plan, mesh: Mesh) -> Start:
    """Return the start of training by the run file's `resume` and `init_from`. Collective.

    Raises UserError where the checkpoint of `resume` is damaged, where with ``auto`` all checkpoints are damaged, or
    where the checkpoint does not fit the run.
    """
    patience = min(VISIBILITY_SECONDS, plan.config.train.timeout_seconds / 2)
    together = _Probe(
        candidates=lambda: _candidates(plan.config, mesh),
        open_checkpoint=lambda folder: _open_on_all_ranks(folder, mesh, patience),
        faults=lambda reader: _faults(reader, mesh),
        weights=lambda: _opened_weights(plan, mesh),
    )
    return _choose_start(plan, together)


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

    alone = _Probe(lambda: resume_candidates(plan.config), open_checkpoint, faults, weights)
    start = _choose_start(plan, alone, data_is_present=plan.data_is_present)
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


DIGESTED_BYTES = 4 << 30
"""The largest checkpoint whose digests a dry run verifies, in bytes: about ten seconds of reading."""


@dataclass(frozen=True)
class _Probe:
    """The disk accesses of a start, by all ranks together or by one process."""

    candidates: Callable[[], Sequence[Path]]
    open_checkpoint: Callable[[Path], OpenedCheckpoint]
    faults: Callable[[CheckpointReader], Sequence[str]]
    weights: Callable[[], Weights]


def _choose_start(plan: Plan, probe: _Probe, *, data_is_present: bool = True) -> Start:
    passed_over: list[str] = []
    for folder in probe.candidates():
        reader, faults = probe.open_checkpoint(folder)
        if reader is not None and not faults:
            return _resume_from(plan, reader, passed_over, data_is_present=data_is_present)
        passed_over.append(f"{folder}: {'; '.join(fault.removeprefix(f'{folder}: ') for fault in faults)}")
        if plan.config.resume != "auto":
            raise UserError(f"resume={passed_over[0]}; the checkpoint is damaged, name another")
    if passed_over:
        raise UserError(
            "\n".join([*passed_over, "resume=auto: no checkpoint is whole; write resume=never to begin anew"])
        )
    if plan.config.init_from is None:
        return Start()
    weights = probe.weights()
    if isinstance(weights, CheckpointWeights) and (faults := probe.faults(weights.reader)):
        raise UserError(f"init_from={weights.origin}: {'; '.join(faults)}; the checkpoint is damaged, name another")
    notes = (
        f"weights: {weights.origin}",
        *(f"note: {line}" for line in getattr(weights, "notes", ())),
        *(f"warning: {line}" for line in plan.requirements.differing_settings(weights)),
    )
    return Start(weights=weights, notes=notes)


def _candidates(config: RunConfig, mesh: Mesh) -> list[Path]:
    """Return the checkpoint folders that rank 0 lists, with this host's paths. Collective.

    No other rank lists the folder: a network file system may show a host an old listing for a minute, and ranks with
    different lists would resume from different checkpoints.
    """
    names = on_rank_zero(lambda: [folder.name for folder in resume_candidates(config)], mesh)
    if config.resume != "auto":
        return [Path(config.resume) for _ in names]
    return [config.run.dir / CHECKPOINTS / name for name in names]


def _opened_weights(plan: Plan, mesh: Mesh) -> Weights:
    """Open the weights of `init_from`; raise CommonError on every rank if any rank cannot use them. Collective."""
    from megalite.convert.open import open_weights  # with the readers of foreign formats

    assert plan.config.init_from is not None
    weights, found = None, []
    try:
        weights = open_weights(plan.config.init_from)
        plan.requirements.require_weights(weights)
    except UserError as error:
        found = [str(error)]
    if problems := _gather_problems(found, mesh):
        raise CommonError("\n".join(problems))
    assert weights is not None
    return weights


def _open_on_all_ranks(folder: Path, mesh: Mesh, patience: float) -> tuple[CheckpointReader | None, Sequence[str]]:
    """Open a checkpoint on all ranks; return the reader, None if any rank cannot open it, and the problems. Collective.

    A rank that does not see rank 0's manifest waits up to `patience` seconds for it.
    """
    reader, found = None, _manifest_mismatch(folder, mesh, patience)
    if not found:
        try:
            reader = CheckpointReader(folder)
        except UserError as error:
            found = [str(error)]
    if problems := _gather_problems(found, mesh):
        return None, problems
    assert reader is not None
    return reader, _faults(reader, mesh)


def _manifest_mismatch(folder: Path, mesh: Mesh, patience: float) -> list[str]:
    """Return a problem if this rank sees no manifest, or another manifest than rank 0. Collective."""
    wanted = broadcast_json(_manifest_digest(folder) if mesh.rank == 0 else None, mesh)
    deadline = time.monotonic() + patience
    while wanted is not None and _manifest_digest(folder) != wanted:
        if time.monotonic() > deadline:
            host = socket.gethostname()
            return [f"{folder}: rank {mesh.rank} on {host} does not see the {MANIFEST} that rank 0 sees there"]
        time.sleep(0.1)
    return []


def _manifest_digest(folder: Path) -> str | None:
    try:
        return sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _faults(reader: CheckpointReader, mesh: Mesh) -> Sequence[str]:
    """Return the problems of a checkpoint, the same on every rank. Collective.

    Each rank verifies the digests of its share of the files, and of the state file, which every rank reads.
    """
    try:
        mine = dict.fromkeys([*sorted(reader.manifest.files)[mesh.rank :: mesh.layout.world_size], STATE])
        found = reader.problems(mine)
        if not found and mesh.rank == 0:
            _ = reader.state
    except UserError as error:
        found = [str(error)]
    return _gather_problems(found, mesh)


def _gather_problems(found: Sequence[str], mesh: Mesh) -> Sequence[str]:
    """Return the distinct problems of all ranks. Collective."""
    return list(dict.fromkeys(fault for faults in gather_json(list(found), mesh) for fault in faults))


def _resume_from(
    plan: Plan, reader: CheckpointReader, passed_over: Sequence[str], *, data_is_present: bool = True
) -> Start:
    plan.requirements.require_resumable(reader)
    state = _progress(reader)
    step, consumed = state.step, state.consumed_samples
    train, here = plan.config.train, BatchSchedule(plan.config.train).consumed(step)
    if here != consumed and plan.config.data.order == "megatron":
        raise UserError(
            f"{reader.folder}: is at sample {consumed:,} after step {step:,}, but would be at {here:,} with this run "
            "file's batches; data.order=megatron shuffles as many samples as all steps take, so another number of "
            "samples has another order; keep train.global_batch_size and its ramp-up, or take the weights alone "
            "with init_from"
        )
    if state.passed_over and plan.config.data.order != "streaming":
        samples = sum(gap.samples for gap in state.passed_over)
        raise UserError(
            f"{reader.folder}: its run skipped {samples:,} samples after a loss spike, and "
            f"data.order={plan.config.data.order!r} has no further samples; write data.order=streaming, or take the "
            "weights alone with init_from"
        )
    notes = [f"warning: skipped {line}" for line in passed_over]
    notes.append(
        f"resumed: {reader.folder}, step {step:,}, {consumed:,} samples; it was saved at {reader.manifest.layout}"
    )
    if plan.config.init_from is not None:
        notes.append(plan.init_from_ignored)
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
        notes.append(f"warning: the checkpoint is past the last step of this run, {last:,}")
    if not data_is_present:
        notes.append("not checked: whether the data and their order are those of the checkpoint")
    elif state.data.order_sha256 not in (plan.order_digest, order_digest_of_before(plan.config)):
        notes.append(
            "warning: the data, their order or the seed differ from the checkpoint's: training continues in the new "
            "order at the same sample number, and may repeat some text"
        )
    return Start(
        step,
        CheckpointWeights(reader),
        reader,
        tuple(notes),
        tuple(state.passed_over),
        tuple(state.recent_losses),
        state.kernels,
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
    """The part of a checkpoint's state that a resumed run uses, validated."""

    step: Annotated[int, Field(ge=0)]
    consumed_samples: Annotated[int, Field(ge=0)]
    data: _Data
    optimizer: _Optimizer
    passed_over: Sequence[PassedOver] = ()
    recent_losses: Sequence[float] = ()
    kernels: Kernels = NATIVE  # older checkpoints, without the key, were trained with these


def _progress(reader: CheckpointReader) -> _Progress:
    try:
        progress = TypeAdapter(_Progress).validate_python(reader.state)
    except ValidationError as error:
        line = validation_lines(error)[0]
        raise UserError(f"{reader.folder}: state.json: {line}; use another checkpoint") from error
    if progress.step != reader.manifest.step:
        raise UserError(
            f"{reader.folder}: state.json is of step {progress.step:,}, the manifest of step {reader.manifest.step:,}; "
            "use another checkpoint"
        )
    return progress
