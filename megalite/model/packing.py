"""Packed documents: the boundaries and positions of several documents in one row, for attention within documents.

Legend for shapes: B microbatch, S sequence, D documents of a microbatch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedDocuments:
    """The documents of a microbatch ``[B, S]``, row by row; a document has at least one token and ends with its row."""

    cu_seqlens: Tensor | None
    """int32 ``[D + 1]``: where each document begins in the flattened rows, and B*S; attention is limited to a document.
    None: each row is one document."""
    positions_BS: Tensor | None
    """The position of each token in its document, int64; None: 0..S-1 in every row."""


def document_numbers(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """Return the number of each token's document, ``[rows, length]``; the host does not read `cu_seqlens`."""
    tokens = torch.arange(rows * length, device=cu_seqlens.device)
    # All of the boundaries: torch.compile would take a part of them with one element for a case of its own.
    return torch.bucketize(tokens, cu_seqlens, right=True).view(rows, length) - 1
