"""What is in a tokenized corpus: the lengths of its documents, and how tokens read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.tokenizers.base import Tokenizer

_BLOCK = 1 << 20
_COUNTED_APART = 1 << 22


@dataclass(frozen=True, slots=True)
class LengthHistogram:
    """Documents by their length in tokens; bin 0 is for no tokens, bin i for 2**(i-1) up to 2**i - 1."""

    documents: np.ndarray
    """int64 ``[bins]``"""
    tokens: np.ndarray
    """int64 ``[bins]``: the tokens of these documents together."""
    shortest: int
    median: int
    """The length of the middle document; of the two middle ones, the shorter."""
    longest: int

    @property
    def mean(self) -> float:
        """Tokens a document."""
        return float(self.tokens.sum() / max(1, self.documents.sum()))

    def bins(self) -> list[tuple[int, int]]:
        """Return the least and the greatest length of each bin."""
        return [(0, 0), *((1 << i, (2 << i) - 1) for i in range(len(self.documents) - 1))]


def length_histogram(dataset: IndexedDataset, progress: Callable[[int, int], None] | None = None) -> LengthHistogram:
    """Count the documents of a dataset by their length; `progress` is told the documents done and those in all."""
    documents, tokens = np.zeros(65, np.int64), np.zeros(65, np.int64)
    counts = np.zeros(_COUNTED_APART + 1, np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for start in range(0, dataset.num_documents, _BLOCK):
        lengths = dataset.document_lengths(range(start, min(start + _BLOCK, dataset.num_documents))).astype(np.int64)
        bins = np.zeros(len(lengths), np.int64)
        bins[lengths > 0] = np.frexp(lengths[lengths > 0].astype(np.float64))[1]
        documents += np.bincount(bins, minlength=65)
        tokens += np.bincount(bins, weights=lengths, minlength=65).astype(np.int64)
        counts += np.bincount(np.minimum(lengths, _COUNTED_APART), minlength=_COUNTED_APART + 1)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        if progress:
            progress(start + len(lengths), dataset.num_documents)
    middle = (dataset.num_documents + 1) // 2
    median = int(np.searchsorted(np.cumsum(counts), middle)) if dataset.num_documents else 0
    last = int(documents.nonzero()[0][-1]) if dataset.num_documents else 0
    return LengthHistogram(
        documents[: last + 1], tokens[: last + 1], shortest if dataset.num_documents else 0, median, longest
    )


def readable(tokenizer: Tokenizer, tokens: np.ndarray, loss_mask: np.ndarray | None = None) -> str:
    """Return the text of tokens with control tokens by their names, and what a loss mask counts in « »."""
    names = {token: name for name, token in tokenizer.control_tokens.items()}
    counts = np.zeros(len(tokens), bool) if loss_mask is None else loss_mask.astype(bool)
    control = np.isin(tokens, list(names))
    parts, counted, start = [], False, 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and counts[end] == counts[start] and not control[end] and not control[start]:
            continue
        if counts[start] != counted:
            counted = not counted
            parts.append("«" if counted else "»")
        ids = tokens[start:end].tolist()
        parts.append(names[ids[0]] if control[start] else tokenizer.decode(ids))
        start = end
    return "".join([*parts, "»"] if counted else parts)
