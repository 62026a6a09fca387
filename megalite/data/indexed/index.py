"""The index of a dataset (``PREFIX.idx``), mapped: where sequences and documents begin in the stream of tokens.

Opening costs the same for a thousand documents and for a billion: the header, the size, the first and last entries,
and the whole index only where it is small, else blocks of it. What is read later is checked where it is read.
"""

import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.indexed.format import DTYPES, HEADER, MAGIC, OLD_MAGIC, VERSION
from megalite.errors import UserError

CHECKED_IN_FULL = 1 << 21
"""Indexes of up to so many entries are checked in full when they are opened, in a few milliseconds."""
_BLOCK = 1 << 16
_OPENING_BLOCK = 1 << 13
"""Its arrays are so small that malloc does not map them anew each time, which would cost more than all else."""
_SOME_BLOCKS = 64
_SOME_BLOCK = 1 << 12


class MappedIndex:
    """Sequences, stretches of the stream of tokens in a row, and documents, which are sequences in a row.

    Raises UserError for what is broken, with the file, what was found and what was expected.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = map_file(path, np.dtype("u1"))
        self.dtype, self.num_sequences, self._num_bounds = self._read_header()
        lengths_end = HEADER.size + 4 * self.num_sequences
        offsets_end = lengths_end + 8 * self.num_sequences
        bounds_end = offsets_end + 8 * self._num_bounds
        self._check_size(bounds_end)
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._lengths = _Column(self._bytes[:lengths_end], descriptor, HEADER.size, "<i4")
        self._offsets = _Column(self._bytes[:offsets_end], descriptor, lengths_end, "<i8")
        self._bounds = _Column(self._bytes[:bounds_end], descriptor, offsets_end, "<i8")
        self.modes = self._bytes[bounds_end:].view("i1") if len(self._bytes) > bounds_end else None
        self._one_sequence_a_document = False
        self.num_tokens = self._check_ends() // self.dtype.itemsize
        for _ in self.check(whole=False):
            pass

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._num_bounds - 1

    def check(self, *, whole: bool) -> Iterator[int]:
        """Check the entries, all of them or, where they are many, evenly spaced blocks; yield how many at a time."""
        for size, check in ((self.num_sequences, self._check_sequences), (self._num_bounds, self._check_bounds)):
            for at in _blocks(size, whole=whole):
                check(at)
                yield len(at)

    def require_one_sequence_a_document(self) -> None:
        """Raise UserError, now or when it is read, for a document that is not one sequence."""
        self._one_sequence_a_document = True
        for at in _blocks(self._num_bounds, whole=False):
            self._check_bounds(at)

    def sequence_lengths(self, sequences: range) -> np.ndarray:
        """Return the tokens of each of some neighbouring sequences: int32[len(sequences)], a copy."""
        return self._lengths.read(sequences.start, sequences.stop)

    def sequence_spans(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in the stream each of some sequences begins, and its length: int64[n] to two of int64[n]."""
        starts, ends = self._starts_of(sequences), self._starts_of(sequences + 1)
        lengths = self._lengths[sequences].astype(np.int64)
        wrong = (lengths < 0) | (ends - starts != lengths)
        if wrong.any():
            first = int(wrong.argmax())
            raise self.broken(
                f"sequence {sequences[first]} has {lengths[first]} tokens from {starts[first]} on, and the next one "
                f"begins at {ends[first]}"
            )
        return starts, lengths

    def document_starts(self, documents: range) -> np.ndarray:
        """Return where neighbouring documents begin, `num_documents` being the end of all: int64[len(documents)]."""
        sequences = self._check_bounds(documents)
        starts = self._starts_of(sequences)
        lengths = np.diff(starts)
        wrong = lengths < 0
        alone = np.flatnonzero(np.diff(sequences) == 1)
        wrong[alone] |= lengths[alone] != self._lengths[sequences[alone]]
        if wrong.any():
            first = int(wrong.argmax())
            raise self.broken(f"document {documents[first]} has {lengths[first]} tokens by its offsets, not its length")
        return starts

    def document_at(self, token: int) -> int:
        """Return the document that holds a token of the stream, by bisection; documents without tokens hold none."""
        document = bisect_right(range(self.num_documents), token, key=self._document_start) - 1
        start, stop = self.document_starts(range(max(document, 0), max(document, 0) + 2)).tolist()
        if not start <= token < stop:
            raise self.broken(f"document {document} has tokens {start}..{stop}, though token {token} leads to it")
        return document

    def broken(self, found: str) -> UserError:
        """Return the error to raise for an index that cannot be."""
        return UserError(f"{self.path}: {found}; the file is broken, preprocess again")

    def _document_start(self, document: int) -> int:
        sequence = int(self._bounds[document])
        inside = 0 <= sequence < self.num_sequences
        return int(self._offsets[sequence]) // self.dtype.itemsize if inside else self.num_tokens

    def _starts_of(self, sequences: np.ndarray) -> np.ndarray:
        """Where sequences begin in the stream, `num_sequences` being its end: int64[n] to int64[n], checked."""
        inside = sequences < self.num_sequences
        offsets = np.full(len(sequences), self.num_tokens * self.dtype.itemsize)
        offsets[inside] = self._offsets[sequences[inside]]
        starts, rest = np.divmod(offsets, self.dtype.itemsize)
        wrong = (starts < 0) | (starts > self.num_tokens) | (rest != 0)
        if wrong.any():
            first = int(wrong.argmax())
            raise self.broken(
                f"sequence {sequences[first]} begins at byte {offsets[first]}, which is none of its {self.num_tokens} "
                "tokens"
            )
        return starts

    def _read_header(self) -> tuple[np.dtype, int, int]:
        head = self._bytes[: HEADER.size].tobytes()
        if head.startswith(OLD_MAGIC):
            raise UserError(
                f"{self.path}: a TNTIDX index, the old format of fairseq and early Megatron; MMIDIDX is allowed; "
                "preprocess the text again with `megalite preprocess`"
            )
        if not head.startswith(MAGIC[: len(head)]) or not head:
            raise UserError(f"{self.path}: begins with {head[:9].hex(' ') or 'nothing'}; {MAGIC.hex(' ')} expected")
        if len(head) < HEADER.size:
            raise UserError(f"{self.path}: {len(head)} bytes, cut short; an index has at least {HEADER.size}")
        _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
        if version != VERSION:
            raise UserError(f"{self.path}: version {version} found; {VERSION} expected")
        if code not in DTYPES:
            known = ", ".join(f"{number} ({dtype})" for number, dtype in DTYPES.items())
            raise UserError(f"{self.path}: dtype code {code} found; token ids have one of {known}")
        return DTYPES[code], num_sequences, num_bounds

    def _check_size(self, without_modes: int) -> None:
        allowed = (without_modes, without_modes + self.num_sequences)
        if len(self._bytes) not in allowed:
            raise self.broken(
                f"{len(self._bytes)} bytes found; {self.num_sequences} sequences and {self._num_bounds - 1} documents "
                f"make {without_modes}"
            )

    def _check_ends(self) -> int:
        """Return the bytes of ``.bin`` that the index describes."""
        bounds, last = self._bounds, self.num_sequences - 1
        if not self._num_bounds or bounds[0] != 0 or bounds[-1] != self.num_sequences:
            raise self._wrong_bounds(range(self._num_bounds))
        if last < 0:
            return 0
        for sequence in (0, last):
            size, offset = int(self._lengths[sequence]) * self.dtype.itemsize, int(self._offsets[sequence])
            if size < 0 or offset < 0 or (sequence == 0 and offset):
                raise self.broken(
                    f"sequence {sequence} has {size} bytes from {offset} on; the first begins at 0 and none has less"
                )
        return offset + size

    def _check_sequences(self, at: range) -> None:
        sizes = self.sequence_lengths(at).astype(np.int64) * self.dtype.itemsize
        offsets = np.full(len(at) + 1, self.num_tokens * self.dtype.itemsize)
        known = self._offsets.read(at.start, min(at.stop + 1, self.num_sequences))
        offsets[: len(known)] = known
        wrong = (sizes < 0) | (offsets[:-1] < 0) | (offsets[:-1] + sizes != offsets[1:])
        if wrong.any():
            first = int(wrong.argmax())
            raise self.broken(
                f"sequence {at[first]} has {sizes[first]} bytes from {offsets[first]} on, and the next one begins at "
                f"{offsets[first + 1]}, not where it ends"
            )

    def _check_bounds(self, at: range) -> np.ndarray:
        """Return the first sequences of documents: int64[len(at)]."""
        bounds = self._bounds.read(at.start, min(at.stop + 1, self._num_bounds))
        if self._one_sequence_a_document:
            wrong = bounds != np.arange(at.start, at.start + len(bounds))
        else:
            wrong = bounds[1:] < bounds[:-1]
        if wrong.any() or bounds[0] < 0 or bounds[-1] > self.num_sequences:
            raise self._wrong_bounds(at)
        return bounds[: len(at)]

    def _wrong_bounds(self, at: range) -> UserError:
        each = ", one a document" if self._one_sequence_a_document else ""
        return self.broken(
            f"document indices {_abridged(self._bounds[at.start : at.stop])} found from {at.start} on; they must begin "
            f"with 0, never fall and end with {self.num_sequences}, the number of sequences{each}"
        )


