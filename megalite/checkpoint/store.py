"""Atomic checkpoint folders: many ranks write into ``NAME.tmp/``, one rank publishes the folder with a rename.

Each rank writes one safetensors file and, once the file is on the disk, a record beside it. One rank waits for all
records, merges them into ``manifest.json``, and renames the folder. The ranks coordinate through files alone, so that a
background thread can save without a process group.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megalite.checkpoint.manifest import MANIFEST, STATE, Chunk, Manifest, StoredTensor
from megalite.checkpoint.safetensors_file import FileRecord, file_record, write_safetensors
from megalite.files import publish, write_atomically
from megalite.parallel.regions import Region

REPLACED = ".replaced"
"""The suffix of a checkpoint's folder while a new save of the same step replaces it."""

TEMPORARY = ".tmp"
"""The suffix of a checkpoint's folder while it is written or removed."""
MOST_POLL_SECONDS = 0.5
"""The longest pause between two looks for the other ranks' records."""


@dataclass(frozen=True, slots=True)
class Part:
    """A region of a global fp32 tensor that this rank writes; `load` returns its elements, of the region's shape.

    `load` is called when the part is written, so that not all parts need to be in memory at a time.
    """

    name: str
    global_shape: tuple[int, ...]
    region: Region
    load: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Record:
    """A rank's file and the tensors in it."""

    file: str
    record: FileRecord
    tensors: dict[str, StoredTensor]


def temporary_folder(folder: Path) -> Path:
    """Return the folder into which the ranks write the checkpoint `folder`."""
    return folder.with_name(folder.name + TEMPORARY)


def replaced_folder(folder: Path) -> Path:
    """Return the name of the old checkpoint `folder` while a new save of the same step replaces it."""
    return folder.with_name(folder.name + REPLACED)


def begin(folder: Path) -> None:
    """Create the temporary folder of a checkpoint, after discarding leftovers. One rank calls it before the others
    write."""
    discard(folder)
    temporary_folder(folder).mkdir(parents=True)


def discard(folder: Path) -> None:
    """Remove the leftovers of an unfinished save of `folder`, or rename them if they cannot be removed.

    Raises OSError if they cannot be renamed either.
    """
    left = temporary_folder(folder)
    if remove_tree(left) is not None:
        rename_to_free(left, folder.name)  # the next start tries again to remove it, and warns


def rename_to_free(path: Path, name: str) -> Path:
    """Rename to ``name.tmp``, or to ``name.1.tmp`` and so on if a file of that name cannot be removed.

    Returns the new path. Raises OSError if `path` cannot be renamed.
    """
    for number in itertools.count():
        free = path.with_name(f"{name}.{number}{TEMPORARY}" if number else name + TEMPORARY)
        if free != path and remove_tree(free) is None:
            path.rename(free)
            return free
    raise AssertionError("numbers end")


def remove_tree(path: Path) -> OSError | None:
    """Remove a folder with its content, a file or a link, as far as possible; a missing path is not an error.

    Returns the first error, or None: a file that is in use, or of another user, does not prevent the removal of others.
    """
    first: list[OSError] = []

    def attempt(action: Callable[[Path], None], target: Path) -> None:
        try:
            action(target)
        except FileNotFoundError:
            pass
        except OSError as error:
            first.append(error)

    if path.is_symlink() or not path.is_dir():
        attempt(Path.unlink, path)
        return first[0] if first else None
    for folder, folders, files in os.walk(path, topdown=False, onerror=first.append):
        for name in files:
            attempt(Path.unlink, Path(folder, name))
        for name in folders:
            inner = Path(folder, name)
            attempt(Path.unlink if inner.is_symlink() else Path.rmdir, inner)
    attempt(Path.rmdir, path)
    return first[0] if first else None


def write_rank(folder: Path, rank: int, parts: Sequence[Part], on_progress: Callable[[], None] = lambda: None) -> None:
    """Write this rank's parts and, once they are on the disk, its record; `on_progress` is called after every write."""
    growing, file = temporary_folder(folder), f"rank_{rank:05d}.safetensors"
    keys = [f"{part.name}@{','.join(map(str, part.region.offset))}" for part in parts]
    shapes = {key: part.region.shape for key, part in zip(keys, parts, strict=True)}
    record = write_safetensors(growing / file, shapes, (part.load() for part in parts), on_progress=on_progress)
    tensors: dict[str, StoredTensor] = {}
    for key, part in zip(keys, parts, strict=True):
        chunk = Chunk(file, key, part.region.offset, part.region.shape)
        known = tensors.get(part.name)
        chunks = (*known.chunks, chunk) if known else (chunk,)
        tensors[part.name] = StoredTensor(part.global_shape, "F32", chunks)
    summary = _Record(file, record, tensors)
    write_atomically(growing / f"rank_{rank:05d}.json", json.dumps(asdict(summary)).encode())


def finish(
    folder: Path,
    *,
    ranks: int,
    manifest: Manifest,
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    alive: Callable[[], None] = lambda: None,
    on_save_point: Callable[[str], None] = lambda point: None,
    poll_seconds: float = 0.02,
) -> Path:
    """Wait for every rank's record, write the manifest, and publish the checkpoint. One rank calls it.

    `manifest` lacks only tensors and files. `files` are small files to store beside, such as a tokenizer's. `alive` is
    called while waiting and may raise to abandon the save; `on_save_point` is called with the name of each point that
    the save has passed.
    """
    growing = temporary_folder(folder)
    records = [growing / f"rank_{rank:05d}.json" for rank in range(ranks)]
    for record in records:  # poll each record in turn, with growing pauses
        while not record.exists():
            alive()
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, MOST_POLL_SECONDS)
    on_save_point("recorded")
    summaries = [TypeAdapter(_Record).validate_json(record.read_bytes()) for record in records]
    small = {**(files or {}), STATE: (json.dumps(state, indent=1) + "\n").encode()}
    for name, content in small.items():
        write_atomically(growing / name, content)
    listed = {rank.file: rank.record for rank in summaries} | {name: file_record(growing / name) for name in small}
    complete = replace(manifest, tensors=_merge(summaries), files=listed)
    write_atomically(growing / MANIFEST, complete.to_json().encode())
    for record in records:
        record.unlink()
    on_save_point("described")
    aside = replaced_folder(folder)
    if folder.exists():
        # If the process is killed before the new checkpoint has its name, `find_checkpoints` finds the old one here.
        if remove_tree(aside) is not None:
            rename_to_free(aside, f"{folder.name}.old")
        folder.rename(aside)
        on_save_point("set aside")
    publish(growing, folder)
    on_save_point("named")
    remove_tree(aside)  # the new checkpoint is complete; the next start removes the rest
    return folder


def _merge(summaries: Iterable[_Record]) -> dict[str, StoredTensor]:
    chunks: dict[str, list[Chunk]] = {}
    tensors: dict[str, StoredTensor] = {}
    for rank in summaries:
        for name, tensor in rank.tensors.items():
            tensors.setdefault(name, tensor)
            chunks.setdefault(name, []).extend(tensor.chunks)
    return {name: replace(tensors[name], chunks=tuple(chunks[name])) for name in sorted(tensors)}
