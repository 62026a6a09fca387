from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.data.order.streaming import Piece, StreamingSamples, pieces_between, split_documents
from megalite.errors import UserError


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, write_lengths) -> IndexedDataset:
    """A stream of 0..999 in documents of 0 to 39 tokens, with a loss mask."""
    lengths = np.random.default_rng(0).integers(0, 40, 200)
    ends = np.minimum(np.cumsum(lengths), 1000)
    lengths = np.diff(ends[: int(np.argmax(ends == 1000)) + 1], prepend=0)
    lengths[7] += lengths[8]
    lengths[8] = 0
    return write_lengths(tmp_path_factory.mktemp("samples") / "corpus", lengths.tolist(), masked=True)


def spell(indexed: IndexedDataset, pieces: list[Piece]) -> list[int]:
    """The tokens of pieces, by their documents."""
    found = []
    for piece in pieces:
        assert piece.prefix == indexed.prefix
        assert piece.length > 0
        tokens = indexed.document_tokens(piece.document)[piece.offset : piece.offset + piece.length].tolist()
        assert len(tokens) == piece.length
        found += tokens
    return found


@pytest.mark.parametrize("sequence_length", [1, 7, 16, 111, 999])
def test_an_epoch_takes_every_stretch_once(indexed, sequence_length):
    samples = StreamingSamples(indexed, sequence_length=sequence_length, seed=1)
    assert samples.tokens_per_epoch == 1000
    assert samples.samples_per_epoch == 999 // sequence_length
    assert samples.num_samples is None
    for epoch in range(2):
        rows = samples.tokens(epoch * samples.samples_per_epoch + np.arange(samples.samples_per_epoch))
        assert rows.dtype == np.int64
        assert rows.shape == (samples.samples_per_epoch, sequence_length + 1)
        assert sorted(rows[:, 0]) == list(range(0, samples.samples_per_epoch * sequence_length, sequence_length))
        assert (rows == rows[:, :1] + np.arange(sequence_length + 1)).all()


def test_any_indices_are_read_at_once(indexed):
    samples = StreamingSamples(indexed, sequence_length=10, seed=1)
    one_by_one = np.concatenate([samples.tokens(np.array([index])) for index in range(400)])
    indices = np.random.default_rng(0).integers(0, 400, 1000)
    assert (samples.tokens(indices) == one_by_one[indices]).all()
    assert samples.tokens(np.array([10**15])).shape == (1, 11)
    assert samples.tokens(np.empty(0, np.int64)).shape == (0, 11)


def test_the_order_hangs_on_seed_and_epoch_alone(indexed):
    def order(seed, epoch):
        samples = StreamingSamples(indexed, sequence_length=10, seed=seed)
        return tuple(samples.tokens(epoch * 99 + np.arange(99))[:, 0].tolist())

    assert order(1, 0) == order(1, 0)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 0)[:5] == (600, 460, 120, 130, 930)


def test_samples_below_0_are_refused(indexed):
    samples = StreamingSamples(indexed, sequence_length=10, seed=1)
    for read in (samples.tokens, samples.loss_mask):
        with pytest.raises(IndexError, match="samples count from 0"):
            read(np.array([3, -1]))
    with pytest.raises(IndexError, match="samples count from 0"):
        samples.pieces(-1)


def test_the_loss_mask_goes_with_the_tokens(indexed, tmp_path, write_lengths):
    samples = StreamingSamples(indexed, sequence_length=10, seed=1)
    indices = np.arange(250)
    mask = samples.loss_mask(indices)
    assert mask is not None
    assert mask.dtype == np.uint8
    assert (mask == (samples.tokens(indices) % 3 == 0)).all()
    plain = write_lengths(tmp_path / "plain", [40])
    assert StreamingSamples(plain, sequence_length=10, seed=1).loss_mask(indices) is None