class _Column:
    """One array of the index, from byte `start` on: mapped for single entries, read for neighbouring ones.

    To read is faster, as a page fault costs more than its page, and it leaves no pages with the process. The header's
    34 bytes leave the mapped array unaligned, all of which numpy would copy in take and searchsorted.
    """

    def __init__(self, mapped: np.ndarray, descriptor: int, start: int, dtype: str) -> None:
        self._mapped, self._descriptor, self._start = mapped[start:].view(dtype), descriptor, start

    def __getitem__(self, places: int | slice | np.ndarray) -> Any:
        return self._mapped[places]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return entries from `start` to before `stop`, a copy."""
        entries = np.empty(stop - start, self._mapped.dtype)
        view, at = entries.view("u1").data, self._start + start * entries.itemsize
        while view:
            count = os.preadv(self._descriptor, [view], at)
            if not count:
                raise OSError(f"the index ends at byte {at}")
            view, at = view[count:], at + count
        return entries


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file into memory, read only; an empty file is an empty array."""
    # A plain array slices faster than np.memmap's own class.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype=dtype)


def _blocks(size: int, *, whole: bool) -> Iterator[range]:
    """Neighbouring blocks of an array; of a long one, unless `whole`, some, with its two ends."""
    if whole or size <= CHECKED_IN_FULL:
        length = _BLOCK if whole else _OPENING_BLOCK
        yield from (range(at, min(at + length, size)) for at in range(0, size, length))
        return
    for block in range(_SOME_BLOCKS):
        at = (size - _SOME_BLOCK) * block // (_SOME_BLOCKS - 1)
        yield range(at, at + _SOME_BLOCK)


def _abridged(values: np.ndarray) -> str:
    shown = [str(value) for value in values[:8]]
    return f"[{', '.join(shown)}{', ...' if len(values) > 8 else ''}]"
