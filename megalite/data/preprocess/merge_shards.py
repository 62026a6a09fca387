"""The shards put together: the documents that stay, in the order of the input or in a shuffled one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.data.indexed.writer import IndexedDatasetWriter, copy_bytes
from megalite.data.preprocess.encode_shard import ShardFiles

_BUCKET_BYTES = 1 << 26
_MOST_BUCKETS = 1 << 12


@dataclass(frozen=True, slots=True)
class Run:
    """Documents that stand in a row in the files of a shard."""

    files: ShardFiles
    start: int
    """The first token."""
    lengths: np.ndarray


def runs(shards: Sequence[ShardFiles], left_out: np.ndarray | None) -> Iterator[Run]:
    """Yield the documents of all shards without those for which bool[documents] `left_out` is true."""
    before = 0
    for files in shards:
        lengths = np.fromfile(files.lengths, dtype="<i4").astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        for first, end in _kept(left_out, before, len(lengths)):
            yield Run(files, int(starts[first]), lengths[first:end])
        before += len(lengths)


def count_tokens(shards: Sequence[ShardFiles], left_out: np.ndarray | None, vocab_size: int, dtype: str) -> np.ndarray:
    """Return how often each token id occurs in the documents that stay: int64[vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for files in shards:
        seen, times = np.fromfile(files.counts, dtype="<i8").reshape(2, -1)
        counts[seen] += times
    if left_out is not None:
        for run in runs(shards, ~left_out):
            size = int(run.lengths.sum())
            width = np.dtype(dtype).itemsize
            for at in range(0, size, _BUCKET_BYTES):
                take = min(_BUCKET_BYTES, size - at)
                tokens = np.fromfile(run.files.tokens, dtype, take, offset=(run.start + at) * width)
                counts -= np.bincount(tokens, minlength=vocab_size)
    return counts


def write_in_order(stretches: Iterator[Run], writer: IndexedDatasetWriter, check: Callable[[], None]) -> None:
    """Append documents in the order of the input; `check` is called now and then and may raise."""
    for run in stretches:
        check()
        writer.copy_documents(run.files.tokens, run.start, run.lengths, run.files.loss_mask)


def write_shuffled(
    stretches: Iterator[Run],
    tokens: int,
    seed: int,
    folder: Path,
    writer: IndexedDatasetWriter,
    check: Callable[[], None],
) -> None:
    """Append documents in a random order, each order as likely as any other, in bounded memory.

    Documents are dealt at random into files in `folder` of some megabytes, then the documents of each are shuffled:
    everything is read and written in a row. `tokens` says about how many files to make. Every document takes a lot of
    its own from `seed`, so the order depends on the documents, never on how they were cut into shards.
    """
    lots = np.random.RandomState(seed)
    buckets = min(1 + tokens * writer.dtype.itemsize // _BUCKET_BYTES, _MOST_BUCKETS)
    for run in stretches:
        check()
        for part in _bounded(run, _BUCKET_BYTES // writer.dtype.itemsize):
            _deal(part, lots.randint(0, buckets, size=len(part.lengths)), folder, writer)
    for number in range(buckets):
        check()
        bucket = _bucket(folder, number)
        if bucket.lengths.exists():
            _write_bucket(bucket, lots, writer)


def _kept(left_out: np.ndarray | None, before: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the documents in a row that stay, of `count` that begin with number `before`."""
    if left_out is None:
        if count:
            yield 0, count
        return
    padded = np.zeros(count + 2, dtype=np.int8)
    padded[1:-1] = ~left_out[before : before + count]
    change = np.diff(padded)
    yield from zip(np.flatnonzero(change == 1).tolist(), np.flatnonzero(change == -1).tolist(), strict=True)


def _bounded(run: Run, most: int) -> Iterator[Run]:
    """Cut a run into runs of about `most` tokens, a document that is longer being one of its own."""
    ends = np.cumsum(run.lengths)
    first = 0
    while first < len(ends):
        before = int(ends[first] - run.lengths[first])
        end = max(int(np.searchsorted(ends, before + most, side="right")), first + 1)
        yield Run(run.files, run.start + before, run.lengths[first:end])
        first = end


def _bucket(folder: Path, number: int) -> ShardFiles:
    return ShardFiles(folder / f"{number:04d}")


def _deal(run: Run, lots: np.ndarray, folder: Path, writer: IndexedDatasetWriter) -> None:
    order = np.argsort(lots, kind="stable")
    drawn = lots[order]
    firsts = np.flatnonzero(np.diff(drawn, prepend=-1))
    for chosen in np.split(order, firsts[1:]):
        bucket = _bucket(folder, int(lots[chosen[0]]))
        with bucket.lengths.open("ab") as file:
            run.lengths[chosen].astype("<i4").tofile(file)
        _gather(run, chosen, bucket.tokens, run.files.tokens, writer.dtype)
        if writer.with_loss_mask:
            _gather(run, chosen, bucket.loss_mask, run.files.loss_mask, np.dtype(np.uint8))


def _gather(run: Run, chosen: np.ndarray, target: Path, source: Path, dtype: np.dtype) -> None:
    """Append chosen documents of a run, in this order, to a file."""
    with target.open("ab", buffering=0) as file:
        if len(run.lengths) == 1:  # of any size
            copy_bytes(source, run.start * dtype.itemsize, int(run.lengths[0]) * dtype.itemsize, file)
            return
        values = np.fromfile(source, dtype, int(run.lengths.sum()), offset=run.start * dtype.itemsize)
        np.concatenate(_slices(values, run.lengths, chosen)).tofile(file)


def _write_bucket(bucket: ShardFiles, lots: np.random.RandomState, writer: IndexedDatasetWriter) -> None:
    lengths = np.fromfile(bucket.lengths, dtype="<i4").astype(np.int64)
    order = lots.permutation(len(lengths))
    if lengths.sum() * writer.dtype.itemsize > 2 * _BUCKET_BYTES:
        # A few huge documents, or a corpus of which there cannot be files enough: one document at a time.
        starts = np.cumsum(lengths) - lengths
        for document in order:
            writer.copy_documents(
                bucket.tokens, int(starts[document]), lengths[document : document + 1], bucket.loss_mask
            )
    else:
        tokens = np.concatenate(_slices(np.fromfile(bucket.tokens, writer.dtype), lengths, order))
        mask = None
        if writer.with_loss_mask:
            mask = np.concatenate(_slices(np.fromfile(bucket.loss_mask, np.uint8), lengths, order))
        writer.add_documents(tokens, lengths[order], mask)
    for path in (bucket.tokens, bucket.lengths, bucket.loss_mask):
        path.unlink(missing_ok=True)


def _slices(values: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(lengths)
    starts = ends - lengths
    return [values[start:end] for start, end in zip(starts[order].tolist(), ends[order].tolist(), strict=True)]
