"""The start of training on all ranks: rank 0 lists the checkpoints, all ranks verify them, and all start alike."""

import socket
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from megalite.checkpoint.discovery import CHECKPOINTS, resume_candidates
from megalite.checkpoint.manifest import MANIFEST, STATE
from megalite.checkpoint.reader import CheckpointReader
from megalite.config import RunConfig
from megalite.errors import CommonError, UserError
from megalite.model.weights import Weights
from megalite.parallel.json_collectives import gather_json, on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.planning.plan import Plan
from megalite.planning.start import OpenedCheckpoint, Probe, Start, choose_start

VISIBILITY_SECONDS = 60.0
"""How long a rank waits for a checkpoint that rank 0 sees: network file systems may show an old state for so long."""


def find_start(plan: Plan, mesh: Mesh) -> Start:
    """Return the start of training, as `choose_start` does. Collective."""
    patience = min(VISIBILITY_SECONDS, plan.config.train.timeout_seconds / 2)
    return choose_start(
        plan,
        Probe(
            candidates=lambda: _candidates(plan.config, mesh),
            open_checkpoint=lambda folder: _open_on_all_ranks(folder, mesh, patience),
            faults=lambda reader: _faults(reader, mesh),
            weights=lambda: _opened_weights(plan, mesh),
        ),
    )


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


def _open_on_all_ranks(folder: Path, mesh: Mesh, patience: float) -> OpenedCheckpoint:
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
    wanted = on_rank_zero(lambda: _manifest_digest(folder), mesh)
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
