"""Folders of checkpoints on disk: ``step_N/``, there whole or not at all, written by many ranks and read by any.

Each rank writes one safetensors file into ``step_N.tmp/`` and, once that is on the disk, a record beside it. One rank
waits for all records, turns them into ``manifest.json``, and renames the folder: nothing but the files tells the ranks
of each other, so that a background thread can do its part without a process group.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.manifest import MANIFEST, STATE, Chunk, Manifest, StoredTensor
from megalite.checkpoint.safetensors_file import DTYPES, FileRecord, file_record, write_safetensors
from megalite.files import publish, write_whole

LATEST = "LATEST"


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a global tensor as this rank holds it; `data` is contiguous, of the box's shape."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class _Record:
    """What a rank tells of its file."""

    file: str
    record: FileRecord
    tensors: dict[str, StoredTensor]


def temporary(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step grows."""
    return root / f"step_{step}.tmp"


def begin(root: Path, step: int) -> None:
    """Make room for a checkpoint; what a killed save left is removed. One rank, before the others write."""
    clean(root)
    temporary(root, step).mkdir(parents=True)


def clean(root: Path) -> None:
    """Remove what saves that did not end have left."""
    for left in root.glob("step_*.tmp") if root.is_dir() else ():
        shutil.rmtree(left)


def write_rank(root: Path, step: int, rank: int, parts: Sequence[Part]) -> None:
    """Write this rank's parts and, once they are on the disk, the record that says so."""
    folder, file = temporary(root, step), f"rank_{rank:05d}.safetensors"
    keys = [f"{part.name}@{','.join(map(str, part.box.offset))}" for part in parts]
    record = write_safetensors(folder / file, [(key, part.data) for key, part in zip(keys, parts, strict=True)])
    tensors: dict[str, StoredTensor] = {}
    for key, part in zip(keys, parts, strict=True):
        chunk = Chunk(file, key, part.box.offset, part.box.shape)
        known = tensors.get(part.name)
        chunks = (*known.chunks, chunk) if known else (chunk,)
        tensors[part.name] = StoredTensor(part.global_shape, DTYPES[part.data.dtype.name], chunks)
    told = _Record(file, record, tensors)
    write_whole(folder / f"rank_{rank:05d}.json", json.dumps(asdict(told)).encode())


def finish(
    root: Path,
    step: int,
    *,
    ranks: int,
    manifest: Manifest,
    state: dict[str, Any],
    alive: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.02,
) -> Path:
    """Wait for every rank's record, and give the checkpoint its name. One rank.

    `manifest` has all but tensors and files. `alive` is called while waiting, and raises to give the save up.
    """
    folder = temporary(root, step)
    records = [folder / f"rank_{rank:05d}.json" for rank in range(ranks)]
    while not all(record.exists() for record in records):
        alive()
        time.sleep(poll_seconds)
    told = [TypeAdapter(_Record).validate_json(record.read_bytes()) for record in records]
    write_whole(folder / STATE, (json.dumps(state, indent=1) + "\n").encode())
    files = {one.file: one.record for one in told} | {STATE: file_record(folder / STATE)}
    write_whole(folder / MANIFEST, replace(manifest, tensors=_merge(told), files=files).to_json().encode())
    for record in records:
        record.unlink()
    final = root / f"step_{step}"
    if final.exists():
        shutil.rmtree(final)
    publish(folder, final)
    write_whole(root / LATEST, f"{final.name}\n".encode())
    return final


def _merge(told: Iterable[_Record]) -> dict[str, StoredTensor]:
    merged: dict[str, StoredTensor] = {}
    for one in told:
        for name, tensor in one.tensors.items():
            known = merged.get(name)
            merged[name] = replace(tensor, chunks=(*known.chunks, *tensor.chunks)) if known else tensor
    return dict(sorted(merged.items()))
