"""Where training begins: with a checkpoint of this run, with other weights, or anew. The ranks decide together."""

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
from megalite.config.validation import validation_lines
from megalite.data.batch_schedule import BatchSchedule, PassedOver
from megalite.data.order.digest import order_digest_of_before
from megalite.errors import CommonError, UserError
from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.weights import Weights
from megalite.parallel.json_collectives import broadcast_json, gather_json, on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.training.plan import Plan

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
    kernels: Kernels | None = None
    """What the checkpoint was trained with; None where training begins anew."""
    consumed_samples: int = 0
    """Of the steps up to `step` and with it."""

    def batches(self, train: TrainSection) -> BatchSchedule:
        """Return the samples of the steps from here on."""
        return BatchSchedule(train, self.passed_over, after=self.step, consumed=self.consumed_samples)

    def continues(self, checkpoints: Path) -> bool:
        """Whether a run goes on whose checkpoints are in that folder."""
        if self.reader is None:
            return False
        # A checkpoint there may be a link to another disk, and the one that was named a link to one there.
        folder = self.reader.folder
        return checkpoints.resolve() in (folder.parent.resolve(), folder.resolve().parent)


Found = tuple[CheckpointReader | None, Sequence[str]]
"""A checkpoint that could be opened, and what is wrong with it."""


def find_start(plan: Plan, mesh: Mesh) -> Start:
    """Return where the run file's `resume` and `init_from` let training begin. Collective.

    Raises UserError where a checkpoint that is named is not whole, where none of several is, or where it does not fit.
    """
    patience = min(SEEN_SECONDS, plan.config.train.timeout_seconds / 2)
    together = _Look(
        candidates=lambda: _candidates(plan.config, mesh),
        checked=lambda folder: _checked(folder, mesh, patience),
        faults=lambda reader: _faults(reader, mesh),
        weights=lambda: _opened_weights(plan, mesh),
    )
    return _find(plan, together)


def foresee_start(plan: Plan) -> list[str]:
    """Return what a start of the run would say of where it begins: `find_start`, by one process alone.

    The digests of a checkpoint's files are compared where they are no more than `DIGESTED_BYTES`; of larger ones the
    sizes are, and a line says so. Raises UserError as `find_start` does.
    """
    undigested: list[Path] = []

    def faults(reader: CheckpointReader) -> Sequence[str]:
        if sum(record.bytes for record in reader.manifest.files.values()) <= DIGESTED_BYTES:
            return reader.problems()
        undigested.append(reader.folder)
        return reader.problems(digests=False)

    def checked(folder: Path) -> Found:
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

    alone = _Look(lambda: resume_candidates(plan.config), checked, faults, weights)
    start = _find(plan, alone, data_is_there=plan.data_is_there)
    lines = [f"start: from {start.reader.folder}, step {start.step:,}" if start.reader else "start: anew"]
    if start.reader is None and start.weights is not None:
        lines = [f"start: with the weights of {plan.config.init_from}"]
    if undigested:
        lines[0] += ", if it is whole: its files have the right sizes, their digests are compared at the start"
    told = (
        lines[0],
        *(
            note
            for note in start.notes
            if note.startswith(("warning", "not checked", "batches of another size", "init_from"))
        ),
    )
    last = plan.config.train.stop_after or plan.config.train.steps
    nothing_left = [f"nothing is left to train: step {start.step:,} is done"] if start.step >= last else []
    return [*told, *nothing_left]


DIGESTED_BYTES = 4 << 30
"""How much of a checkpoint's files a dry run reads for their digests: some ten seconds."""


@dataclass(frozen=True)
class _Look:
    """How a start looks at the disk: all ranks together, or one process alone."""

    candidates: Callable[[], Sequence[Path]]
    checked: Callable[[Path], Found]
    faults: Callable[[CheckpointReader], Sequence[str]]
    weights: Callable[[], Weights]


def _find(plan: Plan, look: _Look, *, data_is_there: bool = True) -> Start:
    passed_over: list[str] = []
    for folder in look.candidates():
        reader, faults = look.checked(folder)
        if reader is not None and not faults:
            return _resumed(plan, reader, passed_over, data_is_there=data_is_there)
        passed_over.append(f"{folder}: {'; '.join(fault.removeprefix(f'{folder}: ') for fault in faults)}")
        if plan.config.resume != "auto":
            raise UserError(f"resume={passed_over[0]}; the checkpoint is damaged, name another")
    if passed_over:
        raise UserError(
            "\n".join([*passed_over, "resume=auto: no checkpoint is whole; write resume=never to begin anew"])
        )
    if plan.config.init_from is None:
        return Start()
    weights = look.weights()
    if isinstance(weights, CheckpointWeights) and (faults := look.faults(weights.reader)):
        raise UserError(f"init_from={weights.origin}: {'; '.join(faults)}; the checkpoint is damaged, name another")
    notes = (
        f"weights: {weights.origin}",
        *(f"note: {line}" for line in getattr(weights, "notes", ())),
        *(f"warning: {line}" for line in plan.requirements.differing_settings(weights)),
    )
    return Start(weights=weights, notes=notes)


