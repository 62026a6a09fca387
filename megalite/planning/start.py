"""The start of training: from a checkpoint, from other weights, or from scratch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.weights import CheckpointWeights
from megalite.config import TrainSection
from megalite.data.batch_schedule import BatchSchedule, SkippedSamples
from megalite.data.order.digest import order_digest_of_before
from megalite.errors import UserError
from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.weights import Weights
from megalite.planning.plan import Plan
from megalite.planning.preflight import init_from_ignored
from megalite.settings.validation import validation_lines


@dataclass(frozen=True, slots=True)
class Start:
    """The start of training: after step `step`, with `weights` (None: initialised) and the other state in `reader`.

    `notes` are lines about the start for the console.
    """

    step: int = 0
    weights: Weights | None = None
    reader: CheckpointReader | None = None
    notes: tuple[str, ...] = ()
    passed_over: tuple[SkippedSamples, ...] = ()
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


@dataclass(frozen=True)
class Probe:
    """The accesses to files of a start, by all ranks together or by one process."""

    candidates: Callable[[], Sequence[Path]]
    open_checkpoint: Callable[[Path], OpenedCheckpoint]
    faults: Callable[[CheckpointReader], Sequence[str]]
    weights: Callable[[], Weights]


def choose_start(plan: Plan, probe: Probe, *, data_is_present: bool = True) -> Start:
    """Return the start of training by the run file's `resume` and `init_from`.

    Raises UserError where the checkpoint of `resume` is damaged, where with ``auto`` all checkpoints are damaged, or
    where the checkpoint does not fit the run. Without `data_is_present` a note says that the data were not compared.
    """
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
        notes.append(init_from_ignored(plan.config))
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
    passed_over: Sequence[SkippedSamples] = ()
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
