import hashlib
import json
import random
import re
import struct
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import DatasetSidecar, dtype_for
from megalite.data.indexed.index import MappedIndex
from megalite.data.indexed.writer import IndexedDatasetWriter
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
    assert [dataset.document_span(document) for document in range(2)] == [(0, 3), (3, 5)]
    assert dataset.document_lengths(range(2)).tolist() == [3, 2]
    assert [dataset.document_at(token) for token in range(5)] == [0, 0, 0, 1, 1]
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
        patch.setattr("megalite.data.indexed.index._BLOCK", block)
        patch.setattr("megalite.data.indexed.index._OPENING_BLOCK", block)
        patch.setattr("megalite.data.indexed.writer.BLOCK", block)
        dataset = IndexedDataset(write(tmp_path / "any", documents))
        assert dataset.num_documents == len(documents)
        assert [dataset.document_tokens(i).tolist() for i in range(len(documents))] == documents
        assert dataset.tokens(0, dataset.num_tokens).tolist() == sum(documents, [])
        assert dataset.max_token_id() == max(sum(documents, []), default=-1)
        holders = [number for number, document in enumerate(documents) for _ in document]
        assert [dataset.document_at(token) for token in range(dataset.num_tokens)] == holders
        dataset.verify()
        for first in range(len(documents) + 1):
            lengths = dataset.document_lengths(range(first, len(documents)))
            assert lengths.dtype == np.int32
            assert lengths.tolist() == [len(document) for document in documents[first:]]


def test_documents_of_several_sequences_and_modes_are_read(tmp_path):
    (tmp_path / "multi.idx").write_bytes(index_bytes([1, 2, 0, 3], [0, 2, 6, 6], [0, 2, 2, 4]) + bytes([0, 1, 0, 1]))
    (tmp_path / "multi.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "multi")
    assert [dataset.document_tokens(i).tolist() for i in range(3)] == [[0, 1, 2], [], [3, 4, 5]]
    assert [dataset.document_at(token) for token in range(6)] == [0, 0, 0, 2, 2, 2]
    assert dataset.document_lengths(range(3)).tolist() == [3, 0, 3]
    assert dataset.sequence_lengths(range(1, 4)).tolist() == [2, 0, 3]
    assert [part.tolist() for part in dataset.sequence_spans(np.array([3, 2, 0]))] == [[3, 3, 0], [3, 0, 1]]
    dataset.verify()
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
        with pytest.raises(IndexError):
            dataset.stretches(np.array([0, start]), np.array([1, length]))
        with pytest.raises(IndexError):
            dataset.loss_mask(start, length)
    for start in (-1, 4):
        with pytest.raises(IndexError):
            dataset.windows(np.array([0, start]), 2)
    for documents in (range(-1, 1), range(0, 3), range(0, 2, 2), range(2, 1)):
        with pytest.raises(IndexError):
            dataset.document_lengths(documents)
    for token in (-1, 5):
        with pytest.raises(IndexError):
            dataset.document_at(token)
    assert len(dataset.tokens(5, 0)) == 0
    assert dataset.windows(np.empty(0, np.int64), 9).shape == (0, 9)
    assert dataset.stretches(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []


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
        (index_bytes([3, 2], [0, 6], [1, 1, 2]), "document indices [1, 1, 2] found from 0 on; they must begin with 0"),
        (index_bytes([3, 2], [0, 6], [0, 1, 3]), "document indices [0, 1, 3] found"),
        (index_bytes([3, 2], [0, 6], [0, 2, 1, 2]), "document indices [0, 2, 1, 2] found"),
        (
            index_bytes([3, 2], [0, 4], [0, 1, 2]),
            "sequence 0 has 6 bytes from 0 on, and the next one begins at 4, not where it ends",
        ),
        (index_bytes([3, 2], [2, 8], [0, 1, 2]), "sequence 0 has 6 bytes from 2 on; the first begins at 0"),
        (index_bytes([7, -2], [0, 14], [0, 1, 2]), "sequence 1 has -4 bytes"),
        (index_bytes([4, -1, 2], [0, 8, 6], [0, 1, 2, 3]), "sequence 1 has -2 bytes from 8 on"),
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
    other = {".idx": ".bin", ".bin": ".idx"}[suffix]
    write(prefix.with_name("corpus2"), [[1]])  # a name that is near, and of no help
    prefix.with_suffix(suffix).unlink()
    there = rf"though corpus\{other} is there; copy corpus\{suffix} beside it"
    with pytest.raises(UserError, match=rf"corpus\{suffix}: no such file, {there}"):
        IndexedDataset(prefix)
    prefix.with_suffix(other).unlink()
    prefix.with_name("corpus2.idx").unlink()
    with pytest.raises(UserError, match=r"corpus\.idx: no such file; make the dataset with"):
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
    digest = hashlib.sha256((tmp_path / "corpus.bin").read_bytes()).hexdigest()
    assert dataset.sidecar == replace(SIDECAR, sha256={".bin": digest})
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 found; a vocabulary has 1 id or more"),
        ({"max_token_id": -1}, "max_token_id=-1 found; ids of vocab_size=100 are 0 to 99"),
        ({"max_token_id": 100}, "max_token_id=100 found; ids of vocab_size=100 are 0 to 99"),
        ({"eod_id": 100}, "eod_id=100 found"),
        ({"eod_id": -1}, "eod_id=-1 found"),
        ({"bos_id": -1}, "bos_id=-1 found"),
        ({"bos_id": 1 << 40}, "bos_id=1099511627776 found"),
        ({"token_counts_entropy": float("nan")}, "token_counts_entropy=nan found; of vocab_size=100 it is 0 to 4.6052"),
        ({"token_counts_entropy": float("inf")}, "token_counts_entropy=inf found"),
        ({"token_counts_entropy": -0.1}, "token_counts_entropy=-0.1 found"),
        ({"token_counts_entropy": 4.7}, "token_counts_entropy=4.7 found"),
        ({"skipped": -1}, "skipped=-1 found; a count is 0 or more"),
    ],
)
def test_numbers_of_a_sidecar_are_checked_at_both_ends(prefix, change, message):
    prefix.with_suffix(".json").write_text(json.dumps(asdict(SIDECAR) | change))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        IndexedDataset(prefix)
    assert str(caught.value).startswith(f"{prefix}.json: ")


