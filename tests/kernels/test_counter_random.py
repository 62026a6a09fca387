"""Random numbers from counters: published vectors, and the same numbers however they are cut."""

import pytest
import torch

from megalite.kernels import counter_random
from megalite.kernels.counter_random import philox, random_below

# Random123's known answers for philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_its_authors_answers(counter: str, key: str, expected: str) -> None:
    (a, b, c, d), (low, high) = words(counter), words(key)
    assert list(philox((a, b, c, d), low | high << 32)) == words(expected)
    tensors = (torch.tensor([5, a]), torch.tensor([6, b]), torch.tensor([7, c]), torch.tensor([8, d]))
    assert [int(word[1]) for word in philox(tensors, low | high << 32)] == words(expected)


def keys(count: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (2, count), dtype=torch.int32, generator=torch.Generator().manual_seed(3))


def test_the_hash_gives_the_words_that_it_always_gave() -> None:
    """By the hash in Python's unsigned integers; a change would change every run's masks."""
    mask = 2**32 - 1

    def hashed(first: int, second: int, index: int) -> int:
        x = index ^ first
        x = ((x ^ x >> 17) * 0xED5AD4BB & mask) ^ second
        x = (x ^ x >> 11) * 0xAC4C1B51 & mask
        return (x ^ x >> 15) * 0x31848BAB & mask

    drawn = counter_random._words(keys(50), torch.arange(7, 47, dtype=torch.int32)) & mask
    assert drawn.dtype == torch.int32
    first, second = (keys(50).long() & mask).tolist()
    expected = [[hashed(*pair, index) for index in range(7, 47)] for pair in zip(first, second, strict=True)]
    assert (drawn.long() & mask).tolist() == expected
    known = counter_random._words(torch.tensor([[1], [2]], dtype=torch.int32), torch.arange(3, dtype=torch.int32))
    assert (known.long() & mask).tolist() == [[3599972849, 3636909190, 2318280547]]


def test_any_cut_of_indices_and_rows_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_below(keys(60).view(2, 3, 20), 0, 100, 0.3)
    assert whole.shape == (3, 20, 100)
    assert torch.equal(random_below(keys(60)[:, 20:40], 30, 50, 0.3), whole[1, :, 30:80])
    for chunk in (1, 250, 10**6):
        monkeypatch.setattr(counter_random, "CPU_CHUNK_ELEMENTS", chunk)
        assert torch.equal(random_below(keys(60).view(2, 3, 20), 0, 100, 0.3), whole)


@pytest.mark.parametrize("probability", [0.0, 2.0**-33, 0.5, 1 - 2.0**-33, 1.0])
def test_probabilities_at_the_ends(probability: float) -> None:
    share = float(random_below(keys(64), 0, 4096, probability).double().mean())
    assert abs(share - probability) < 0.005
