"""Measure free space and write rate of the run's folder, and check that all ranks share the folder."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megalite.checkpoint.forecast import MAKE_ROOM, forecast, size
from megalite.doctor.report import Row
from megalite.parallel.json_collectives import gather_json, on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.planning.plan import Plan

_SEEN_SECONDS = 5.0
"""How long a rank waits for the folder that rank 0 made: network file systems cache old listings for a while."""
_PROBE_BYTES = 32 << 20


def disk_row(plan: Plan, mesh: Mesh, hosts: list[str]) -> Row:
    """Check the run's folder with test files, which are removed afterwards. Collective."""
    checkpoint = plan.checkpoint_bytes
    with _probe_folder(plan.config.run.dir, mesh) as (folder, refusal):
        if refusal is not None:
            return Row("disk", "bad", (refusal,))
        blind = [rank for rank, sees in enumerate(gather_json(_sees(folder), mesh)) if not sees]
        if blind:
            return Row("disk", "bad", (_not_shared(plan, blind, hosts),))
        free = on_rank_zero(lambda: shutil.disk_usage(folder).free, mesh)
        room, room_is_bad = _room(plan, checkpoint, free)
        share = min(_PROBE_BYTES, max(1 << 16, checkpoint // mesh.layout.world_size))
        if share * mesh.layout.world_size > free // 2:
            return Row("disk", "bad" if room_is_bad else "ok", (room, "too little free space to measure the rate"))
        dist.barrier()
        times = gather_json(_write(folder / f"rank_{mesh.rank}", share), mesh)
    failed = [f"rank {rank} on {hosts[rank]}: {found}" for rank, found in enumerate(times) if isinstance(found, str)]
    if failed:
        return Row("disk", "bad", (room, *failed))
    rate = share * len(times) / max(times)
    ranks = "1 rank" if len(times) == 1 else f"{len(times)} ranks together"
    written = f"{size(rate)}/s written and flushed by {ranks}"
    if plan.config.checkpoint.keeps:
        written += f": a checkpoint in {checkpoint / rate:.2g} s"
    return Row("disk", "bad" if room_is_bad else "ok", (room, written))


def _room(plan: Plan, checkpoint: int, free: int) -> tuple[str, bool]:
    """Return a line on the free space and the checkpoints' size, and whether the space is too small."""
    where = f"{size(free)} free in {plan.config.run.dir}"
    expected = forecast(plan.config, checkpoint, free)
    if not expected.steps:
        return f"{where}; checkpoint.every={plan.config.checkpoint.every}, last=false: none is written", False
    line = f"{where}; a checkpoint takes {size(checkpoint)}, at most {expected.peak_count} exist at a time"
    if expected.fits:
        return line, False
    return f"{line}, {size(expected.peak_bytes)}; {MAKE_ROOM}", True


@contextmanager
def _probe_folder(run: Path, mesh: Mesh) -> Iterator[tuple[Path, str | None]]:
    """Create a test folder in the run's folder or its nearest existing parent. Collective.

    Yields the path, and an error message if the folder cannot be created, the same on every rank.
    """
    missing = 0
    while not _above(run, missing).exists():
        missing += 1

    def make() -> tuple[str, int, str | None]:
        parent = _above(run, missing)
        try:
            return tempfile.mkdtemp(prefix=".doctor-", dir=parent), missing, None
        except OSError as error:
            return "", missing, f"run.dir={run}: {parent} is not writable: {error.strerror}; set another run.dir"

    name, depth, refusal = on_rank_zero(make, mesh)
    try:
        # Relative to this rank's path of the run's folder, which may differ between hosts.
        yield _above(run, depth) / Path(name).name, refusal
        dist.barrier()
    finally:
        if mesh.rank == 0 and name:
            shutil.rmtree(name, ignore_errors=True)


def _above(folder: Path, levels: int) -> Path:
    return [folder.absolute(), *folder.absolute().parents][levels]


def _sees(folder: Path) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while not folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _not_shared(plan: Plan, blind: list[int], hosts: list[str]) -> str:
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in blind))
    return (
        f"run.dir={plan.config.run.dir}: files that rank 0 on {hosts[0]} writes there are not visible on {names}; set "
        "run.dir to a folder that all hosts share"
    )


def _write(path: Path, size: int) -> float | str:
    """Write random, hence incompressible, bytes and flush them; return the seconds, or an error message."""
    content = os.urandom(size)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write in run.dir: {error.strerror}"
    return time.perf_counter() - started