def _candidates(config: RunConfig, mesh: Mesh) -> list[Path]:
    """Return the folders that rank 0 finds, where this host has them. Collective.

    No other rank lists the run's folder: a network file system may show a host an old listing for a minute, and ranks
    with different lists would go on from different checkpoints.
    """
    names = on_rank_zero(lambda: [folder.name for folder in resume_candidates(config)], mesh)
    if config.resume != "auto":
        return [Path(config.resume) for _ in names]
    return [config.run.dir / CHECKPOINTS / name for name in names]


def _opened_weights(plan: Plan, mesh: Mesh) -> Weights:
    """Open the weights of `init_from`; raise CommonError on every rank where one cannot use them. Collective."""
    from megalite.convert.open import open_weights  # with the readers of foreign formats

    assert plan.config.init_from is not None
    weights, found = None, []
    try:
        weights = open_weights(plan.config.init_from)
        plan.requirements.require_weights(weights)
    except UserError as error:
        found = [str(error)]
    if told := _together(found, mesh):
        raise CommonError("\n".join(told))
    assert weights is not None
    return weights


def _checked(folder: Path, mesh: Mesh, patience: float) -> tuple[CheckpointReader | None, Sequence[str]]:
    """Open a checkpoint, and say what is wrong with it, the same on every rank; no reader where it cannot be opened.

    A rank that does not see rank 0's manifest looks for it again for `patience` seconds.
    """
    reader, found = None, _unlike_rank_zero(folder, mesh, patience)
    if not found:
        try:
            reader = CheckpointReader(folder)
        except UserError as error:
            found = [str(error)]
    if told := _together(found, mesh):
        return None, told
    assert reader is not None
    return reader, _faults(reader, mesh)


def _unlike_rank_zero(folder: Path, mesh: Mesh, patience: float) -> list[str]:
    """Return a line where this rank does not see the manifest that rank 0 sees, or sees an older one. Collective."""
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
    """What is wrong with a checkpoint, the same on every rank: each reads its share of the files for their digests,
    and the state, which it goes on with itself."""
    try:
        mine = dict.fromkeys([*sorted(reader.manifest.files)[mesh.rank :: mesh.layout.world_size], STATE])
        found = reader.problems(mine)
        if not found and mesh.rank == 0:
            _ = reader.state
    except UserError as error:
        found = [str(error)]
    return _together(found, mesh)


def _together(found: Sequence[str], mesh: Mesh) -> Sequence[str]:
    return list(dict.fromkeys(fault for faults in gather_json(list(found), mesh) for fault in faults))


def _resumed(plan: Plan, reader: CheckpointReader, passed_over: Sequence[str], *, data_is_there: bool = True) -> Start:
    plan.requirements.require_resumable(reader)
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
    if state.passed_over and plan.config.data.order != "streaming":
        samples = sum(gap.samples for gap in state.passed_over)
        raise UserError(
            f"{reader.folder}: its run passed {samples:,} samples over after a jump of the loss, and "
            f"data.order={plan.config.data.order!r} has no more than it needs; write data.order=streaming, or take the "
            "weights alone with init_from"
        )
    notes = [f"warning: passed over {line}" for line in passed_over]
    notes.append(
        f"resumed: {reader.folder}, step {step:,}, {consumed:,} samples; it was saved at {reader.manifest.layout}"
    )
    if plan.config.init_from is not None:
        notes.append(plan.init_from_passed_over)
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
    if not data_is_there:
        notes.append("not checked: whether the data and their order are those of the checkpoint")
    elif state.data.order_sha256 not in (plan.order_digest, order_digest_of_before(plan.config)):
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
    """What of a checkpoint's state the run goes on with."""

    step: Annotated[int, Field(ge=0)]
    consumed_samples: Annotated[int, Field(ge=0)]
    data: _Data
    optimizer: _Optimizer
    passed_over: Sequence[PassedOver] = ()
    recent_losses: Sequence[float] = ()
    kernels: Kernels = NATIVE  # as all checkpoints were trained before they told


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
