"""A safetensors file written in one pass, its SHA-256 taken on the way; https://github.com/huggingface/safetensors

The library writes as fast, but reads the file again for a digest. Files are read by the library.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}
_PART = 1 << 24


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def write_safetensors(path: Path, tensors: Sequence[tuple[str, np.ndarray]]) -> FileRecord:
    """Write contiguous arrays under their keys, flush them to the disk and return the file's record.

    Raises OSError where the disk takes no more, and leaves what was written.
    """
    header: dict[str, object] = {}
    end = 0
    for key, array in tensors:
        start, end = end, end + array.nbytes
        header[key] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    digest, written = hashlib.sha256(), 0
    # hashlib lets go of the interpreter's lock: one thread hashes a part while this one writes it.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        for part in _parts(head, tensors):
            hashed = hashing.submit(digest.update, part)
            rest = part
            while rest:
                rest = rest[file.write(rest) :]
            hashed.result()
            written += len(part)
        os.fsync(file.fileno())
    return FileRecord(written, digest.hexdigest())


def _parts(head: bytes, tensors: Sequence[tuple[str, np.ndarray]]) -> Iterator[memoryview]:
    yield memoryview(head)
    for _, array in tensors:
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _PART):
            yield view[start : start + _PART]


def file_record(path: Path) -> FileRecord:
    """Read a file and return its record."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())
