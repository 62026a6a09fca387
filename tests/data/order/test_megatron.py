import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.order.megatron import MegatronSamples, build_index
from megalite.errors import UserError

GOLDEN_DOCUMENTS = [2, 1, 2, 0, 0, 1, 3, 3, 0, 2, 1, 3]
GOLDEN_SHUFFLE = [7, 3, 5, 1, 4, 8, 0, 2, 6, 13, 10, 12, 9, 11]
GOLDEN_SAMPLES = [
    *([0, 0], [0, 4], [1, 1], [2, 2], [2, 6], [3, 3], [4, 2], [5, 1]),
    *([6, 2], [7, 2], [8, 2], [9, 1], [9, 5], [10, 2], [11, 3]),
]


def slow_index(lengths, sequence_length, seed, num_samples, extra, drop_last):
    """Megatron-core's rules, a token count at a time."""
    epoch = sum(lengths)
    epochs, tokens = 1, epoch
    while num_samples is not None and tokens < num_samples * sequence_length + extra:
        epochs, tokens = epochs + 1, tokens + epoch
    random = np.random.RandomState(seed)

    def shuffled(values):
        array = np.array(values, dtype=np.int64)
        random.shuffle(array)
        return array.tolist()

    documents = list(range(len(lengths)))
    apart, sans = False, 0
    if epochs > 1:
        sans = ((epochs - 1) * epoch - extra) // sequence_length
        apart = num_samples - sans < int(0.80 * ((epoch - extra) // sequence_length))
    if apart:
        order = shuffled(documents * (epochs - 1)) + shuffled(documents)
    else:
        order = shuffled(documents * epochs)
    whole, rest = divmod(tokens - extra, sequence_length)
    rows, place, offset = [[0, 0]], 0, 0
    for _ in range(whole):
        left = sequence_length + extra
        while True:
            has = lengths[order[place]] - offset
            if has >= left:
                offset += left - extra
                break
            left -= has
            place, offset = place + 1, 0
        rows.append([place, offset])
    if rest and not drop_last:
        last = max(place for place, document in enumerate(order) if lengths[document] >= extra)
        rows.append([last, lengths[order[last]] - extra])
    total = len(rows) - 1
    shuffle = shuffled(range(sans)) + shuffled(range(sans, total)) if apart else shuffled(range(total))
    return order, rows, shuffle


@pytest.fixture(scope="module")
def golden(tmp_path_factory, write_lengths):
    return write_lengths(tmp_path_factory.mktemp("megatron") / "golden", [5, 3, 7, 4], masked=True)


def test_the_golden_index(golden):
    samples = MegatronSamples(golden, sequence_length=4, seed=1234, num_samples=11)
    assert samples.document_index.tolist() == GOLDEN_DOCUMENTS
    assert samples.shuffle_index.tolist() == GOLDEN_SHUFFLE
    assert samples.sample_index.tolist() == GOLDEN_SAMPLES
    assert (samples.document_index.dtype, samples.sample_index.dtype) == (np.int32, np.int32)
    assert samples.shuffle_index.dtype == np.uint32
    assert (samples.num_samples, samples.samples_per_epoch, samples.tokens_per_epoch) == (14, 4, 19)


corpora = st.lists(st.one_of(st.integers(0, 1), st.integers(0, 30)), min_size=1, max_size=30).filter(any)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    corpora,
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.one_of(st.none(), st.floats(0, 5)),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9),
)
def test_the_index_is_that_of_the_rules(lengths, sequence_length, seed, epochs, extra, drop_last, block):
    num_samples = None if epochs is None else int(epochs * sum(lengths) / sequence_length)
    expected = slow_index(lengths, sequence_length, seed, num_samples, int(extra), drop_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalite.data.order.megatron._BLOCK", block)
        index = build_index(
            np.array(lengths, np.int32),
            sequence_length=sequence_length,
            seed=seed,
            num_samples=num_samples,
            first=100,
            extra_token=extra,
            drop_last=drop_last,
        )
    assert (index["document_index"] - 100).tolist() == expected[0]
    assert index["sample_index"].tolist() == expected[1]
    assert index["shuffle_index"].tolist() == expected[2]


@pytest.mark.parametrize(("num_samples", "apart"), [(179, True), (180, False)])
def test_a_last_epoch_is_shuffled_apart_below_80_percent(num_samples, apart):
    """An epoch has 100 samples, two have 200; of the second 79 or 80 are asked for."""
    lengths = [1] * 401
    index = build_index(np.array(lengths, np.int32), sequence_length=4, seed=3, num_samples=num_samples)
    assert index["shuffle_index"].tolist() == slow_index(lengths, 4, 3, num_samples, 1, True)[2]
    assert (index["shuffle_index"][:100].max() == 99) == apart
    assert (len(set(index["document_index"][:401])) == 401) == apart


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_samples_are_cut_from_the_documents_in_a_row(tmp_path, write_lengths, extra, drop_last, seed):
    lengths = np.random.default_rng(seed).choice([0, 1, 2, 5, 9, 30], 50).tolist()
    indexed = write_lengths(tmp_path / "corpus", lengths, masked=seed % 2 == 0)
    samples = MegatronSamples(
        indexed,
        sequence_length=7,
        seed=seed,
        num_samples=90,
        documents=range(3, 47),
        extra_token=extra,
        drop_last=drop_last,
    )
    row = np.concatenate([indexed.document_tokens(document) for document in samples.document_index])
    assert samples.num_samples is not None
    assert samples.num_samples >= 90
    indices = np.arange(samples.num_samples)
    tokens, mask = samples.tokens(indices), samples.loss_mask(indices)
    assert tokens.dtype == np.int64
    partial = 0
    for index, sample in enumerate(samples.shuffle_index.tolist()):
        expected = row[sample * 7 : sample * 7 + 7 + extra].tolist()
        partial += len(expected) < 7 + extra
        assert tokens[index].tolist() == expected + [0] * (8 - len(expected))
        counts = [token % 3 == 0 if indexed.has_loss_mask else True for token in expected]
        if mask is not None:
            assert mask[index].tolist() == counts + [0] * (8 - len(expected))
        spelled = []
        for piece in samples.pieces(index):
            assert piece.length
            spelled += indexed.document_tokens(piece.document)[piece.offset : piece.offset + piece.length].tolist()
        assert spelled == expected
    assert (mask is None) == (extra and drop_last and not indexed.has_loss_mask)
    assert partial == (not drop_last and (len(row) - extra) % 7 > 0)
    assert samples.tokens(np.empty(0, np.int64)).shape == (0, 8)


def test_samples_may_span_many_documents_and_a_document_many_samples(tmp_path, write_lengths):
    indexed = write_lengths(tmp_path / "corpus", [1] * 40 + [0] * 40 + [100])
    samples = MegatronSamples(indexed, sequence_length=20, seed=1, num_samples=None)
    assert max(len(samples.pieces(index)) for index in range(6)) > 10
    assert sorted(set(samples.tokens(np.arange(6)).reshape(-1).tolist())) == sorted(
        np.concatenate([indexed.document_tokens(document) for document in samples.document_index])[:121].tolist()
    )


def test_samples_beyond_the_ends_are_refused(golden):
    samples = MegatronSamples(golden, sequence_length=4, seed=1234, num_samples=11)
    for index in (-1, 14):
        for read in (samples.tokens, samples.loss_mask):
            with pytest.raises(IndexError, match=r"are not all in 0\.\.13"):
                read(np.array([0, index]))
        with pytest.raises(IndexError, match=r"are not all in 0\.\.13"):
            samples.pieces(index)


@pytest.mark.slow
def test_a_kept_tail_is_counted_in_whole_numbers():
    """Megatron-core's float32 knows no 2^24 + 1, and makes 142,857,136 samples of 999,999,937 tokens at 7."""
    tokens = (1 << 24) + 2
    index = build_index(
        np.array([tokens], np.int32), sequence_length=1, seed=1, num_samples=None, extra_token=True, drop_last=False
    )
    assert len(index["shuffle_index"]) == tokens - 1
    assert int(np.ceil(np.float32(tokens - 1))) != tokens - 1


def test_what_holds_no_sample_is_refused(golden):
    with pytest.raises(
        UserError, match=r"documents 1\.\.2 hold 3 tokens; one sample of data\.sequence_length=4 takes 5"
    ):
        MegatronSamples(golden, sequence_length=4, seed=1, num_samples=3, documents=range(1, 2))
    with pytest.raises(UserError, match=r"documents 2\.\.2 hold 0 tokens"):
        MegatronSamples(golden, sequence_length=4, seed=1, num_samples=3, documents=range(2, 2))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_does_not_take_is_refused(golden, seed):
    with pytest.raises(UserError, match=rf"run\.seed={seed}: Megatron's order takes 0 to 4294967295"):
        MegatronSamples(golden, sequence_length=4, seed=seed, num_samples=3)


def test_the_index_is_kept_for_what_it_was_made_from(tmp_path, write_lengths):
    cache = tmp_path / "cache"
    same = {"sequence_length": 4, "seed": 1, "num_samples": 9, "documents": None}
    datasets = [write_lengths(tmp_path / name, lengths) for name, lengths in (("a", [5, 3, 7, 4]), ("b", [5, 4, 6, 4]))]

    def caches(indexed, **changed):
        MegatronSamples(indexed, cache_dir=cache, **(same | changed))
        return len([path for path in cache.iterdir() if path.is_dir()])

    assert caches(datasets[0]) == 1
    assert caches(datasets[0]) == 1
    assert caches(write_lengths(tmp_path / "elsewhere", [5, 3, 7, 4])) == 1
    assert caches(datasets[1]) == 2
    changes = ({"sequence_length": 3}, {"seed": 2}, {"num_samples": 8}, {"documents": range(0, 3)})
    for number, changed in enumerate((*changes, {"extra_token": False}, {"drop_last": False}), 3):
        assert caches(datasets[0], **changed) == number
    alike = write_lengths(tmp_path / "alike", [5] * 9)
    assert caches(alike, documents=range(0, 4)) == 9
    assert caches(alike, documents=range(1, 5)) == 10


def test_a_kept_index_gives_the_same_samples(golden, tmp_path):
    rows = [
        MegatronSamples(golden, sequence_length=4, seed=5, num_samples=40, cache_dir=cache).tokens(np.arange(40))
        for cache in (None, tmp_path, tmp_path)
    ]
    assert (rows[0] == rows[1]).all()
    assert (rows[0] == rows[2]).all()
