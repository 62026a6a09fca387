"""A safetensors file written in one pass, its SHA-256 taken on the way; https://github.com/huggingface/safetensors

The library writes as fast, but reads the file again for a digest.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megalite.parallel.regions import Region

_PART = 1 << 22
"""Elements that are hashed and written at a time."""
_FLUSHED = 1 << 28
"""Bytes after which a file that grows is flushed to the disk."""
_READ = 1 << 21
"""Bytes that are read and hashed at a time."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """How fp32 elements stand in a file: safetensors' name, torch's, numpy's type, the way there and the way back."""

    dtype: str
    torch_name: str
    stored: np.dtype
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.stored.itemsize


def bfloat16_bits(elements: np.ndarray) -> np.ndarray:
    """Return fp32 elements rounded to bf16, ties to even, as uint16 bit patterns; numpy has no such type."""
    bits = elements.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    # Rounding might carry the mantissa of a NaN over into another number.
    return np.where(np.isnan(elements), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 elements that bf16 bit patterns are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


ENCODINGS = {
    "fp32": Encoding("F32", "float32", np.dtype("<f4"), lambda elements: elements, lambda stored: stored),
    "bf16": Encoding("BF16", "bfloat16", np.dtype("<u2"), bfloat16_bits, from_bfloat16_bits),
    "fp16": Encoding(
        "F16", "float16", np.dtype("<f2"), lambda elements: elements.astype("<f2"), lambda stored: stored.astype("<f4")
    ),
}
"""By the names of precisions."""


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    *,
    precision: str = "fp32",
    metadata: Mapping[str, str] | None = None,
    moved: Callable[[], None] = lambda: None,
) -> FileRecord:
    """Write fp32 arrays, which come in the order of `shapes`, flush them to the disk and return the file's record.

    Each array is asked for when it is written; its elements are rounded to `precision`. `moved` is called whenever some
    of it is on its way; the disk is flushed on the way, so that no part of the work is long. Raises OSError where the
    disk takes no more; leaves what was written.
    """
    encoding = ENCODINGS[precision]
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + encoding.itemsize * prod(shape)
        header[key] = {"dtype": encoding.dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    digest, written, flushed = hashlib.sha256(), 0, 0
    # hashlib lets go of the interpreter's lock: a thread hashes a part while this one writes it.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        for part in chain((memoryview(head),), _parts(shapes.values(), arrays, encoding)):
            hashed = hashing.submit(digest.update, part)
            rest = part
            while rest:
                rest = rest[file.write(rest) :]
            hashed.result()
            written += len(part)
            if written - flushed >= _FLUSHED:
                os.fsync(file.fileno())
                flushed = written
            moved()
        os.fsync(file.fileno())
    return FileRecord(written, digest.hexdigest())


def _parts(shapes: Iterable[tuple[int, ...]], arrays: Iterable[np.ndarray], encoding: Encoding) -> Iterator[memoryview]:
    for shape, array in zip(shapes, arrays, strict=True):
        assert array.shape == shape
        assert array.dtype == np.float32
        elements = np.ascontiguousarray(array).reshape(-1)
        for start in range(0, elements.size, _PART):
            yield encoding.encode(elements[start : start + _PART]).view(np.uint8).data


class SafetensorsFile:
    """A safetensors file whose tensors are read as fp32; a mapping lives as long as what was read from it.

    The library checks the file when it is opened, but knows no bf16 for numpy, and keeps the file mapped, all that was
    read of it included. Raises SafetensorError or OSError for a file that is none.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="numpy"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._path = path
        self._starts = {name: 8 + length + told["data_offsets"][0] for name, told in header.items()}
        self.shapes = {name: tuple(told["shape"]) for name, told in header.items()}
        self.dtypes = {name: str(told["dtype"]) for name, told in header.items()}

    def read(self, name: str, region: Region) -> np.ndarray:
        """Return a region of a tensor; raise ValueError where there is none, or in no precision of `ENCODINGS`."""
        encoding = next((one for one in ENCODINGS.values() if one.dtype == self.dtypes.get(name)), None)
        if encoding is None:
            raise ValueError(f"there is no such tensor of {', '.join(one.dtype for one in ENCODINGS.values())}")
        shape = self.shapes[name]
        if not prod(shape):
            return np.empty(shape, np.float32)[region.slices]
        stored = np.memmap(self._path, encoding.stored, "r", self._starts[name], shape)
        return encoding.decode(np.asarray(stored[region.slices]))


def file_record(path: Path) -> FileRecord:
    """Read a file and return its record; a thread hashes one part while the next is read."""
    digest, total = hashlib.sha256(), 0
    buffers = [memoryview(bytearray(_READ)) for _ in range(2)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        before: Future[None] | None = None
        while count := file.readinto(buffers[0]):
            if before is not None:
                before.result()
            before = hashing.submit(digest.update, buffers[0][:count])
            buffers.reverse()
            total += count
    return FileRecord(total, digest.hexdigest())
