"""Samples of a GPT's training text, and the streaming order: sample i is a function of (seed, i), found by arithmetic.

The tokens of the chosen documents are one stream. An epoch cuts it into stretches of `sequence_length` tokens, each
read with the token after it, so that neighbours share one token and every token but the first is a target once. The
order of the stretches is a keyed permutation of its own for every epoch, computed when it is asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.order.permutation import KeyedPermutation
from megalite.errors import UserError

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document within a sample."""

    prefix: Path
    """The dataset."""
    document: int
    offset: int
    """Tokens into the document."""
    length: int
    """Tokens."""

    def as_json(self) -> dict[str, str | int]:
        """Return the piece in plain words."""
        return {
            "prefix": str(self.prefix),
            "document": self.document,
            "offset": self.offset,
            "tokens": self.length,
        }


class Samples(Protocol):
    """Training samples of `sequence_length` tokens and one more, from 0 on in the order in which they are read.

    `samples_per_epoch` is how many of them see everything about once; `num_samples` how many there are, None where
    there is no end. Indices beyond the end, or below 0, raise IndexError.
    """

    sequence_length: int
    samples_per_epoch: int
    num_samples: int | None
    has_loss_mask: bool
    """Whether `loss_mask` leaves anything out, of any sample."""

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return samples, int64[n] to int64[n, sequence_length + 1]."""
        ...

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        """Return which tokens are targets that count, int64[n] to uint8[n, sequence_length + 1]; None: all."""
        ...

    def pieces(self, index: int) -> list[Piece]:
        """Return what a sample is made of, in order, no piece empty."""
        ...


class StreamingSamples:
    """Samples without end, epoch after epoch, in the order of `seed`; opened in constant time and memory.

    `documents` is the range of documents to take, by default all. Raises UserError where they hold less than one
    sample.
    """

    def __init__(
        self, indexed: IndexedDataset, *, sequence_length: int, seed: int, documents: range | None = None
    ) -> None:
        chosen = range(indexed.num_documents) if documents is None else documents
        self._indexed = indexed
        self._first_token, end = 0, 0
        if chosen:
            self._first_token, end = indexed.document_span(chosen[0])[0], indexed.document_span(chosen[-1])[1]
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_samples: int | None = None
        self.has_loss_mask = indexed.has_loss_mask
        self.tokens_per_epoch = end - self._first_token
        self.samples_per_epoch = max(self.tokens_per_epoch - 1, 0) // sequence_length
        if not self.samples_per_epoch:
            raise UserError(
                f"{indexed.prefix}: documents {chosen.start}..{chosen.stop} hold {self.tokens_per_epoch} tokens; one "
                f"sample of data.sequence_length={sequence_length} takes {sequence_length + 1}; give more text, a "
                "larger share in data.split, or a shorter sequence"
            )

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return samples, int64[n] to int64[n, sequence_length + 1]; raise IndexError below 0."""
        return self._indexed.windows(self._starts(indices), self.sequence_length + 1)

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        """Return which tokens are targets that count, uint8[n, sequence_length + 1]; None without a loss mask."""
        if not self._indexed.has_loss_mask:
            return None
        return self._indexed.windows(self._starts(indices), self.sequence_length + 1, masked=True)

    def pieces(self, index: int) -> list[Piece]:
        """Return the documents of a sample, in order; raise IndexError below 0."""
        start = int(self._starts(np.array([index]))[0])
        return list(pieces_between(self._indexed, start, start + self.sequence_length + 1))

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        """Where samples begin in the dataset's stream of tokens: int64[n] to int64[n]."""
        if len(indices) and indices.min() < 0:
            raise IndexError(f"sample {indices.min()}: samples count from 0")
        places = epoch_order(indices, self.samples_per_epoch, self.seed)
        return self._first_token + places * self.sequence_length


def pieces_between(indexed: IndexedDataset, start: int, stop: int) -> Iterator[Piece]:
    """Yield the documents between two tokens of a dataset's stream, in order, none empty."""
    while start < stop:
        # A bisection for each block, not for each document; and no walk over any number of empty documents.
        first = indexed.document_at(start)
        block = range(first, min(first + _DOCUMENTS_AT_ONCE, indexed.num_documents))
        offset = start - indexed.document_span(first)[0]
        for document, length in zip(block, indexed.document_lengths(block).tolist(), strict=True):
            taken = min(length - offset, stop - start)
            if taken:
                yield Piece(indexed.prefix, document, offset, taken)
            start, offset = start + taken, 0


def epoch_order(indices: np.ndarray, samples_per_epoch: int, seed: int) -> np.ndarray:
    """Return which of 0 to `samples_per_epoch` - 1 each sample is, int64[n] to int64[n]; epochs differ in the order."""
    epochs, places = np.divmod(indices, samples_per_epoch)
    for epoch in np.unique(epochs).tolist():
        within = epochs == epoch
        places[within] = _order(samples_per_epoch, seed, epoch).array(places[within])
    return places


@lru_cache(maxsize=16)
def _order(samples: int, seed: int, epoch: int) -> KeyedPermutation:
    return KeyedPermutation(samples, f"megalite sample order, seed {seed}, epoch {epoch}".encode())


def split_documents(num_documents: int, fractions: Sequence[float]) -> list[range]:
    """Split documents into neighbouring ranges by shares, in any unit; bounds are Megatron's ``int(round(f * N))``.

    >>> split_documents(10, (0.9, 0.1))
    [range(0, 9), range(9, 10)]
    """
    shares = np.array(fractions, dtype=np.float64)
    if not shares.sum() > 0 or shares.min() < 0:
        raise ValueError(f"shares must be 0 or more and not all 0, not {tuple(fractions)}")
    # numpy's sums, whatever Python's own does: since 3.12 it makes up for rounding, and a bound could move by one.
    ends = np.cumsum(shares / shares.sum()).tolist()
    bounds = [0, *(int(round(end * num_documents)) for end in ends)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