READS = {
    "document_tokens": lambda dataset: dataset.document_tokens(0),
    "tokens": lambda dataset: dataset.tokens(0, 3),
    "windows": lambda dataset: dataset.windows(np.array([0, 1]), 2),
    "stretches": lambda dataset: dataset.stretches(np.array([0]), np.array([3])),
    "verify": lambda dataset: dataset.verify(),
    "require_vocabulary": lambda dataset: dataset.require_vocabulary(100),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8"])
@pytest.mark.parametrize("token", [-1, -100])
def test_a_token_id_below_0_is_named_wherever_it_is_read(tmp_path, read, dtype, token):
    dataset = IndexedDataset(write(tmp_path / "corpus", [[1, token, 3], [4, 5]], dtype))
    with pytest.raises(UserError, match=rf"corpus\.bin: holds token id {token}; ids are 0 and more; copy it again"):
        READS[read](dataset)
    assert dataset.document_tokens(1).tolist() == [4, 5]


@pytest.mark.parametrize("read", ["document_tokens", "tokens", "windows", "stretches", "verify"])
def test_a_token_id_above_what_the_sidecar_tells_is_named_wherever_it_is_read(prefix, read):
    prefix.with_suffix(".json").write_text(json.dumps(asdict(SIDECAR) | {"max_token_id": 2}))
    with pytest.raises(UserError, match=r"corpus\.bin: holds token id [35]; its sidecar tells 2 as the largest"):
        READS[read](IndexedDataset(prefix))


@pytest.mark.parametrize("bounds", [[0, 0, 2], [0, 2, 2]])
def test_documents_of_megalites_own_are_one_sequence_each(tmp_path, bounds):
    write(tmp_path / "corpus", [[1, 2, 3], [4, 5]], sidecar=SIDECAR)
    (tmp_path / "corpus.idx").write_bytes(index_bytes([3, 2], [0, 6], bounds))
    with pytest.raises(UserError, match=r"corpus\.idx: document indices .* found from 0 on; .*, one a document"):
        IndexedDataset(tmp_path / "corpus")
    (tmp_path / "corpus.json").unlink()
    assert IndexedDataset(tmp_path / "corpus").num_documents == 2


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

    monkeypatch.setattr("megalite.data.indexed.writer.publish", power_cut)
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


@pytest.fixture
def checked_in_blocks(monkeypatch):
    """An index of more than 16 entries is large: 4 blocks of 3 of its entries are checked on opening."""
    monkeypatch.setattr("megalite.data.indexed.index.CHECKED_IN_FULL", 16)
    monkeypatch.setattr("megalite.data.indexed.index._SOME_BLOCKS", 4)
    monkeypatch.setattr("megalite.data.indexed.index._SOME_BLOCK", 3)


def fields(num_documents):
    """Where each length, offset and document index stands in the index of so many documents."""
    lengths = [34 + 4 * place for place in range(num_documents)]
    offsets = [34 + 4 * num_documents + 8 * place for place in range(num_documents)]
    return lengths, offsets, [34 + 12 * num_documents + 8 * place for place in range(num_documents + 1)]


def span_or_none(dataset, document):
    try:
        return dataset.document_span(document)
    except UserError:
        return None


@pytest.mark.usefixtures("checked_in_blocks")
def test_damage_in_a_large_index_is_found_on_opening_reading_or_verifying(tmp_path, write_lengths):
    lengths = [2 + place % 3 for place in range(40)]
    dataset = write_lengths(tmp_path / "large", lengths)
    path, index = dataset.index_path, dataset.index_path.read_bytes()
    whole_spans = [dataset.document_span(document) for document in range(40)]
    unseen = 0
    for field, at in ((field, at) for field, places in enumerate(fields(40)) for at in places):
        path.write_bytes(index[:at] + bytes([index[at] ^ 64]) + index[at + 1 :])
        try:
            dataset = IndexedDataset(tmp_path / "large")
        except UserError:
            continue
        unseen += 1
        with pytest.raises(UserError, match=r"large\.idx: .*; the file is broken, preprocess again"):
            dataset.verify()
        spans = [span_or_none(dataset, document) for document in range(40)]
        assert None in spans
        assert all(span in (None, whole) for span, whole in zip(spans, whole_spans, strict=True))
        if field < 2:
            with pytest.raises(UserError, match="sequence .* tokens from|begins at byte"):
                dataset.sequence_spans(np.arange(40))
        with pytest.raises(UserError):
            dataset.document_lengths(range(40))
        for token in range(dataset.num_tokens):
            try:
                document = dataset.document_at(token)
            except UserError:
                continue
            assert sum(lengths[:document]) <= token < sum(lengths[: document + 1])
    assert unseen > 60


@pytest.mark.usefixtures("checked_in_blocks")
def test_documents_beyond_all_sequences_are_found_on_reading(tmp_path, write_lengths):
    dataset = write_lengths(tmp_path / "large", [3] * 40)
    index = bytearray(dataset.index_path.read_bytes())
    for at in fields(40)[2][20:22]:
        index[at] += 64
    dataset.index_path.write_bytes(index)
    with pytest.raises(UserError, match=r"document indices \[19, 84\] found from 19 on; .* end with 40"):
        IndexedDataset(tmp_path / "large").document_span(19)


@pytest.mark.usefixtures("checked_in_blocks")
def test_a_large_index_is_opened_without_being_read(tmp_path, write_lengths, monkeypatch):
    prefix = write_lengths(tmp_path / "large", [3] * 1000).prefix
    checked = []
    for name in ("_check_sequences", "_check_bounds"):
        check = getattr(MappedIndex, name)
        monkeypatch.setattr(MappedIndex, name, lambda self, at, check=check: (checked.append(at), check(self, at))[1])
    dataset = IndexedDataset(prefix)
    assert [(at.start, at.stop) for at in checked[:4]] == [(0, 3), (332, 335), (664, 667), (997, 1000)]
    assert [(at.start, at.stop) for at in checked[4:]] == [(0, 3), (332, 335), (665, 668), (998, 1001)]
    done = []
    dataset.verify(lambda count, total: done.append((count, total)))
    assert sum(map(len, checked)) == 24 + 2001
    assert done[-1] == (2001, 2001)


def test_a_billion_documents_are_opened_at_once(tmp_path):
    """Of a sparse file: no document but the last has a sequence, and no sequence but the last a token."""
    documents, tokens = 10**9, 10**6
    with (tmp_path / "vast.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        file.truncate(34 + 20 * documents + 8)
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", tokens))
        file.seek(34 + 20 * documents)
        file.write(struct.pack("<q", documents))
    with (tmp_path / "vast.bin").open("wb") as file:
        file.truncate(2 * tokens)
    dataset = IndexedDataset(tmp_path / "vast")
    assert dataset.num_documents == documents
    assert dataset.document_at(5) == documents - 1
    assert dataset.document_span(documents - 1) == (0, tokens)
    assert dataset.document_lengths(range(documents // 2, documents // 2 + 3)).tolist() == [0, 0, 0]


def test_a_loss_mask_is_read(tmp_path, write_lengths):
    dataset = write_lengths(tmp_path / "masked", [4, 0, 5], masked=True)
    assert dataset.has_loss_mask
    assert dataset.loss_mask(2, 5).tolist() == [0, 1, 0, 0, 1]
    assert dataset.windows(np.array([3, 0]), 3, masked=True).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert dataset.stretches(np.array([3, 0, 8]), np.array([1, 2, 0]), masked=True).tolist() == [1, 1, 0]
    done = []
    dataset.verify(lambda count, total: done.append((count, total)))
    assert done[-1] == (3 + 4 + 9, 3 + 4 + 9)
    dataset.mask_path.write_bytes(bytes([1, 0, 2, 1, 1, 1, 1, 1, 1]))
    damaged = IndexedDataset(tmp_path / "masked")
    assert damaged.loss_mask(3, 4).tolist() == [1, 1, 1, 1]
    for read in (
        damaged.verify,
        lambda: damaged.loss_mask(2, 1),
        lambda: damaged.windows(np.array([0]), 3, masked=True),
        lambda: damaged.stretches(np.array([0]), np.array([3]), masked=True),
    ):
        with pytest.raises(UserError, match=r"masked\.mask: holds 2; a loss mask holds 0 and 1"):
            read()


def test_a_dataset_without_a_loss_mask_has_none(prefix):
    dataset = IndexedDataset(prefix)
    assert not dataset.has_loss_mask
    with pytest.raises(ValueError, match="has no loss mask"):
        dataset.loss_mask(0, 1)


@pytest.mark.parametrize(("size", "state"), [(0, "cut short"), (4, "cut short"), (6, "too long")])
def test_a_loss_mask_of_another_size_is_named(prefix, size, state):
    prefix.with_suffix(".mask").write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"corpus\.mask: {size} bytes found, {state}; corpus\.idx describes 5"):
        IndexedDataset(prefix)


def test_stretches_are_copied_from_anywhere(tmp_path, write_lengths):
    dataset = write_lengths(tmp_path / "stream", [40, 60])
    assert dataset.windows(np.array([90, 0, 39]), 3).tolist() == [[90, 91, 92], [0, 1, 2], [39, 40, 41]]
    assert dataset.windows(np.array([0]), 100).tolist() == [list(range(100))]
    assert dataset.stretches(np.array([98, 5, 0, 7]), np.array([2, 0, 1, 3])).tolist() == [98, 99, 0, 7, 8, 9]
    assert dataset.windows(np.array([1]), 2).dtype == dataset.stretches(np.array([1]), np.array([1])).dtype == np.int64


def mutate(data, draw):
    """Damage bytes as disks, copies and people do."""
    data = bytearray(data)
    kind = draw.choice(["flip", "flips", "cut", "grow", "swap", "zero"])
    at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "grow":
        return bytes(data[:at]) + draw.randbytes(draw.randint(1, 64)) + bytes(data[at:])
    if kind == "swap":
        length = min(draw.randint(1, 16), (to - at) // 2)
        data[at : at + length], data[to - length : to] = data[to - length : to], data[at : at + length]
    elif kind == "zero":
        data[at : at + 8] = bytes(len(data[at : at + 8]))
    else:
        for _ in range(1 if kind == "flip" else draw.randint(2, 9)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".json", ".mask"])
def test_a_mutated_file_gives_the_same_tokens_or_a_clear_error(tmp_path, suffix):
    draw = random.Random(0)
    lengths = [draw.randrange(12) for _ in range(30)]
    tokens = np.array([draw.randrange(60_000) for _ in range(sum(lengths))], dtype="<u2")
    mask = np.array([draw.randrange(2) for _ in tokens], dtype=np.uint8)
    with IndexedDatasetWriter(tmp_path / "corpus", "u2", with_loss_mask=True) as writer:
        writer.add_documents(tokens, lengths, mask)
        sizes = {"num_tokens": len(tokens), "num_documents": 30, "max_token_id": int(tokens.max())}
        writer.finalize(replace(SIDECAR, **sizes))
    path = tmp_path / f"corpus{suffix}"
    whole, refused = path.read_bytes(), []
    for _ in range(125):
        path.write_bytes(mutate(whole, draw))
        try:
            dataset = IndexedDataset(tmp_path / "corpus")
            documents = [dataset.document_tokens(document).tolist() for document in range(dataset.num_documents)]
            read_mask = dataset.loss_mask(0, dataset.num_tokens)
            dataset.verify()
        except UserError as error:
            refused.append(str(error))
        else:
            assert list(map(len, documents)) == lengths
            assert sum(documents, []) == tokens.tolist() == dataset.tokens(0, sum(lengths)).tolist()
            assert read_mask.tolist() == mask.tolist()
    assert len(refused) > 40
    assert all(error.startswith(f"{tmp_path}/corpus.") and "\n" not in error for error in refused)
