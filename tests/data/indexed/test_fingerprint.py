"""The fingerprint of a dataset: the same for a copy, another for other tokens, masks and sidecars."""

from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed.fingerprint import fingerprint
from megalite.data.indexed.format import DatasetSidecar
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.errors import UserError


def write(prefix: Path, last: int, mask: int | None = None, *, entropy: float | None = None) -> Path:
    """Write one document of 40,000 tokens, of which the last is given."""
    writer = IndexedDatasetWriter(prefix, np.dtype(np.uint16), with_loss_mask=mask is not None)
    tokens = [*range(39_999), last]
    writer.add_document(tokens, None if mask is None else [1] * 39_999 + [mask])
    sidecar = DatasetSidecar(50_000, "0" * 64, 40_000, 1, max(tokens), entropy) if entropy is not None else None
    writer.finalize(sidecar)
    return prefix


def test_a_copy_has_the_same_and_other_content_another(tmp_path: Path) -> None:
    assert fingerprint(write(tmp_path / "a", 3)) == fingerprint(write(tmp_path / "copy", 3))
    kinds = [
        *(write(tmp_path / "a", 3), write(tmp_path / "b", 4), write(tmp_path / "c", 3, 1), write(tmp_path / "d", 3, 0)),
        *(write(tmp_path / "e", 3, entropy=1.0), write(tmp_path / "f", 4, entropy=1.0)),
    ]
    assert len(set(map(fingerprint, kinds))) == len(kinds)


def test_what_is_no_dataset_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        fingerprint(tmp_path / "none")


def test_a_file_that_the_blocks_do_not_reach_is_known_by_its_sidecar(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 3, entropy=1.0), write(tmp_path / "b", 3, entropy=1.0)
    text = second.with_suffix(".json").read_text()
    at = text.index('".bin": "') + len('".bin": "')
    second.with_suffix(".json").write_text(text[:at] + "0000" + text[at + 4 :])
    assert fingerprint(first) != fingerprint(second)