@pytest.mark.parametrize("sequence_length", [1, 16, 333])
def test_pieces_are_what_a_sample_is_made_of(indexed, sequence_length, monkeypatch):
    monkeypatch.setattr("megalite.data.order.streaming._DOCUMENTS_AT_ONCE", 3)
    samples = StreamingSamples(indexed, sequence_length=sequence_length, seed=3, documents=range(4, 40))
    for index in range(0, 2 * samples.samples_per_epoch, 2):
        pieces = samples.pieces(index)
        assert spell(indexed, pieces) == samples.tokens(np.array([index]))[0].tolist()
        assert [piece.document for piece in pieces] == sorted({piece.document for piece in pieces})
        assert all(piece.offset == 0 for piece in pieces[1:])


def test_pieces_step_over_any_number_of_empty_documents(tmp_path, write_lengths):
    indexed = write_lengths(tmp_path / "gaps", [2, *[0] * 500, 3, 0, 1])
    assert list(pieces_between(indexed, 1, 6)) == [
        Piece(indexed.prefix, 0, 1, 1),
        Piece(indexed.prefix, 501, 0, 3),
        Piece(indexed.prefix, 503, 0, 1),
    ]
    assert list(pieces_between(indexed, 3, 3)) == []


def test_only_the_chosen_documents_are_read(indexed):
    start, stop = indexed.document_span(5)[0], indexed.document_span(19)[1]
    samples = StreamingSamples(indexed, sequence_length=10, seed=1, documents=range(5, 20))
    assert samples.tokens_per_epoch == stop - start
    rows = samples.tokens(np.arange(samples.samples_per_epoch))
    assert rows.min() == start
    assert rows.max() == start + samples.samples_per_epoch * 10


def test_documents_of_several_sequences_are_one_stream(tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "multi", "u2") as writer:
        writer.add_documents(np.arange(30), [10, 10, 10])
        writer.finalize()
    index = (tmp_path / "multi.idx").read_bytes()
    bounds = np.array([0, 2, 3], dtype="<i8").tobytes()
    (tmp_path / "multi.idx").write_bytes(index[:26] + (3).to_bytes(8, "little") + index[34 : 34 + 36] + bounds)
    indexed = IndexedDataset(tmp_path / "multi")
    samples = StreamingSamples(indexed, sequence_length=19, seed=1, documents=range(0, 1))
    assert samples.pieces(0) == [Piece(tmp_path / "multi", 0, 0, 20)]
    assert samples.tokens(np.array([0])).tolist() == [list(range(20))]


@pytest.mark.parametrize("documents", [range(0, 1), range(3, 3), range(0, 0)])
def test_documents_that_hold_no_sample_are_refused(indexed, documents):
    with pytest.raises(UserError, match=r"documents \d\.\.\d hold \d+ tokens; one sample of data\.sequence_length=64"):
        StreamingSamples(indexed, sequence_length=64, seed=1, documents=documents)


def test_one_sample_needs_one_token_more_than_its_length(indexed):
    assert StreamingSamples(indexed, sequence_length=999, seed=1).samples_per_epoch == 1
    with pytest.raises(UserError, match="takes 1001"):
        StreamingSamples(indexed, sequence_length=1000, seed=1)


@pytest.mark.parametrize(
    ("documents", "fractions", "stops"),
    [
        (10_000, (969, 30, 1), (9690, 9990, 10_000)),
        (10_000, (0.98, 0.01, 0.01), (9800, 9900, 10_000)),
        (5, (1, 1), (2, 5)),
        (7, (0.5, 0.5), (4, 7)),
        (100, (0.98, 0.02), (98, 100)),
        (3, (1, 0, 0), (3, 3, 3)),
        (0, (0.9, 0.1), (0, 0)),
        (999_999_937, (0.9, 0.05, 0.05), (899_999_943, 949_999_940, 999_999_937)),
    ],
)
def test_splits_round_as_megatron_does(documents, fractions, stops):
    ranges = split_documents(documents, fractions)
    assert tuple(part.stop for part in ranges) == stops
    assert [part.start for part in ranges] == [0, *stops[:-1]]


@pytest.mark.parametrize("fractions", [(0, 0), (1.5, -0.5), (float("nan"), 1)])
def test_shares_that_make_no_split_are_refused(fractions):
    with pytest.raises(ValueError, match="shares must be 0 or more"):
        split_documents(10, fractions)
