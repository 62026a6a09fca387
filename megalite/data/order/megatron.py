"""Megatron-core's order of samples, sample for sample, built once and kept (`index_cache`).

Documents are shuffled and joined, the row is cut into samples, and the samples are shuffled; several epochs are
shuffled as one, except that a last one of which less than 80% is asked for is shuffled apart.
"""

from hashlib import sha256
from pathlib import Path

import numpy as np

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.order.index_cache import Arrays, cached_arrays
from megalite.data.order.streaming import Piece, pieces_between
from megalite.errors import UserError

_INT32 = np.iinfo(np.int32).max
_UINT32 = np.iinfo(np.uint32).max
_BLOCK = 1 << 20


class MegatronSamples:
    """The samples of Megatron-core's GPTDataset: `num_samples` of them and what is over of the last epoch.

    `documents` is the range to take, by default all, counted in sequences of the index, which is what Megatron-core
    splits and shuffles as documents; in what megalite writes each document is one. Without `num_samples` it is one
    epoch. `extra_token` and `drop_last` are Megatron-core's ``add_extra_token_to_sequence`` and
    ``drop_last_partial_validation_sequence``: where a sample then has fewer than ``sequence_length + 1`` tokens, zeros
    follow that do not count. With a kept tail Megatron-core trips over a last document without tokens, and its float32
    miscounts the samples of more than 2^24 tokens: here the tail is that of the last document with a token, and all is
    counted in whole numbers.

    Opening hashes the lengths of all documents: for a billion of them take the streaming order. Raises UserError where
    the documents hold less than one sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        *,
        sequence_length: int,
        seed: int,
        num_samples: int | None,
        documents: range | None = None,
        cache_dir: Path | None = None,
        extra_token: bool = True,
        drop_last: bool = True,
    ) -> None:
        chosen = range(indexed.num_sequences) if documents is None else documents
        if not 0 <= seed <= _UINT32:
            raise UserError(
                f"run.seed={seed}: Megatron's order takes 0 to {_UINT32}; use another, or data.order=streaming"
            )
        if chosen.stop > _INT32:
            raise UserError(
                f"{indexed.index_path}: {chosen.stop} documents; Megatron's order numbers up to {_INT32}; use "
                "data.order=streaming"
            )
        self._indexed = indexed
        self._extra, self._drop_last = int(extra_token), drop_last
        self.sequence_length = sequence_length
        self.has_loss_mask = indexed.has_loss_mask or not (extra_token and drop_last)
        self.tokens_per_epoch, digest = _digest(indexed, chosen)
        self.samples_per_epoch = max(self.tokens_per_epoch - self._extra, 0) // sequence_length
        if not self.samples_per_epoch:
            raise UserError(
                f"{indexed.prefix}: documents {chosen.start}..{chosen.stop} hold {self.tokens_per_epoch} tokens; one "
                f"sample of data.sequence_length={sequence_length} takes {sequence_length + self._extra}; give more "
                "text, a larger share in data.split, or a shorter sequence"
            )
        facts = {
            "order": "megatron",
            "lengths": digest,
            "first": chosen.start,
            "sequence_length": sequence_length,
            "seed": seed,
            "num_samples": num_samples,
            "extra_token": self._extra,
            "drop_last": drop_last,
        }
        index = cached_arrays(
            cache_dir,
            "megatron",
            facts,
            lambda: build_index(
                indexed.sequence_lengths(chosen),
                sequence_length=sequence_length,
                seed=seed,
                num_samples=num_samples,
                first=chosen.start,
                extra_token=extra_token,
                drop_last=drop_last,
            ),
        )
        self.document_index: np.ndarray = index["document_index"]
        """int32: the sequences of all epochs in their order."""
        self.sample_index: np.ndarray = index["sample_index"]
        """int32 ``[samples + 1, 2]``: where each begins, as a place in `document_index` and a token of it."""
        self.shuffle_index: np.ndarray = index["shuffle_index"]
        """uint32: rows of `sample_index` in the order of training."""
        self.num_samples: int | None = len(self.shuffle_index)

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return samples, int64[n] to int64[n, sequence_length + 1]; raise IndexError outside 0..num_samples - 1."""
        starts, lengths, totals = self._stretches(indices)
        return self._rows(self._indexed.stretches(starts, lengths), totals)

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        """Return which tokens are targets that count, uint8[n, sequence_length + 1]; None: all; raise as above."""
        if not self.has_loss_mask:
            return None
        starts, lengths, totals = self._stretches(indices)
        if not self._indexed.has_loss_mask:
            return self._rows(np.ones(lengths.sum(), np.uint8), totals)
        return self._rows(self._indexed.stretches(starts, lengths, masked=True), totals)

    def pieces(self, index: int) -> list[Piece]:
        """Return the documents of a sample, in order; raise IndexError as above."""
        starts, lengths, _ = self._stretches(np.array([index]))
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        return [piece for start, stop in spans for piece in pieces_between(self._indexed, start, stop)]

    def _stretches(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the parts of samples begin in the stream and how long they are; and the tokens of each sample."""
        if not len(indices):
            return indices, indices, indices
        if not 0 <= indices.min() <= indices.max() < len(self.shuffle_index):
            raise IndexError(f"{indices.min()}..{indices.max()} are not all in 0..{len(self.shuffle_index) - 1}")
        rows = self.shuffle_index[indices].astype(np.int64)
        first, last = self.sample_index[rows].astype(np.int64), self.sample_index[rows + 1].astype(np.int64)
        counts = last[:, 0] - first[:, 0] + 1
        heads = np.cumsum(counts) - counts
        places = np.repeat(first[:, 0] - heads, counts) + np.arange(counts.sum())
        starts, lengths = self._indexed.sequence_spans(self.document_index[places].astype(np.int64))
        lengths[heads + counts - 1] = last[:, 1] + self._extra
        starts[heads] += first[:, 1]
        lengths[heads] -= first[:, 1]
        return starts, lengths, np.add.reduceat(lengths, heads)

    def _rows(self, joined: np.ndarray, totals: np.ndarray) -> np.ndarray:
        width = self.sequence_length + 1
        if len(joined) == len(totals) * width:
            return joined.reshape(len(totals), width)
        rows = np.zeros((len(totals), width), joined.dtype)
        rows[np.arange(width) < totals[:, None]] = joined
        return rows


def build_index(
    lengths: np.ndarray,
    *,
    sequence_length: int,
    seed: int,
    num_samples: int | None,
    first: int = 0,
    extra_token: bool = True,
    drop_last: bool = True,
) -> Arrays:
    """Build Megatron-core's `document_index`, `sample_index` and `shuffle_index`, in its dtypes.

    `lengths`, int32[D], are those of the documents from number `first` on; at least one has a token.
    """
    extra, epoch = int(extra_token), int(lengths.sum(dtype=np.int64))
    epochs, apart = epochs_of(epoch, sequence_length=sequence_length, num_samples=num_samples, extra=extra)
    before_last = ((epochs - 1) * epoch - extra) // sequence_length
    random = np.random.RandomState(seed)
    document_index = np.tile(np.arange(first, first + len(lengths), dtype=np.int32), epochs)
    _shuffle(random, document_index, len(lengths) * (epochs - 1) if apart else len(document_index))
    sample_index = _sample_index(lengths, document_index - np.int32(first), sequence_length, epochs, extra, drop_last)
    samples = len(sample_index) - 1
    shuffle_index = np.arange(samples, dtype=np.uint32 if samples < _UINT32 - 1 else np.int64)
    _shuffle(random, shuffle_index, before_last if apart else samples)
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


def epochs_of(epoch_tokens: int, *, sequence_length: int, num_samples: int | None, extra: int = 1) -> tuple[int, bool]:
    """Return over how many epochs of `epoch_tokens` tokens `num_samples` samples are laid, and whether the last epoch
    is shuffled apart. The order of the samples follows from no other property of their number."""
    if num_samples is None:
        return 1, False
    epochs = max(1, -(-(num_samples * sequence_length + extra) // epoch_tokens))
    before_last = ((epochs - 1) * epoch_tokens - extra) // sequence_length
    return epochs, epochs > 1 and num_samples - before_last < int(0.8 * ((epoch_tokens - extra) // sequence_length))


def _shuffle(random: np.random.RandomState, values: np.ndarray, size: int) -> None:
    """Shuffle in place the first `size` and the rest, each for itself."""
    random.shuffle(values[:size])
    if size < len(values):
        random.shuffle(values[size:])


def _sample_index(
    lengths: np.ndarray, documents: np.ndarray, sequence_length: int, epochs: int, extra: int, drop_last: bool
) -> np.ndarray:
    """Row i is where token ``i * sequence_length`` of all documents in a row stands: its document and place in it.

    Without the extra token it is where the token before that one ends, and a partial last row the end of all.
    """
    tokens = epochs * int(lengths.sum(dtype=np.int64)) - extra
    rows = tokens // sequence_length if drop_last else -(-tokens // sequence_length)
    index = np.zeros((rows + 1, 2), np.int32 if len(documents) <= _INT32 else np.int64)
    row, end = 1, 0
    for at in range(0, len(documents), _BLOCK):
        sizes = lengths[documents[at : at + _BLOCK]]
        ends = end + np.cumsum(sizes, dtype=np.int64)
        end = int(ends[-1])
        stop = max(row, min((end - extra) // sequence_length, rows) + 1)
        targets = np.arange(row, stop) * sequence_length
        found = np.searchsorted(ends, targets, side="right" if extra else "left")
        index[row:stop, 0] = at + found
        index[row:stop, 1] = targets - (ends[found] - sizes[found])
        row = stop
    if row <= rows:
        last = len(documents) - 1
        while lengths[documents[last]] < extra:
            last -= 1
        index[row] = last, lengths[documents[last]] - extra
    return index


def _digest(indexed: IndexedDataset, chosen: range) -> tuple[int, str]:
    """The tokens of some sequences, and a digest of their lengths."""
    digest, tokens = sha256(), 0
    for at in range(chosen.start, chosen.stop, _BLOCK):
        lengths = indexed.sequence_lengths(range(at, min(at + _BLOCK, chosen.stop)))
        digest.update(lengths.data)
        tokens += int(lengths.sum(dtype=np.int64))
    return tokens, digest.hexdigest()
