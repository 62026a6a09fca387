"""Writes a tokenized corpus in Megatron's format (`index_format`)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from megalite.data.index_format import BLOCK, DTYPES, HEADER, MAGIC, VERSION, DatasetSidecar, with_suffix
from megalite.errors import UserError
from megalite.files import partial_path, publish


class IndexedDatasetWriter:
    """Writes a dataset in bounded memory; nothing stands under its name before `finalize`.

    Used as a context manager it removes what it has written unless `finalize` was reached.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        if prefix.suffix in (".bin", ".idx"):
            raise UserError(f"{prefix}: a prefix has no {prefix.suffix}; use {prefix.with_suffix('')}")
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._paths = {suffix: with_suffix(prefix, suffix) for suffix in (".bin", ".json", ".idx")}
        self._partial = {suffix: partial_path(path) for suffix, path in self._paths.items()}
        self.num_documents = 0
        self.num_tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._partial[".bin"].open("wb")
        self._idx = self._partial[".idx"].open("w+b")
        self._idx.write(bytes(HEADER.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bin.close()
        self._idx.close()
        for partial in self._partial.values():
            partial.unlink(missing_ok=True)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document, a sequence of its own; raise ValueError for an id that the dtype cannot hold."""
        array = np.asarray(tokens, dtype=np.int64)
        self.add_documents(array, [len(array)])

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents whose tokens stand in a row in `tokens`, with `lengths` tokens each."""
        if int(np.sum(lengths, dtype=np.int64)) != len(tokens):
            raise ValueError(f"lengths add up to {np.sum(lengths)}, but there are {len(tokens)} tokens")
        if tokens.dtype != self.dtype and len(tokens):
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit into {self.dtype}")
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._idx.write(np.asarray(lengths, dtype="<i4").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def finalize(self, sidecar: DatasetSidecar | None = None) -> None:
        """Complete the index, flush everything to the disk and give the files their names, the index last."""
        self._write_offsets()
        self._bin.close()
        self._idx.close()
        if sidecar is not None:
            self._partial[".json"].write_text(json.dumps(asdict(sidecar), indent=2) + "\n")
        # Without its index an older dataset of this name is gone: no half of it can meet a half of the new one.
        self._paths[".idx"].unlink(missing_ok=True)
        self._paths[".json"].unlink(missing_ok=True)
        for suffix, partial in self._partial.items():
            if partial.exists():
                publish(partial, self._paths[suffix])

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
