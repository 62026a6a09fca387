"""Megatron's token index, read and written byte for byte: ``PREFIX.bin``, ``PREFIX.idx`` and our ``PREFIX.json``.

``.bin`` is the token ids in a row. ``.idx``, little-endian and unpadded, with N sequences in D - 1 documents::

    0   "MMIDIDX" 00 00      9   u64 version = 1      17  u8 dtype code      18  u64 N      26  u64 D
    34  int32[N] tokens of each sequence, int64[N] byte offset of each in .bin,
        int64[D] first sequence of each document and, last, N;  int8[N] modes, where multimodal

``.json`` says what the tokens were made of; Megatron neither writes nor needs it.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from megalite.errors import UserError, nearest
from megalite.files import partial_path, publish

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Code 6 and 7 are floating point, in an order on which Megatron and GPT-NeoX disagree: no token ids."""

_OLD_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20


def dtype_for(vocab_size: int) -> np.dtype:
    """Return how wide a token is stored: u16 under 65,500 entries, else i32."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


@dataclass(frozen=True, slots=True)
class DatasetSidecar:
    """What ``PREFIX.json`` says about a dataset."""

    vocab_size: int
    tokenizer_sha256: str
    num_tokens: int
    num_documents: int
    max_token_id: int
    token_counts_entropy: float
    """Of the unigram distribution of the tokens, in nats a token: what a model without context can reach at best."""


class IndexedDataset:
    """A tokenized corpus, memory-mapped; its structure is checked in full when it is opened.

    Raises UserError, naming the file, what was found and what was expected.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index_path = _with_suffix(prefix, ".idx")
        self.tokens_path = _with_suffix(prefix, ".bin")
        for path in (self.index_path, self.tokens_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file{_fix_for_missing(prefix)}")
        self._index = _map(self.index_path, np.dtype("u1"))
        self.dtype, self.num_sequences, self._num_bounds = self._read_header()
        lengths_end = _HEADER.size + 4 * self.num_sequences
        offsets_end = lengths_end + 8 * self.num_sequences
        bounds_end = offsets_end + 8 * self._num_bounds
        self._check_size(bounds_end)
        self._lengths = self._index[_HEADER.size : lengths_end].view("<i4")
        self._offsets = self._index[lengths_end:offsets_end].view("<i8")
        self._documents = self._index[offsets_end:bounds_end].view("<i8")
        self.modes = self._index[bounds_end:].view("i1") if len(self._index) > bounds_end else None
        self._check_documents()
        self.num_tokens = self._check_offsets() // self.dtype.itemsize
        self._check_tokens_file()
        self._tokens = _map(self.tokens_path, self.dtype)
        self.sidecar = self._read_sidecar()

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._num_bounds - 1

    def document_bounds(self) -> np.ndarray:
        """Return where each document begins in the stream of tokens, and at last its end: int64[documents + 1]."""
        return self._bounds

    def document_tokens(self, document: int) -> np.ndarray:
        """Return a view of one document's tokens; raise IndexError outside ``0 <= document < num_documents``."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} is not in 0..{self.num_documents - 1}")
        return self._tokens[self._bounds[document] : self._bounds[document + 1]]

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Return a view of `length` tokens of the stream from `start` on; raise IndexError beyond its ends."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start}..{start + length} are not in 0..{self.num_tokens}")
        return self._tokens[start : start + length]

    def max_token_id(self) -> int:
        """Return the largest token id, or -1 without tokens: from the sidecar, else by reading every token."""
        if self.sidecar is not None:
            return self.sidecar.max_token_id
        blocks = range(0, self.num_tokens, 64 * _BLOCK)
        return max((int(self._tokens[at : at + 64 * _BLOCK].max()) for at in blocks), default=-1)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError where a token id lies beyond a vocabulary."""
        largest = self.max_token_id()
        if largest >= vocab_size:
            raise UserError(
                f"{self.tokens_path}: holds token id {largest}; a vocabulary of {vocab_size} allows 0 to "
                f"{vocab_size - 1}; preprocess the text with the model's own tokenizer"
            )

    @cached_property
    def _bounds(self) -> np.ndarray:
        starts = np.append(self._offsets // self.dtype.itemsize, self.num_tokens)
        return starts[self._documents]

    def _read_header(self) -> tuple[np.dtype, int, int]:
        head = self._index[: _HEADER.size].tobytes()
        if head.startswith(_OLD_MAGIC):
            raise UserError(
                f"{self.index_path}: a TNTIDX index, the old format of fairseq and early Megatron; MMIDIDX is allowed; "
                "preprocess the text again with `megalite preprocess`"
            )
        if not head.startswith(MAGIC[: len(head)]) or not head:
            raise UserError(
                f"{self.index_path}: begins with {head[:9].hex(' ') or 'nothing'}; {MAGIC.hex(' ')} expected"
            )
        if len(head) < _HEADER.size:
            raise UserError(f"{self.index_path}: {len(head)} bytes, cut short; an index has at least {_HEADER.size}")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
        if version != VERSION:
            raise UserError(f"{self.index_path}: version {version} found; {VERSION} expected")
        if code not in DTYPES:
            known = ", ".join(f"{number} ({dtype})" for number, dtype in DTYPES.items())
            raise UserError(f"{self.index_path}: dtype code {code} found; token ids have one of {known}")
        return DTYPES[code], num_sequences, num_bounds

    def _check_size(self, without_modes: int) -> None:
        allowed = (without_modes, without_modes + self.num_sequences)
        if len(self._index) not in allowed:
            raise UserError(
                f"{self.index_path}: {len(self._index)} bytes found; {self.num_sequences} sequences and "
                f"{self._num_bounds - 1} documents make {without_modes}; the file is broken, preprocess again"
            )

    def _check_documents(self) -> None:
        bounds = self._documents
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != self.num_sequences or np.any(bounds[1:] < bounds[:-1]):
            raise UserError(
                f"{self.index_path}: document indices {_abridged(bounds)} found; they must begin with 0, never fall "
                f"and end with {self.num_sequences}, the number of sequences"
            )

    def _check_offsets(self) -> int:
        """Return the bytes of ``.bin`` that the index describes."""
        described = 0
        for at in range(0, self.num_sequences, _BLOCK):
            sizes = self._lengths[at : at + _BLOCK].astype(np.int64) * self.dtype.itemsize
            offsets = self._offsets[at : at + _BLOCK]
            expected = described + np.cumsum(sizes) - sizes
            wrong = (sizes < 0) | (offsets != expected)
            if wrong.any():
                first = int(wrong.argmax())
                raise UserError(
                    f"{self.index_path}: sequence {at + first} has {sizes[first]} bytes from {offsets[first]} on; "
                    f"it must begin at {expected[first]}, where the one before ends; preprocess again"
                )
            described = int(expected[-1] + sizes[-1])
        return described

    def _check_tokens_file(self) -> None:
        found, expected = self.tokens_path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if found != expected:
            state = "cut short" if found < expected else "too long"
            raise UserError(
                f"{self.tokens_path}: {found} bytes found, {state}; {self.index_path.name} describes {expected}; "
                "copy it again or preprocess again"
            )

    def _read_sidecar(self) -> DatasetSidecar | None:
        path = _with_suffix(self.prefix, ".json")
        if not path.is_file():
            return None
        try:
            sidecar = TypeAdapter(DatasetSidecar).validate_json(path.read_bytes())
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
            raise UserError(f"{path}: {wrong}; remove it, or preprocess again") from error
        if (sidecar.num_tokens, sidecar.num_documents) != (self.num_tokens, self.num_documents):
            raise UserError(
                f"{path}: describes {sidecar.num_documents} documents and {sidecar.num_tokens} tokens; "
                f"{self.index_path.name} has {self.num_documents} and {self.num_tokens}; remove it, or preprocess again"
            )
        return sidecar


class IndexedDatasetWriter:
    """Writes a dataset in bounded memory; nothing stands under its name before `finalize`.

    Used as a context manager it removes what it has written unless `finalize` was reached.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        if prefix.suffix in (".bin", ".idx"):
            raise UserError(f"{prefix}: a prefix has no {prefix.suffix}; use {prefix.with_suffix('')}")
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._paths = {suffix: _with_suffix(prefix, suffix) for suffix in (".bin", ".json", ".idx")}
        self._partial = {suffix: partial_path(path) for suffix, path in self._paths.items()}
        self.num_documents = 0
        self.num_tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._partial[".bin"].open("wb")
        self._idx = self._partial[".idx"].open("w+b")
        self._idx.write(bytes(_HEADER.size))

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
        for at in range(0, self.num_documents, _BLOCK):
            count = min(_BLOCK, self.num_documents - at)
            self._idx.seek(_HEADER.size + 4 * at)
            sizes = np.frombuffer(self._idx.read(4 * count), dtype="<i4").astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            self._idx.seek(_HEADER.size + 4 * self.num_documents + 8 * at)
            self._idx.write((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        self._idx.seek(0, 2)
        for at in range(0, self.num_documents + 1, _BLOCK):
            self._idx.write(np.arange(at, min(at + _BLOCK, self.num_documents + 1), dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(MAGIC, VERSION, self._code, self.num_documents, self.num_documents + 1))


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped; a plain array slices faster than np.memmap's own class.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype=dtype)


def _fix_for_missing(prefix: Path) -> str:
    if prefix.suffix in (".bin", ".idx"):
        return f"; a prefix has no {prefix.suffix}, use {prefix.with_suffix('')}"
    datasets = [path.with_suffix("").name for path in prefix.parent.glob("*.idx")]
    if datasets and prefix.name not in datasets:
        return nearest(prefix.name, datasets)
    return f"; make the dataset with `megalite preprocess INPUT --output {prefix}`"


def _abridged(values: np.ndarray) -> str:
    shown = [str(value) for value in values[:8]]
    return f"[{', '.join(shown)}{', ...' if len(values) > 8 else ''}]"
