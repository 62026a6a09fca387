import json
import struct
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.data.index_format import DatasetSidecar, dtype_for
from megalite.data.indexed import IndexedDataset
from megalite.data.writer import IndexedDatasetWriter
from megalite.errors import UserError

GOLDEN = bytes.fromhex(
    "4d4d49444944580000"
    "0100000000000000"
    "08"
    "0200000000000000"
    "0300000000000000"
    "0300000002000000"
    "00000000000000000600000000000000"
    "000000000000000001000000000000000200000000000000"
)
SIDECAR = DatasetSidecar(
    vocab_size=100, tokenizer_sha256="ab" * 32, num_tokens=5, num_documents=2, max_token_id=5, token_counts_entropy=1.5
)


def write(prefix, documents, dtype: npt.DTypeLike = "u2", sidecar=None):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize(sidecar)
    return prefix


def index_bytes(lengths, offsets, documents, *, code=8, version=1, magic=b"MMIDIDX\0\0", counts=None):
    n, d = counts or (len(lengths), len(documents))
    head = struct.pack("<9sQBQQ", magic, version, code, n, d)
    return head + struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(documents)}q", *lengths, *offsets, *documents)


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "corpus", [[1, 2, 3], [4, 5]])


def test_golden_bytes(prefix):
    assert len(GOLDEN) == 82
    assert prefix.with_suffix(".idx").read_bytes() == GOLDEN
    assert prefix.with_suffix(".bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 4, 0, 5, 0])


def test_golden_bytes_are_read(tmp_path):
    (tmp_path / "theirs.idx").write_bytes(GOLDEN)
    (tmp_path / "theirs.bin").write_bytes(np.array([7, 8, 9, 10, 11], dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "theirs")
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (2, 2, 5)
    assert dataset.dtype == np.uint16
    assert dataset.document_tokens(0).tolist() == [7, 8, 9]
    assert dataset.document_tokens(1).tolist() == [10, 11]
    assert dataset.document_bounds().tolist() == [0, 3, 5]
    assert dataset.tokens(2, 2).tolist() == [9, 10]
    assert dataset.sidecar is None
    assert dataset.modes is None
    assert dataset.max_token_id() == 11


def test_wide_tokens_are_i32(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "wide", [[1, 70_000], [2]], dtype_for(70_001)))
    assert (tmp_path / "wide.idx").read_bytes() == index_bytes([2, 1], [0, 8], [0, 1, 2], code=4)
    assert dataset.tokens(0, 3).tolist() == [1, 70_000, 2]


def test_the_width_turns_at_65500():
    assert dtype_for(65_499) == np.dtype("<u2")
    assert dtype_for(65_500) == np.dtype("<i4")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 65_535), max_size=8), max_size=12), st.integers(1, 4))
