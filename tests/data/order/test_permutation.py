import math
import random
from collections import Counter

import numpy as np
import pytest

from megalite.data.order.permutation import LARGEST, KeyedPermutation

GOLDEN_ORDER = [4, 5, 8, 6, 7, 0, 3, 1, 9, 2]
GOLDEN_IMAGE = 324_612_049_589


@pytest.mark.slow
def test_the_permutation_is_one_for_every_size_to_10_000():
    for n in range(1, 10_001):
        images = KeyedPermutation(n, b"key %d" % n).array(np.arange(n))
        assert images.dtype == np.int64
        assert (np.bincount(images, minlength=n) == 1).all()


def test_the_inverse_undoes_every_size():
    for n in [*range(1, 300), 1023, 1024, 1025, 65_536, 99_991]:
        permutation = KeyedPermutation(n, b"key %d" % n)
        assert (permutation.inverse_array(permutation.array(np.arange(n))) == np.arange(n)).all()
        assert (permutation.array(permutation.inverse_array(np.arange(n))) == np.arange(n)).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [10**12, 2**61 - 1, LARGEST])
def test_a_million_probes_of_a_large_size_are_one_to_one(n):
    permutation = KeyedPermutation(n, b"key")
    probes = np.unique(np.append(np.random.default_rng(0).integers(0, n, 1_000_000), [0, n - 1]))
    images = permutation.array(probes)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(probes)
    assert (permutation.inverse_array(images) == probes).all()


def test_one_place_is_as_many():
    permutation = KeyedPermutation(12_345, b"key")
    images = permutation.array(np.arange(100))
    assert [permutation(index) for index in range(100)] == images.tolist()
    assert [permutation.inverse(image) for image in images.tolist()] == list(range(100))
    assert permutation.array(np.empty(0, np.int64)).tolist() == []


def test_few_places_go_round_twice(monkeypatch):
    walked = []
    step = KeyedPermutation._forward
    monkeypatch.setattr(KeyedPermutation, "_forward", lambda self, at: (walked.append(len(at)), step(self, at))[1])
    for n in (1000, 1025, 10**6 + 1, 2**40 + 1):
        walked.clear()
        KeyedPermutation(n, b"key").array(np.arange(1000))
        assert walked[0] == 1000
        assert sum(walked[1:]) <= 100


def test_the_permutation_knows_its_bounds():
    permutation = KeyedPermutation(7, b"")
    for index in (-1, 7):
        with pytest.raises(IndexError, match=r"are not all in 0\.\.6"):
            permutation(index)
        with pytest.raises(IndexError, match=r"are not all in 0\.\.6"):
            permutation.inverse(index)
    for n in (0, LARGEST + 1):
        with pytest.raises(ValueError, match="a permutation has 1 to"):
            KeyedPermutation(n, b"")


@pytest.mark.slow
def test_every_permutation_of_four_is_about_as_frequent():
    keys = 6000
    counts = Counter(tuple(KeyedPermutation(4, b"%d" % key).array(np.arange(4)).tolist()) for key in range(keys))
    expected = keys / math.factorial(4)
    assert len(counts) == 24
    assert all(0.6 * expected < count < 1.6 * expected for count in counts.values())


@pytest.mark.parametrize("n", [1000, 65_536, 999_983, 2**61])
def test_neighbours_are_scattered(n):
    permutation = KeyedPermutation(n, b"key")
    images = permutation.array(np.arange(min(n, 10_000))) / n
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(images, np.arange(len(images)))[0, 1]) < 0.1
    shares = np.histogram(images, bins=10, range=(0, 1))[0] / len(images)
    assert shares.min() > 0.08
    assert shares.max() < 0.12


def test_every_place_is_met_about_as_often():
    n, keys = 30, 3000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), KeyedPermutation(n, b"%d" % key).array(np.arange(n))] += 1
    chi_squared = ((counts - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_order_is_the_same_on_every_machine():
    permutation = KeyedPermutation(10, b"megalite sample order, seed 1234, epoch 0")
    assert permutation.array(np.arange(10)).tolist() == GOLDEN_ORDER
    assert KeyedPermutation(10**12, b"key")(123_456_789_012) == GOLDEN_IMAGE


def test_the_arithmetic_is_that_of_whole_numbers():
    """The network written out in Python's integers, which know no 64 bits."""
    draw = random.Random(0)
    for _ in range(50):
        n = draw.randint(1, 10 ** draw.randint(1, 18))
        permutation = KeyedPermutation(n, draw.randbytes(8))
        rows = math.isqrt(n - 1) + 1
        index = draw.randrange(n)
        image = index
        while True:
            size, other_size = rows, -(-n // rows)
            half, other = divmod(image, other_size)
            for key in permutation._round_keys.tolist():
                x = other ^ key
                x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
                x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
                half, other = other, (half + ((x >> 32) * size >> 32)) % size
                size, other_size = other_size, size
            image = half * other_size + other
            if image < n:
                break
        assert permutation(index) == image
