"""Which documents are the same as an earlier one: exact, by their 128-bit hashes, in bounded memory.

The hashes are dealt by their first bits into buckets on the disk, each small enough to be sorted in memory. What is
held for all documents is one byte each.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megalite.data.preprocess.encode_shard import HASH_BYTES

_BUCKET_BYTES = 1 << 27
_MOST_BUCKETS = 1 << 12
_BLOCK = 1 << 20
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])


def find_duplicates(hashes: Sequence[Path], folder: Path, check: Callable[[], None]) -> np.ndarray:
    """Return bool[documents], true for each document that has an equal one before it; `folder` is for its files.

    `check` is called now and then and may raise.
    """
    documents = sum(path.stat().st_size for path in hashes) // HASH_BYTES
    buckets = min(1 + documents * _ENTRY.itemsize // _BUCKET_BYTES, _MOST_BUCKETS)
    found = np.zeros(documents, dtype=np.bool_)
    _deal(hashes, folder, buckets)
    for path in sorted(folder.iterdir()):
        check()
        entries = np.fromfile(path, dtype=_ENTRY)
        # Stable, so that of equal ones the first in the input stays first.
        order = np.lexsort((entries["low"], entries["high"]))
        entries = entries[order]
        same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
        found[entries["document"][1:][same]] = True
        path.unlink()
    return found


def _deal(hashes: Sequence[Path], folder: Path, buckets: int) -> None:
    document = 0
    for path in hashes:
        with path.open("rb") as file:
            while data := file.read(_BLOCK * HASH_BYTES):
                pairs = np.frombuffer(data, dtype="<u8").reshape(-1, 2)
                entries = np.empty(len(pairs), dtype=_ENTRY)
                entries["high"], entries["low"] = pairs[:, 0], pairs[:, 1]
                entries["document"] = np.arange(document, document + len(pairs))
                document += len(pairs)
                bucket = entries["high"] % np.uint64(buckets)
                order = np.argsort(bucket, kind="stable")
                bounds = np.searchsorted(bucket[order], np.arange(buckets + 1))
                for number in range(buckets):
                    if bounds[number] < bounds[number + 1]:
                        with (folder / f"{number:04d}").open("ab") as target:
                            entries[order[bounds[number] : bounds[number + 1]]].tofile(target)
