"""Packed documents: the lengths and positions of several documents in one row, for attention within documents.

Legend for shapes: B microbatch, S sequence.
"""

from dataclasses import dataclass
from itertools import chain

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedDocuments:
    """The documents of a microbatch ``[B, S]``, row by row.

    Raises ValueError where a document is empty or the rows are not equally long.
    """

    lengths: tuple[tuple[int, ...], ...] | None
    """For each row, the lengths of its documents in order, which sum to S; attention is limited to a document. None:
    each row is one document."""
    positions_BS: Tensor | None
    """The position of each token in its document, int64; None: 0..S-1 in every row."""

    def __post_init__(self) -> None:
        if self.lengths is None:
            return
        if min(chain(*self.lengths), default=0) < 1:
            raise ValueError(f"a document has at least one token: {self.lengths}")
        if len({sum(row) for row in self.lengths}) > 1:
            raise ValueError(f"rows have {[sum(row) for row in self.lengths]} tokens; all must have the same number")

    @property
    def document_lengths(self) -> list[int] | None:
        """The lengths of all documents, row by row; None where each row is one document."""
        if self.lengths is None or all(len(row) == 1 for row in self.lengths):
            return None
        return list(chain(*self.lengths))
