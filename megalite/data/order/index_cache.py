"""Arrays that take long to build, kept on disk: built once on each file system, whoever comes first.

A cache is a folder ``NAME-DIGEST`` of ``.npy`` files with an ``index.json`` that says what they were made from. It is
written beside its name and appears by one rename. Any number of processes, on any number of nodes, may ask at once:
those that share the storage take turns on a lock file, and what one has built the others find; a lock goes with the
process that held it. Where a file system knows no locks each builds for itself, and the first rename stays.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalite.files import publish, writing

Arrays = dict[str, np.ndarray]

_FACTS = "index.json"
_HASHED_IN_FULL = 1 << 26
_HASHED_BLOCKS = 1 << 10
_FIX = "set data.index_cache to a folder that can be written"


def cached_arrays(folder: Path | None, name: str, facts: Mapping[str, object], build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `build` makes, memory-mapped from `folder`; None: from memory.

    `facts`, plain JSON, must hold all that the arrays follow from. A cache that is broken is built anew. Raises
    UserError where the folder cannot be written.
    """
    if folder is None:
        return build()
    place = folder / f"{name}-{sha256(_json(facts)).hexdigest()[:32]}"
    found = _load(place, facts)
    if found is not None:
        return found
    with writing(folder, _FIX):
        folder.mkdir(parents=True, exist_ok=True)
    with _turn(place) as alone:
        found = _load(place, facts)
        if found is not None:
            return found
        arrays = build()
        with writing(place, _FIX):
            _store(place, facts, arrays, alone=alone)
        return _load(place, facts) or arrays


def _store(place: Path, facts: Mapping[str, object], arrays: Arrays, *, alone: bool) -> None:
    if alone:
        for left in place.parent.glob(f"{place.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    # Process numbers are no names on storage that several nodes share.
    partial, broken = (place.with_name(f"{place.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    partial.mkdir()
    try:
        described = {name: _describe(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        with (partial / _FACTS).open("wb") as file:
            file.write(_json({"facts": facts, "arrays": described}))
            _flush(file)
        with suppress(FileNotFoundError):
            os.rename(place, broken)
        try:
            publish(partial, place)
        except OSError:
            # Without locks another may have been first: then it is there.
            if _load(place, facts) is None:
                raise
    finally:
        for left in (partial, broken):
            shutil.rmtree(left, ignore_errors=True)


def _load(place: Path, facts: Mapping[str, object]) -> Arrays | None:
    """What the cache holds; None where it is not there, or not what it should be."""
    try:
        described = json.loads((place / _FACTS).read_bytes())
        if described["facts"] != json.loads(_json(facts)):
            return None
        arrays: Arrays = {}
        for name, expected in described["arrays"].items():
            arrays[name] = np.asarray(np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            if _describe(arrays[name]) != expected:
                return None
        return arrays
    except Exception:
        # Whatever json and numpy raise for a damaged file, the answer is to build it anew.
        return None


def _describe(array: np.ndarray) -> dict[str, object]:
    flat = array.reshape(-1).view("u1")
    digest = sha256()
    if len(flat) <= _HASHED_IN_FULL:
        digest.update(flat.data)
    else:
        size = _HASHED_IN_FULL // _HASHED_BLOCKS
        for block in range(_HASHED_BLOCKS):
            at = (len(flat) - size) * block // (_HASHED_BLOCKS - 1)
            digest.update(flat[at : at + size].data)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": digest.hexdigest()}


@contextmanager
def _turn(place: Path) -> Iterator[bool]:
    """Wait until no other process builds this cache; false where the file system knows no locks."""
    with writing(place, _FIX):
        lock = place.with_name(f"{place.name}.lock").open("ab")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()
