"""A safetensors file written in one pass, its SHA-256 taken on the way; https://github.com/huggingface/safetensors

The library writes as fast, but reads the file again for a digest. Files are read by the library.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np

_PART = 1 << 24


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray]) -> FileRecord:
    """Write fp32 arrays, which come in the order of `shapes`, flush them to the disk and return the file's record.

    Each array is asked for when it is written. Raises OSError where the disk takes no more; leaves what was written.
    """
    header: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    digest, written = hashlib.sha256(), 0
    # hashlib lets go of the interpreter's lock: one thread hashes a part while this one writes it.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        for part in chain((memoryview(head),), _parts(shapes.values(), arrays)):
            hashed = hashing.submit(digest.update, part)
            rest = part
            while rest:
                rest = rest[file.write(rest) :]
            hashed.result()
            written += len(part)
        os.fsync(file.fileno())
    return FileRecord(written, digest.hexdigest())


def _parts(shapes: Iterable[tuple[int, ...]], arrays: Iterable[np.ndarray]) -> Iterator[memoryview]:
    for shape, array in zip(shapes, arrays, strict=True):
        assert array.shape == shape
        assert array.dtype == np.float32
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _PART):
            yield view[start : start + _PART]


def file_record(path: Path) -> FileRecord:
    """Read a file and return its record."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())
