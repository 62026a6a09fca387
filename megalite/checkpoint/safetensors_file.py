"""Write safetensors files and their SHA-256 in one pass, and read regions of tensors as fp32.

The safetensors library (https://github.com/huggingface/safetensors) writes as fast, but the file would have to be read
again for its digest.
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
_FLUSH_BYTES = 1 << 28
"""Bytes between two flushes to the disk while a file is written."""
_READ_BYTES = 1 << 21
"""Bytes that are read and hashed at a time."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size in bytes and its digest, as a manifest lists them."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """A stored dtype: its name in safetensors, in torch and in numpy, and the conversions from and to fp32."""

    dtype: str
    torch_name: str
    stored: np.dtype
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.stored.itemsize


def bfloat16_bits(elements: np.ndarray) -> np.ndarray:
    """Return fp32 elements rounded to bf16, ties to even, as uint16 bit patterns; numpy has no such type."""
    bits = elements.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    # Rounding might carry the mantissa of a NaN into the exponent: truncate it instead and set the quiet bit.
    return np.where(np.isnan(elements), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


ENCODINGS = {
    "fp32": Encoding("F32", "float32", np.dtype("<f4"), lambda elements: elements, lambda stored: stored),
    "bf16": Encoding("BF16", "bfloat16", np.dtype("<u2"), bfloat16_bits, from_bfloat16_bits),
    "fp16": Encoding(
        "F16", "float16", np.dtype("<f2"), lambda elements: elements.astype("<f2"), lambda stored: stored.astype("<f4")
    ),
}
"""The encodings by precision, as the run file names it."""


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    *,
    precision: str = "fp32",
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> FileRecord:
    """Write fp32 arrays, given in the order of `shapes`, flush them to the disk and return the file's record.

    The iterator yields each array when it is written; the elements are rounded to `precision`. `on_progress` is called
    after every part; the file is flushed at intervals, so that no single call takes long. Raises OSError if the disk
    is full; the incomplete file stays.
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
    # hashlib releases the interpreter's lock: a thread hashes a part while this thread writes it.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        for part in chain((memoryview(head),), _parts(shapes.values(), arrays, encoding)):
            hashed = hashing.submit(digest.update, part)
            rest = part
            while rest:
                rest = rest[file.write(rest) :]
            hashed.result()
            written += len(part)
            if written - flushed >= _FLUSH_BYTES:
                os.fsync(file.fileno())
                flushed = written
            on_progress()
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
    """Reads regions of a safetensors file's tensors as fp32; a memory map lives as long as the arrays read from it.

    The library validates the file when it is opened. It is not used to read, since it has no bf16 for numpy and keeps
    the whole file mapped. Raises SafetensorError or OSError for an invalid file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="numpy"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._path = path
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}

    def read(self, name: str, region: Region) -> np.ndarray:
        """Return a region of a tensor; raise ValueError if it is missing or not of a dtype in `ENCODINGS`."""
        encoding = next((known for known in ENCODINGS.values() if known.dtype == self.dtypes.get(name)), None)
        if encoding is None:
            dtypes = ", ".join(known.dtype for known in ENCODINGS.values())
            raise ValueError(f"the file has no tensor of that name in one of {dtypes}")
        shape = self.shapes[name]
        if not prod(shape):
            return np.empty(shape, np.float32)[region.slices]
        stored = np.memmap(self._path, encoding.stored, "r", self._starts[name], shape)
        return encoding.decode(np.asarray(stored[region.slices]))


def file_record(path: Path) -> FileRecord:
    """Return a file's size and SHA-256; a thread hashes one part while the next is read."""
    digest, total = hashlib.sha256(), 0
    buffers = [memoryview(bytearray(_READ_BYTES)) for _ in range(2)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        before: Future[None] | None = None
        while count := file.readinto(buffers[0]):
            if before is not None:
                before.result()
            before = hashing.submit(digest.update, buffers[0][:count])
            buffers.reverse()
            total += count
    return FileRecord(total, digest.hexdigest())