def test_what_is_written_is_read(tmp_path, documents, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalite.data.indexed.BLOCK", block)
        patch.setattr("megalite.data.writer.BLOCK", block)
        dataset = IndexedDataset(write(tmp_path / "any", documents))
        assert dataset.num_documents == len(documents)
        assert [dataset.document_tokens(i).tolist() for i in range(len(documents))] == documents
        assert dataset.tokens(0, dataset.num_tokens).tolist() == sum(documents, [])
        assert dataset.max_token_id() == max(sum(documents, []), default=-1)


def test_documents_of_several_sequences_and_modes_are_read(tmp_path):
    (tmp_path / "multi.idx").write_bytes(index_bytes([1, 2, 0, 3], [0, 2, 6, 6], [0, 2, 2, 4]) + bytes([0, 1, 0, 1]))
    (tmp_path / "multi.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "multi")
    assert [dataset.document_tokens(i).tolist() for i in range(3)] == [[0, 1, 2], [], [3, 4, 5]]
    assert dataset.modes is not None
    assert dataset.modes.tolist() == [0, 1, 0, 1]


def test_reading_outside_is_refused(prefix):
    dataset = IndexedDataset(prefix)
    for document in (-1, 2):
        with pytest.raises(IndexError):
            dataset.document_tokens(document)
    for start, length in ((-1, 1), (0, -1), (4, 2), (6, 0)):
        with pytest.raises(IndexError):
            dataset.tokens(start, length)
    assert len(dataset.tokens(5, 0)) == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"TNTIDX\0\0" + bytes(40), "a TNTIDX index, the old format"),
        (b"", "begins with nothing"),
        (b"PK\x03\x04 and so on, long enough for a header", "begins with 50 4b 03 04"),
        (GOLDEN[:20], "20 bytes, cut short; an index has at least 34"),
        (GOLDEN[:-1], "81 bytes found; 2 sequences and 2 documents make 82"),
        (GOLDEN + b"\0", "83 bytes found"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], version=2), "version 2 found; 1 expected"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], code=7), "dtype code 7 found"),
        (index_bytes([3, 2], [0, 6], [0, 1, 2], counts=(1 << 62, 3)), "bytes found; 4611686018427387904 sequences"),
        (index_bytes([3, 2], [0, 6], []), "document indices [] found"),
        (index_bytes([3, 2], [0, 6], [1, 1, 2]), "document indices [1, 1, 2] found; they must begin with 0"),
        (index_bytes([3, 2], [0, 6], [0, 1, 3]), "document indices [0, 1, 3] found"),
        (index_bytes([3, 2], [0, 6], [0, 2, 1, 2]), "document indices [0, 2, 1, 2] found"),
        (index_bytes([3, 2], [0, 4], [0, 1, 2]), "sequence 1 has 4 bytes from 4 on; it must begin at 6"),
        (index_bytes([3, 2], [2, 8], [0, 1, 2]), "sequence 0 has 6 bytes from 2 on; it must begin at 0"),
        (index_bytes([7, -2], [0, 14], [0, 1, 2]), "sequence 1 has -4 bytes"),
    ],
)
def test_a_broken_index_is_named(prefix, index, message):
    prefix.with_suffix(".idx").write_bytes(index)
    with pytest.raises(UserError) as caught:
        IndexedDataset(prefix)
    assert str(caught.value).startswith(f"{prefix}.idx: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("size", "state"), [(0, "cut short"), (9, "cut short"), (8, "cut short"), (12, "too long")])
def test_a_token_file_of_another_size_is_named(prefix, size, state):
    prefix.with_suffix(".bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"corpus\.bin: {size} bytes found, {state}; corpus\.idx describes 10"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(UserError, match=rf"corpus\{suffix}: no such file; make the dataset with"):
        IndexedDataset(prefix)


def test_a_prefix_given_wrongly_is_mended(prefix):
    with pytest.raises(UserError, match=r"a prefix has no \.bin, use .*corpus$"):
        IndexedDataset(prefix.with_suffix(".bin"))
    with pytest.raises(UserError, match="did you mean 'corpus'"):
        IndexedDataset(prefix.with_name("corpsu"))
    with pytest.raises(UserError, match=r"a prefix has no \.idx; use .*corpus$"):
        IndexedDatasetWriter(prefix.with_suffix(".idx"), "u2")


def test_the_sidecar_comes_back(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "corpus", [[1, 2, 3], [4, 5]], sidecar=SIDECAR))
    assert dataset.sidecar == SIDECAR
    assert json.loads((tmp_path / "corpus.json").read_text())["token_counts_entropy"] == 1.5
    dataset.require_vocabulary(6)
    with pytest.raises(UserError, match=r"corpus\.bin: holds token id 5; a vocabulary of 5 allows 0 to 4"):
        dataset.require_vocabulary(5)


def test_token_ids_are_checked_without_a_sidecar(prefix):
    IndexedDataset(prefix).require_vocabulary(6)
    with pytest.raises(UserError, match="holds token id 5"):
        IndexedDataset(prefix).require_vocabulary(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"vocab_size": 3}', "tokenizer_sha256: Field required"),
        (json.dumps(asdict(SIDECAR) | {"num_tokens": 6}), "describes 2 documents and 6 tokens; corpus.idx has 2 and 5"),
    ],
)
def test_a_wrong_sidecar_is_named(prefix, content, message):
    prefix.with_suffix(".json").write_text(content)
    with pytest.raises(UserError) as caught:
        IndexedDataset(prefix)
    assert str(caught.value).startswith(f"{prefix}.json: ")
    assert message in str(caught.value)


def test_nothing_stands_under_its_name_before_it_is_whole(tmp_path):
    with IndexedDatasetWriter(tmp_path / "corpus", "u2") as writer:
        writer.add_document([1, 2, 3])
        assert all(path.suffix == ".tmp" for path in tmp_path.iterdir())
        writer.finalize(replace(SIDECAR, num_tokens=3, num_documents=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_a_writer_that_is_given_up_leaves_nothing_but_what_was_there(prefix):
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}

    def interrupted():
        with IndexedDatasetWriter(prefix, "u2") as writer:
            writer.add_document([9, 9])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_a_new_dataset_never_meets_the_index_of_an_old_one(tmp_path, monkeypatch):
    write(tmp_path / "corpus", [[1, 2, 3], [4, 5]], sidecar=SIDECAR)

    def power_cut(partial, path):
        raise OSError(f"power cut before {path.name}")

    monkeypatch.setattr("megalite.data.writer.publish", power_cut)
    with pytest.raises(OSError, match=r"power cut before corpus\.bin"):
        write(tmp_path / "corpus", [[6, 7]])
    with pytest.raises(UserError, match=r"corpus\.idx: no such file"):
        IndexedDataset(tmp_path / "corpus")


def test_an_old_sidecar_goes_with_its_dataset(tmp_path):
    write(tmp_path / "corpus", [[1, 2, 3], [4, 5]], sidecar=SIDECAR)
    assert IndexedDataset(write(tmp_path / "corpus", [[6, 7]])).sidecar is None


@pytest.mark.parametrize("tokens", [[65_536], [-1]])
def test_a_token_that_does_not_fit_is_refused(tmp_path, tokens):
    with (
        IndexedDatasetWriter(tmp_path / "corpus", "u2") as writer,
        pytest.raises(ValueError, match="do not fit into uint16"),
    ):
        writer.add_document(tokens)


def test_lengths_must_add_up(tmp_path):
    with (
        IndexedDatasetWriter(tmp_path / "corpus", "u2") as writer,
        pytest.raises(ValueError, match="lengths add up to 3"),
    ):
        writer.add_documents(np.array([1, 2], dtype="u2"), [2, 1])
