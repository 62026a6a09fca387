"""An order of any length, computed where it is asked for and never stored."""

import hashlib
import math
from collections.abc import Callable

import numpy as np

LARGEST = 1 << 62

_ROUNDS = 6
_SPREAD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27))
_HALF = np.uint64(32)


class KeyedPermutation:
    """A permutation of 0..n-1 chosen by a key, evaluated at any places on their own; n from 1 to 2^62.

    A Feistel network on the pairs of [0, a) x [0, b) with a*b just above n, whose rounds add to one half, modulo its
    size, a hash of the other; what falls outside 0..n-1 goes round again, which keeps it one to one (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Fewer than one place in sqrt(n) goes round twice, and no
    half exceeds 2^31, so that no step leaves 64 bits. Not for secrets: the hash is fast, not strong.
    """

    def __init__(self, n: int, key: bytes) -> None:
        if not 1 <= n <= LARGEST:
            raise ValueError(f"a permutation has 1 to {LARGEST} elements, not {n}")
        self.n = n
        rows = math.isqrt(n - 1) + 1
        self._sizes = (np.uint64(rows), np.uint64(-(-n // rows)))
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, index: int) -> int:
        """Return where the permutation sends `index`; raise IndexError outside ``0 <= index < n``."""
        return int(self.array(np.array([index]))[0])

    def inverse(self, image: int) -> int:
        """Return what the permutation sends to `image`; raise IndexError outside ``0 <= image < n``."""
        return int(self.inverse_array(np.array([image]))[0])

    def array(self, indices: np.ndarray) -> np.ndarray:
        """Return where the permutation sends each of `indices`, int64[m] to int64[m]; raise IndexError as above."""
        return self._walk(indices, self._forward)

    def inverse_array(self, images: np.ndarray) -> np.ndarray:
        """Return what the permutation sends to each of `images`, int64[m] to int64[m]; raise IndexError as above."""
        return self._walk(images, self._backward)

    def _walk(self, indices: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n:
            raise IndexError(f"{indices.min()}..{indices.max()} are not all in 0..{self.n - 1}")
        images = step(indices.astype(np.uint64))
        outside = np.flatnonzero(images >= self.n)
        while len(outside):
            images[outside] = step(images[outside])
            outside = outside[images[outside] >= self.n]
        return images.astype(np.int64)

    def _forward(self, places: np.ndarray) -> np.ndarray:
        size, other_size = self._sizes
        half, other = np.divmod(places, other_size)
        for key in self._round_keys:
            moved = half + _hash(other, key, size)
            # Below zero unsigned numbers wrap to the top, so the smaller of the two is the remainder.
            half, other = other, np.minimum(moved, moved - size)
            size, other_size = other_size, size
        return half * other_size + other

    def _backward(self, places: np.ndarray) -> np.ndarray:
        # An even number of rounds leaves the halves with the sizes that they began with.
        size, other_size = self._sizes
        half, other = np.divmod(places, other_size)
        for key in self._round_keys[::-1]:
            moved = other - _hash(half, key, other_size)
            half, other = np.minimum(moved, moved + other_size), half
            size, other_size = other_size, size
        return half * other_size + other


def _hash(values: np.ndarray, key: np.uint64, size: np.uint64) -> np.ndarray:
    """Spread every bit over 64 (the finalizer of SplitMix64) and scale the upper 32 to 0..size-1."""
    x = values ^ key
    for shift, factor in zip(_SHIFTS, _SPREAD, strict=True):
        x ^= x >> shift
        x *= factor
    x >>= _HALF
    x *= size
    x >>= _HALF
    return x
