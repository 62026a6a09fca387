"""What tells one token index from another without reading it: the same work for a gigabyte as for a terabyte."""

import hashlib
import json
from pathlib import Path

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import with_suffix

_BLOCK = 4096
_BLOCKS = 8
"""Blocks that are read of each file, the first and the last among them."""


def fingerprint(prefix: Path) -> str:
    """Return a SHA-256, in hexadecimal, over what a dataset's sidecar says, its files' sizes and a few blocks of each.

    Times and paths are no part of it: a copy has the same. Files of one size that differ between the blocks differ by
    their sidecar's digests, where there is one. Raises UserError where there is no dataset.
    """
    dataset = IndexedDataset(prefix)
    digest = hashlib.sha256()
    if dataset.sidecar is not None:
        digest.update(json.dumps(dataset.sidecar.sha256, sort_keys=True).encode())
    for suffix in (".idx", ".bin", *([".mask"] if dataset.has_loss_mask else [])):
        path = with_suffix(prefix, suffix)
        size = path.stat().st_size
        digest.update(f"{suffix} {size}".encode())
        with path.open("rb") as file:
            for number in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
