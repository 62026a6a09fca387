"""Several datasets of one tokenizer made into one, by copying: no token is read by this process but to be counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import BLOCK, DTYPES, HEADER, MAGIC, VERSION, DatasetSidecar, with_suffix
from megalite.data.indexed.writer import (
    SUFFIXES,
    copy_bytes,
    publish_dataset,
    require_new_dataset,
    require_prefix,
    write_sidecar,
)
from megalite.data.preprocess.preprocess import entropy
from megalite.errors import UserError
from megalite.files import partial_path

_EDGES = ("eod_id", "eod_token", "bos_id", "bos_token")
"""What the sidecar says of the tokens around documents, which it says only where it is true of all of them."""

Progress = Callable[[int, int], None]
"""Is told the tokens done and the tokens there are."""


def merge_datasets(
    prefixes: Sequence[Path], output: Path, progress: Progress | None = None, *, overwrite: bool = True
) -> IndexedDataset:
    """Write the documents of datasets one after the other as one dataset, and return it.

    Sequences, documents, modes and loss masks are kept as they are; the sidecar's counts are added up. The datasets
    may come from Megatron and have no sidecar: then the new one has none either.

    Raises UserError where two do not fit together, for a dataset that is broken, and where `overwrite` is false and the
    output is there.
    """
    require_prefix(output)
    if not overwrite:
        require_new_dataset(output)
    if not prefixes:
        raise UserError("merge: no dataset is given; name the prefixes of some")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for dataset in datasets:
        _require_alike(datasets[0], dataset)
        if dataset.prefix.resolve() == output.resolve():
            raise UserError(f"{output}: is to be read and written at once; give the merged dataset another name")
        dataset.verify()
    paths = {suffix: with_suffix(output, suffix) for suffix in SUFFIXES}
    partial = {suffix: partial_path(path) for suffix, path in paths.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _copy_tokens(datasets, partial)
        with partial[".idx"].open("wb") as index:
            _write_index(datasets, index)
        if datasets[0].sidecar is not None:
            sidecar = _sum([dataset.sidecar for dataset in datasets if dataset.sidecar], _count(datasets, progress))
            write_sidecar(sidecar, partial)
        publish_dataset(partial, paths)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return IndexedDataset(output)


def _require_alike(first: IndexedDataset, other: IndexedDataset) -> None:
    def refuse(found: str, expected: str, fix: str) -> UserError:
        return UserError(f"{other.prefix}: {found}, {first.prefix} {expected}; {fix}")

    if other.dtype != first.dtype:
        raise refuse(f"tokens are {other.dtype}", f"has {first.dtype}", "preprocess both with one tokenizer")
    if other.has_loss_mask != first.has_loss_mask:
        words = {True: "has a loss mask", False: "has none"}
        raise refuse(
            words[other.has_loss_mask], words[first.has_loss_mask], "merge those with a mask and those without"
        )
    if (other.modes is None) != (first.modes is None):
        words = {True: "has no modes", False: "has modes"}
        raise refuse(words[other.modes is None], words[first.modes is None], "merge datasets of one kind")
    if (other.sidecar is None) != (first.sidecar is None):
        words = {True: "has no sidecar that names its tokenizer", False: "has one"}
        fix = "preprocess it again, or remove the .json of the others"
        raise refuse(words[other.sidecar is None], words[first.sidecar is None], fix)
    if other.sidecar is not None and first.sidecar is not None:
        digests = other.sidecar.tokenizer_sha256, first.sidecar.tokenizer_sha256
        if digests[0] != digests[1]:
            raise refuse(
                f"made with tokenizer {digests[0][:12]}",
                f"with {digests[1][:12]}",
                "preprocess both with one tokenizer",
            )


def _copy_tokens(datasets: Sequence[IndexedDataset], partial: dict[str, Path]) -> None:
    with ExitStack() as stack:
        tokens = stack.enter_context(partial[".bin"].open("wb", buffering=0))
        masked = datasets[0].has_loss_mask
        mask = stack.enter_context(partial[".mask"].open("wb", buffering=0)) if masked else None
        for dataset in datasets:
            copy_bytes(dataset.tokens_path, 0, dataset.num_tokens * dataset.dtype.itemsize, tokens)
            if mask is not None:
                copy_bytes(dataset.mask_path, 0, dataset.num_tokens, mask)


def _write_index(datasets: Sequence[IndexedDataset], index: BinaryIO) -> None:
    code = next(code for code, known in DTYPES.items() if known == datasets[0].dtype)
    sequences = sum(dataset.num_sequences for dataset in datasets)
    documents = sum(dataset.num_documents for dataset in datasets)
    index.write(HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1))
    for dataset in datasets:
        _copy_blocks(index, _blocks(dataset, 0, "<i4", dataset.num_sequences), 0)
    tokens = 0
    for dataset in datasets:
        at = 4 * dataset.num_sequences
        _copy_blocks(index, _blocks(dataset, at, "<i8", dataset.num_sequences), tokens * dataset.dtype.itemsize)
        tokens += dataset.num_tokens
    index.write(np.zeros(1, dtype="<i8").tobytes())
    before = 0
    for dataset in datasets:
        # The first bound of each is where the one before ends.
        at = 12 * dataset.num_sequences + 8
        _copy_blocks(index, _blocks(dataset, at, "<i8", dataset.num_documents), before)
        before += dataset.num_sequences
    for dataset in datasets:
        if dataset.modes is not None:
            index.write(dataset.modes.tobytes())


def _blocks(dataset: IndexedDataset, start: int, dtype: str, count: int) -> Iterator[np.ndarray]:
    width = np.dtype(dtype).itemsize
    for at in range(0, count, BLOCK):
        offset = HEADER.size + start + at * width
        yield np.fromfile(dataset.index_path, dtype, min(BLOCK, count - at), offset=offset)


def _copy_blocks(index: BinaryIO, blocks: Iterable[np.ndarray], raised_by: int) -> None:
    for block in blocks:
        index.write((block + block.dtype.type(raised_by)).tobytes())


def _count(datasets: Sequence[IndexedDataset], progress: Progress | None) -> np.ndarray:
    """Return how often each token id occurs."""
    counts = np.zeros(max(dataset.sidecar.vocab_size for dataset in datasets if dataset.sidecar), dtype=np.int64)
    done, total = 0, sum(dataset.num_tokens for dataset in datasets)
    for dataset in datasets:
        for at in range(0, dataset.num_tokens, BLOCK):
            block = dataset.tokens(at, min(BLOCK, dataset.num_tokens - at))
            for token in (int(block.min()), int(block.max())):
                if not 0 <= token < len(counts):
                    raise UserError(
                        f"{dataset.tokens_path}: holds token id {token}; its .json names a vocabulary of {len(counts)}"
                        "; preprocess it again"
                    )
            counts += np.bincount(block, minlength=len(counts))
            done += len(block)
            if progress:
                progress(done, total)
    return counts


def _sum(sidecars: Sequence[DatasetSidecar], counts: np.ndarray) -> DatasetSidecar:
    first = sidecars[0]
    seen = counts.nonzero()[0]
    return DatasetSidecar(
        vocab_size=first.vocab_size,
        tokenizer_sha256=first.tokenizer_sha256,
        num_tokens=sum(sidecar.num_tokens for sidecar in sidecars),
        num_documents=sum(sidecar.num_documents for sidecar in sidecars),
        max_token_id=int(seen[-1]) if len(seen) else -1,
        token_counts_entropy=entropy(counts) if len(seen) else 0.0,
        **{key: getattr(first, key) for key in _EDGES if len({getattr(sidecar, key) for sidecar in sidecars}) == 1},
        skipped=sum(sidecar.skipped for sidecar in sidecars),
        empty=sum(sidecar.empty for sidecar in sidecars),
        short=sum(sidecar.short for sidecar in sidecars),
        duplicates=sum(sidecar.duplicates for sidecar in sidecars),
        ignored=dict(sum((Counter(sidecar.ignored) for sidecar in sidecars), Counter())),
    )
