"""Folders of checkpoints on disk: there whole or not at all, written by many ranks and read by any.

Each rank writes one safetensors file into ``NAME.tmp/`` and, once that is on the disk, a record beside it. One rank
waits for all records, turns them into ``manifest.json``, and renames the folder: nothing but the files tells the ranks
of each other, so that a background thread can do its part without a process group.
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
from megalite.parallel.regions import Box

REPLACED = ".replaced"
"""What is added to the name of a checkpoint while one of the same step takes its place."""

TEMPORARY = ".tmp"
MOST_POLL_SECONDS = 0.5
"""How long the rank that waits for the others' records looks away at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a global fp32 tensor as this rank holds it; `load` returns the elements, of the box's shape.

    `load` is called when the part is written, so that not all parts need to be in memory at a time.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    load: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Record:
    """What a rank tells of its file."""

    file: str
    record: FileRecord
    tensors: dict[str, StoredTensor]


def temporary(folder: Path) -> Path:
    """Return where a checkpoint grows that will be `folder`."""
    return folder.with_name(folder.name + TEMPORARY)


def replaced(folder: Path) -> Path:
    """Return where a checkpoint stands aside while a new one of the same step takes its name."""
    return folder.with_name(folder.name + REPLACED)


def begin(folder: Path) -> None:
    """Make room for a checkpoint; what a killed save of it left is removed, or set aside where it cannot be removed.
    One rank, before the others write."""
    discard(folder)
    temporary(folder).mkdir(parents=True)


def discard(folder: Path) -> None:
    """Remove what a save of `folder` that did not end has left; raise OSError where it cannot even be renamed."""
    left = temporary(folder)
    if remove_what_can_be(left) is not None:
        rename_to_free(left, folder.name)  # the next start tries again, and tells


def rename_to_free(path: Path, name: str) -> Path:
    """Rename to ``name.tmp``, or ``name.1.tmp`` and so on where something of that name is there that cannot be removed;
    return the new path. Raises OSError where it cannot be renamed."""
    for number in itertools.count():
        free = path.with_name(f"{name}.{number}{TEMPORARY}" if number else name + TEMPORARY)
        if free != path and remove_what_can_be(free) is None:
            path.rename(free)
            return free
    raise AssertionError("numbers end")


def remove_what_can_be(path: Path) -> OSError | None:
    """Remove a folder with what is in it, a file or a link; nothing where there is none.

    Returns why some of it is still there: a file that is in use, or of another user, does not keep the others.
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


def write_rank(folder: Path, rank: int, parts: Sequence[Part], moved: Callable[[], None] = lambda: None) -> None:
    """Write this rank's parts and, once they are on the disk, the record that says so.

    `moved` is called whenever some of it is written.
    """
    growing, file = temporary(folder), f"rank_{rank:05d}.safetensors"
    keys = [f"{part.name}@{','.join(map(str, part.box.offset))}" for part in parts]
    shapes = {key: part.box.shape for key, part in zip(keys, parts, strict=True)}
    record = write_safetensors(growing / file, shapes, (part.load() for part in parts), moved=moved)
    tensors: dict[str, StoredTensor] = {}
    for key, part in zip(keys, parts, strict=True):
        chunk = Chunk(file, key, part.box.offset, part.box.shape)
        known = tensors.get(part.name)
        chunks = (*known.chunks, chunk) if known else (chunk,)
        tensors[part.name] = StoredTensor(part.global_shape, "F32", chunks)
    told = _Record(file, record, tensors)
    write_atomically(growing / f"rank_{rank:05d}.json", json.dumps(asdict(told)).encode())


def finish(
    folder: Path,
    *,
    ranks: int,
    manifest: Manifest,
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    alive: Callable[[], None] = lambda: None,
    reached: Callable[[str], None] = lambda point: None,
    poll_seconds: float = 0.02,
) -> Path:
    """Wait for every rank's record, and give the checkpoint its name. One rank.

    `manifest` has all but tensors and files. `files` are small ones to keep beside, a tokenizer's say. `alive` is
    called while waiting, and raises to give the save up; `reached` is called with the name of each point passed.
    """
    growing = temporary(folder)
    records = [growing / f"rank_{rank:05d}.json" for rank in range(ranks)]
    for record in records:  # each is asked for until it is there, however many there are, and ever more seldom
        while not record.exists():
            alive()
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, MOST_POLL_SECONDS)
    reached("recorded")
    told = [TypeAdapter(_Record).validate_json(record.read_bytes()) for record in records]
    small = {**(files or {}), STATE: (json.dumps(state, indent=1) + "\n").encode()}
    for name, content in small.items():
        write_atomically(growing / name, content)
    listed = {one.file: one.record for one in told} | {name: file_record(growing / name) for name in small}
    write_atomically(growing / MANIFEST, replace(manifest, tensors=_merge(told), files=listed).to_json().encode())
    for record in records:
        record.unlink()
    reached("described")
    aside = replaced(folder)
    if folder.exists():
        # A kill before the new one has the name leaves the old one where `checkpoints` still finds it.
        if remove_what_can_be(aside) is not None:
            rename_to_free(aside, f"{folder.name}.old")
        folder.rename(aside)
        reached("set aside")
    publish(growing, folder)
    reached("named")
    remove_what_can_be(aside)  # the new one is whole; what cannot be removed is left to the next start
    return folder


def _merge(told: Iterable[_Record]) -> dict[str, StoredTensor]:
    chunks: dict[str, list[Chunk]] = {}
    tensors: dict[str, StoredTensor] = {}
    for one in told:
        for name, tensor in one.tensors.items():
            tensors.setdefault(name, tensor)
            chunks.setdefault(name, []).extend(tensor.chunks)
    return {name: replace(tensors[name], chunks=tuple(chunks[name])) for name in sorted(tensors)}
