import os

import numpy as np
import pytest

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.writer import IndexedDatasetWriter, copy_bytes
from megalite.errors import UserError

GOLDEN = (
    "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000000000000600000000000000"
    "000000000000000001000000000000000200000000000000"
)


def test_the_index_is_megatrons_byte_for_byte(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([4, 5])
        writer.finalize()
    assert (tmp_path / "data.idx").read_bytes().hex() == GOLDEN
    assert (tmp_path / "data.bin").read_bytes() == np.arange(1, 6, dtype="<u2").tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_a_loss_mask_is_a_byte_a_token(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16, with_loss_mask=True) as writer:
        writer.add_documents(np.arange(5), [3, 2], np.array([0, 1, 1, 0, 1]))
        writer.add_document([9], [1])
        writer.finalize()
    assert (tmp_path / "data.mask").read_bytes() == bytes([0, 1, 1, 0, 1, 1])
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.has_loss_mask
    assert dataset.loss_mask(1, 4).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("with_mask", "mask"), [(True, None), (False, [1, 1]), (True, [1]), (True, [1, 2]), (True, [1, -1])]
)
def test_a_loss_mask_that_does_not_fit_is_refused(tmp_path, with_mask, mask):
    array = None if mask is None else np.array(mask, dtype=np.int8).view(np.uint8)
    with (
        IndexedDatasetWriter(tmp_path / "data", np.uint16, with_loss_mask=with_mask) as writer,
        pytest.raises(ValueError, match="loss mask"),
    ):
        writer.add_documents(np.arange(2), [2], array)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_mask_takes_away_the_mask_of_the_one_before(tmp_path):
    for with_mask in (True, False):
        with IndexedDatasetWriter(tmp_path / "data", np.uint16, with_loss_mask=with_mask) as writer:
            writer.add_document([1], [1] if with_mask else None)
            writer.finalize()
    assert not (tmp_path / "data.mask").exists()


@pytest.fixture(params=["system", "reads", "refused", "none"])
def way_to_copy(request, monkeypatch):
    """Every way in which a system copies: itself, not at all, by refusing, and, as some file systems do, nothing."""
    if request.param == "reads":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif request.param == "refused":

        def refuse(*_args: object, **_options: object) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    elif request.param == "none":
        monkeypatch.setattr(os, "copy_file_range", lambda *_args, **_options: 0, raising=False)


def test_documents_are_copied_from_files(tmp_path, way_to_copy, monkeypatch):
    monkeypatch.setattr("megalite.data.indexed.writer._COPY_BYTES", 7)
    tokens, mask = tmp_path / "tokens", tmp_path / "mask"
    tokens.write_bytes(np.arange(100, dtype="<u2").tobytes())
    mask.write_bytes(bytes(n % 2 for n in range(100)))
    with IndexedDatasetWriter(tmp_path / "data", np.uint16, with_loss_mask=True) as writer:
        writer.add_document([7, 8], [0, 1])
        writer.copy_documents(tokens, 10, [20, 0, 5], mask)
        writer.add_document([9], [1])
        assert (writer.num_documents, writer.num_tokens) == (5, 28)
        writer.finalize()
    dataset = IndexedDataset(tmp_path / "data")
    assert [len(dataset.document_tokens(i)) for i in range(5)] == [2, 20, 0, 5, 1]
    assert dataset.tokens(0, 28).tolist() == [7, 8, *range(10, 35), 9]
    assert dataset.loss_mask(0, 28).tolist() == [0, 1, *[n % 2 for n in range(10, 35)], 1]


def test_a_copy_beyond_the_end_is_an_error(tmp_path, way_to_copy):
    (tmp_path / "source").write_bytes(b"12345")
    with (
        (tmp_path / "target").open("wb", buffering=0) as target,
        pytest.raises(EOFError, match="ends at byte 5; 7 expected"),
    ):
        copy_bytes(tmp_path / "source", 3, 4, target)


def test_a_file_is_no_prefix(tmp_path):
    for suffix in (".bin", ".idx", ".mask"):
        with pytest.raises(UserError, match=rf"a prefix has no \{suffix}; use "):
            IndexedDatasetWriter(tmp_path / f"data{suffix}", np.uint16)
