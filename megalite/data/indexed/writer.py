"""Writes a tokenized corpus in Megatron's format (`format`)."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megalite.data.indexed.format import BLOCK, DTYPES, HEADER, MAGIC, VERSION, DatasetSidecar, with_suffix
from megalite.errors import UserError
from megalite.files import partial_path, publish

SUFFIXES = (".bin", ".mask", ".json", ".idx")
"""In the order in which files get their names: the index last."""
_COPY_BYTES = 1 << 24


class IndexedDatasetWriter:
    """Writes a dataset in bounded memory; nothing stands under its name before `finalize`.

    With a loss mask it has a byte a token beside it, ``PREFIX.mask``: 1 for a token that counts as a target. Used as a
    context manager it removes what it has written unless `finalize` was reached.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike, *, with_loss_mask: bool = False) -> None:
        require_prefix(prefix)
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._paths = {suffix: with_suffix(prefix, suffix) for suffix in SUFFIXES}
        self._partial = {suffix: partial_path(path) for suffix, path in self._paths.items()}
        self.with_loss_mask = with_loss_mask
        self.num_documents = 0
        self.num_tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        # Unbuffered, since the system copies straight into them.
        self._bin = self._open.enter_context(self._partial[".bin"].open("wb", buffering=0))
        self._mask = (
            self._open.enter_context(self._partial[".mask"].open("wb", buffering=0)) if with_loss_mask else None
        )
        self._idx = self._open.enter_context(self._partial[".idx"].open("w+b"))
        self._idx.write(bytes(HEADER.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._open.close()
        for partial in self._partial.values():
            partial.unlink(missing_ok=True)

    def add_document(self, tokens: npt.ArrayLike, loss_mask: npt.ArrayLike | None = None) -> None:
        """Append one document, a sequence of its own; raise ValueError for an id that the dtype cannot hold."""
        array = np.asarray(tokens, dtype=np.int64)
        self.add_documents(array, [len(array)], None if loss_mask is None else np.asarray(loss_mask, dtype=np.uint8))

    def add_documents(
        self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, loss_mask: np.ndarray | None = None
    ) -> None:
        """Append documents whose tokens stand in a row in `tokens`, with `lengths` tokens each.

        `loss_mask` is uint8[tokens] of 0 and 1 where the dataset has one. Raises ValueError where they do not fit.
        """
        if int(np.sum(lengths, dtype=np.int64)) != len(tokens):
            raise ValueError(f"lengths add up to {np.sum(lengths)}, but there are {len(tokens)} tokens")
        if tokens.dtype != self.dtype and len(tokens):
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit into {self.dtype}")
        if (loss_mask is None) != (self._mask is None):
            raise ValueError("a loss mask goes with every document of a dataset that has one, and with no other")
        if self._mask is not None and loss_mask is not None:
            if len(loss_mask) != len(tokens) or np.any(loss_mask > 1):
                raise ValueError(f"a loss mask has 0 or 1 for each of {len(tokens)} tokens")
            _write(self._mask, loss_mask.astype(np.uint8, copy=False))
        _write(self._bin, tokens.astype(self.dtype, copy=False))
        self._add_lengths(lengths)

    def copy_documents(
        self, tokens: Path, start: int, lengths: Sequence[int] | np.ndarray, loss_mask: Path | None = None
    ) -> None:
        """Append documents that stand in a row in a file of tokens of this dtype, from its token `start` on.

        `loss_mask` is the file of their masks where the dataset has one. The system copies them where it can.
        """
        count = int(np.sum(lengths, dtype=np.int64))
        if self._mask is not None:
            if loss_mask is None:
                raise ValueError("a loss mask goes with every document of a dataset that has one")
            copy_bytes(loss_mask, start, count, self._mask)
        copy_bytes(tokens, start * self.dtype.itemsize, count * self.dtype.itemsize, self._bin)
        self._add_lengths(lengths)

    def finalize(self, sidecar: DatasetSidecar | None = None) -> None:
        """Complete the index, flush everything to the disk and give the files their names, the index last."""
        self._write_offsets()
        self._open.close()
        if sidecar is not None:
            write_sidecar(sidecar, self._partial)
        publish_dataset(self._partial, self._paths)

    def _add_lengths(self, lengths: Sequence[int] | np.ndarray) -> None:
        self._idx.write(np.asarray(lengths, dtype="<i4").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += int(np.sum(lengths, dtype=np.int64))

    def _write_offsets(self) -> None:
        end = 0
        for at in range(0, self.num_documents, BLOCK):
            count = min(BLOCK, self.num_documents - at)
            self._idx.seek(HEADER.size + 4 * at)
            sizes = np.frombuffer(self._idx.read(4 * count), dtype="<i4").astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            self._idx.seek(HEADER.size + 4 * self.num_documents + 8 * at)
            self._idx.write((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        self._idx.seek(0, 2)
        for at in range(0, self.num_documents + 1, BLOCK):
            self._idx.write(np.arange(at, min(at + BLOCK, self.num_documents + 1), dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, self._code, self.num_documents, self.num_documents + 1))


def publish_dataset(partial: Mapping[str, Path], paths: Mapping[str, Path]) -> None:
    """Flush the files of a dataset to the disk and give them their names, the index last; both have all by suffix."""
    # Without its index an older dataset of this name is gone: no half of it can meet a half of the new one.
    for suffix in (".idx", ".json", ".mask"):
        paths[suffix].unlink(missing_ok=True)
    for suffix in SUFFIXES:
        if partial[suffix].exists():
            publish(partial[suffix], paths[suffix])


def write_sidecar(sidecar: DatasetSidecar, files: Mapping[str, Path]) -> None:
    """Write a sidecar that knows the digests of the other files; `files` has all by their suffix."""
    digests = {}
    for suffix in (".bin", ".mask"):
        if files[suffix].exists():
            with files[suffix].open("rb") as file:
                digests[suffix] = hashlib.file_digest(file, "sha256").hexdigest()
    files[".json"].write_text(json.dumps(asdict(replace(sidecar, sha256=digests)), indent=2) + "\n")


def require_prefix(prefix: Path) -> None:
    """Raise UserError for the name of a file, or for none, where a prefix is meant."""
    if not prefix.name:
        raise UserError(f"--output={prefix}: names no dataset; write a prefix, such as {prefix / 'corpus'}")
    if prefix.suffix in SUFFIXES:
        raise UserError(f"{prefix}: a prefix has no {prefix.suffix}; use {prefix.with_suffix('')}")


def require_new_dataset(prefix: Path) -> None:
    """Raise UserError where a file of a dataset of this name is there."""
    for path in (with_suffix(prefix, suffix) for suffix in (".idx", ".bin", ".mask", ".json")):
        if path.exists():
            raise UserError(f"{path}: is there already; give another --output, or overwrite it with --force")


def copy_bytes(source: Path, start: int, count: int, target: BinaryIO) -> None:
    """Append a stretch of a file to an unbuffered one, by the system itself where it can (copy_file_range).

    Raises EOFError where the source ends before.
    """
    with source.open("rb", buffering=0) as file:
        end = start + count
        while start < end:
            copied = _copy_in_system(file.fileno(), start, end - start, target.fileno())
            if copied is None:
                file.seek(start)
                data = file.read(min(_COPY_BYTES, end - start))
                _write(target, np.frombuffer(data, dtype=np.uint8))
                copied = len(data)
            if not copied:
                raise EOFError(f"{source}: ends at byte {start}; {end} expected")
            start += copied


def _copy_in_system(source: int, start: int, count: int, target: int) -> int | None:
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        # Some file systems say 0 where they cannot: then a read tells.
        return os.copy_file_range(source, target, min(count, 1 << 30), offset_src=start) or None
    except OSError:
        return None


def _write(file: BinaryIO, array: np.ndarray) -> None:
    data = np.ascontiguousarray(array).view(np.uint8).data
    while data:
        data = data[file.write(data) :]
