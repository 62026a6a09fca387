import math
import random
from collections import Counter

import numpy as np
import pytest

from megalite.data.indexed import IndexedDataset
from megalite.data.samples import GPTDataset, KeyedPermutation, split_documents
from megalite.data.writer import IndexedDatasetWriter
from megalite.errors import UserError

GOLDEN_ORDER = [7, 1, 9, 8, 3, 6, 2, 5, 4, 0]
GOLDEN_IMAGE = 360_868_538_781


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A stream of 0..999 in documents of 1 to 39 tokens."""
    prefix = tmp_path_factory.mktemp("samples") / "corpus"
    lengths = random.Random(0)
    with IndexedDatasetWriter(prefix, "u2") as writer:
        start = 0
        while start < 1000:
            stop = min(start + lengths.randint(1, 39), 1000)
            writer.add_document(range(start, stop))
            start = stop
        writer.finalize()
    return IndexedDataset(prefix)


def test_the_permutation_is_one_for_every_size_to_2000():
    for n in range(1, 2001):
        permutation = KeyedPermutation(n, b"key %d" % n)
        assert sorted(map(permutation, range(n))) == list(range(n))


def test_the_permutation_is_one_to_one_on_large_sizes():
    draw = random.Random(0)
    for _ in range(100):
        n = draw.randint(1, 10 ** draw.randint(4, 12))
        permutation = KeyedPermutation(n, draw.randbytes(8))
        probes = {draw.randrange(n) for _ in range(300)} | {0, n - 1}
        images = {permutation(probe) for probe in probes}
        assert len(images) == len(probes)
        assert all(0 <= image < n for image in images)


def test_the_permutation_knows_its_bounds():
    for index in (-1, 7):
        with pytest.raises(IndexError):
            KeyedPermutation(7, b"")(index)
    with pytest.raises(ValueError, match="at least one element"):
        KeyedPermutation(0, b"")


def test_every_permutation_of_four_is_about_as_frequent():
    keys = 6000
    counts = Counter(tuple(map(KeyedPermutation(4, b"%d" % key), range(4))) for key in range(keys))
    expected = keys / math.factorial(4)
    assert len(counts) == 24
    assert all(0.6 * expected < count < 1.6 * expected for count in counts.values())


@pytest.mark.parametrize("n", [1000, 65_536, 999_983])
def test_neighbours_are_scattered(n):
    permutation = KeyedPermutation(n, b"key")
    images = np.array([permutation(index) for index in range(min(n, 10_000))]) / n
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(images, np.arange(len(images)))[0, 1]) < 0.1
    shares = np.histogram(images, bins=10, range=(0, 1))[0] / len(images)
    assert shares.min() > 0.08
    assert shares.max() < 0.12


def test_the_order_is_the_same_on_every_machine():
    permutation = KeyedPermutation(10, b"megalite sample order, seed 1234, epoch 0")
    assert list(map(permutation, range(10))) == GOLDEN_ORDER
    assert KeyedPermutation(10**12, b"key")(123_456_789_012) == GOLDEN_IMAGE


@pytest.mark.parametrize("sequence_length", [1, 7, 16, 111, 999])
def test_an_epoch_takes_every_stretch_once(indexed, sequence_length):
    dataset = GPTDataset(indexed, sequence_length=sequence_length, seed=1)
    assert dataset.tokens_per_epoch == 1000
    assert dataset.samples_per_epoch == 999 // sequence_length
    for epoch in range(2):
        first = epoch * dataset.samples_per_epoch
        samples = [dataset.sample(first + place) for place in range(dataset.samples_per_epoch)]
        assert all(sample.dtype == np.int64 for sample in samples)
        starts = sorted(int(sample[0]) for sample in samples)
        assert starts == list(range(0, dataset.samples_per_epoch * sequence_length, sequence_length))
        for sample in samples:
            assert sample.tolist() == list(range(sample[0], sample[0] + sequence_length + 1))


def test_the_order_hangs_on_seed_and_epoch_alone(indexed):
    def order(seed, epoch):
        dataset = GPTDataset(indexed, sequence_length=10, seed=seed)
        return [int(dataset.sample(epoch * 99 + place)[0]) for place in range(99)]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_any_sample_is_found_at_once(indexed):
    dataset = GPTDataset(indexed, sequence_length=10, seed=1)
    assert len(dataset.sample(10**15)) == 11


def test_only_the_chosen_documents_are_read(indexed):
    bounds = indexed.document_bounds()
    dataset = GPTDataset(indexed, sequence_length=10, seed=1, documents=range(5, 20))
    assert dataset.tokens_per_epoch == bounds[20] - bounds[5]
    tokens = {int(token) for place in range(dataset.samples_per_epoch) for token in dataset.sample(place)}
    assert min(tokens) == bounds[5]
    assert max(tokens) < bounds[20]


@pytest.mark.parametrize("documents", [range(0, 1), range(3, 3)])
def test_documents_that_hold_no_sample_are_refused(indexed, documents):
    with pytest.raises(UserError, match=r"documents \d\.\.\d hold \d+ tokens; one sample of data\.sequence_length=64"):
        GPTDataset(indexed, sequence_length=64, seed=1, documents=documents)


def test_one_sample_needs_one_token_more_than_its_length(indexed):
    assert GPTDataset(indexed, sequence_length=999, seed=1).samples_per_epoch == 1
    with pytest.raises(UserError, match="takes 1001"):
        GPTDataset(indexed, sequence_length=1000, seed=1)


@pytest.mark.parametrize(
    ("documents", "fractions", "stops"),
    [
        (10_000, (969, 30, 1), (9690, 9990, 10_000)),
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


@pytest.mark.parametrize("fractions", [(0, 0), (1.5, -0.5)])
def test_shares_that_make_no_split_are_refused(fractions):
    with pytest.raises(ValueError, match="shares must be 0 or more"):
        split_documents(10, fractions)
