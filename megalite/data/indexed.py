"""A tokenized corpus in Megatron's format (`index_format`), memory-mapped and read."""

from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megalite.data.index_format import BLOCK, DTYPES, HEADER, MAGIC, OLD_MAGIC, VERSION, DatasetSidecar, with_suffix
from megalite.errors import UserError, nearest


class IndexedDataset:
    """A tokenized corpus, memory-mapped; its structure is checked in full when it is opened.

    Raises UserError, naming the file, what was found and what was expected.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index_path = with_suffix(prefix, ".idx")
        self.tokens_path = with_suffix(prefix, ".bin")
        for path in (self.index_path, self.tokens_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file{_fix_for_missing(prefix)}")
        self._index = _map(self.index_path, np.dtype("u1"))
        self.dtype, self.num_sequences, self._num_bounds = self._read_header()
        lengths_end = HEADER.size + 4 * self.num_sequences
        offsets_end = lengths_end + 8 * self.num_sequences
        bounds_end = offsets_end + 8 * self._num_bounds
        self._check_size(bounds_end)
        self._lengths = self._index[HEADER.size : lengths_end].view("<i4")
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
        blocks = range(0, self.num_tokens, 64 * BLOCK)
        return max((int(self._tokens[at : at + 64 * BLOCK].max()) for at in blocks), default=-1)

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
        head = self._index[: HEADER.size].tobytes()
        if head.startswith(OLD_MAGIC):
            raise UserError(
                f"{self.index_path}: a TNTIDX index, the old format of fairseq and early Megatron; MMIDIDX is allowed; "
                "preprocess the text again with `megalite preprocess`"
            )
        if not head.startswith(MAGIC[: len(head)]) or not head:
            raise UserError(
                f"{self.index_path}: begins with {head[:9].hex(' ') or 'nothing'}; {MAGIC.hex(' ')} expected"
            )
        if len(head) < HEADER.size:
            raise UserError(f"{self.index_path}: {len(head)} bytes, cut short; an index has at least {HEADER.size}")
        _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
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
        for at in range(0, self.num_sequences, BLOCK):
            sizes = self._lengths[at : at + BLOCK].astype(np.int64) * self.dtype.itemsize
            offsets = self._offsets[at : at + BLOCK]
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
        path = with_suffix(self.prefix, ".json")
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
