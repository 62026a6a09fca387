"""Samples of a GPT's training text: sample i is a function of (seed, i), found without an index.

The tokens of the chosen documents are one stream. An epoch cuts it into stretches of `sequence_length` tokens, each
read with the token after it, so that neighbours share one token and every token but the first is a target once. The
order of the stretches is a keyed permutation of its own for every epoch, computed when it is asked for.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError

_MASK = (1 << 64) - 1
_ROUNDS = 6


class KeyedPermutation:
    """A permutation of 0..n-1 chosen by a key, evaluated at any place on its own.

    A Feistel network on the pairs of [0, a) x [0, b) with a*b just above n, whose rounds add to one half, modulo its
    size, a hash of the other; what falls outside 0..n-1 goes round again, which keeps it one to one (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Not for secrets: the hash is fast, not strong.
    """

    def __init__(self, n: int, key: bytes) -> None:
        if n < 1:
            raise ValueError(f"a permutation has at least one element, not {n}")
        self.n = n
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS).digest()
        self._round_keys = struct.unpack(f"<{_ROUNDS}Q", digest)

    def __call__(self, index: int) -> int:
        """Return where the permutation sends `index`; raise IndexError outside ``0 <= index < n``."""
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is not in 0..{self.n - 1}")
        image = self._feistel(index)
        while image >= self.n:
            image = self._feistel(image)
        return image

    def _feistel(self, index: int) -> int:
        size, other_size = self._rows, self._columns
        half, other = divmod(index, other_size)
        for key in self._round_keys:
            half, other = other, (half + _mix(other ^ key)) % size
            size, other_size = other_size, size
        return half * other_size + other


def _mix(x: int) -> int:
    """Spread every bit over 64 (the finalizer of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


class GPTDataset:
    """Samples of int64[sequence_length + 1] tokens without end, epoch after epoch, in the order of `seed`.

    `documents` is the range of documents to take, by default all. Raises UserError where they hold less than one
    sample.
    """

    def __init__(
        self, indexed: IndexedDataset, *, sequence_length: int, seed: int, documents: range | None = None
    ) -> None:
        chosen = range(indexed.num_documents) if documents is None else documents
        bounds = indexed.document_bounds()
        self._indexed = indexed
        self._first_token = int(bounds[chosen.start])
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokens_per_epoch = int(bounds[chosen.stop]) - self._first_token
        self.samples_per_epoch = max(self.tokens_per_epoch - 1, 0) // sequence_length
        if not self.samples_per_epoch:
            raise UserError(
                f"{indexed.prefix}: documents {chosen.start}..{chosen.stop} hold {self.tokens_per_epoch} tokens; one "
                f"sample of data.sequence_length={sequence_length} takes {sequence_length + 1}; give more text, a "
                "larger share in data.split, or a shorter sequence"
            )

    def sample(self, index: int) -> np.ndarray:
        """Return sample `index`, any from 0 on, as int64[sequence_length + 1]."""
        epoch, place = divmod(index, self.samples_per_epoch)
        stretch = _order(self.samples_per_epoch, self.seed, epoch)(place)
        start = self._first_token + stretch * self.sequence_length
        return self._indexed.tokens(start, self.sequence_length + 1).astype(np.int64)


@lru_cache(maxsize=16)
def _order(samples: int, seed: int, epoch: int) -> KeyedPermutation:
    return KeyedPermutation(samples, f"megalite sample order, seed {seed}, epoch {epoch}".encode())


def split_documents(num_documents: int, fractions: Sequence[float]) -> list[range]:
    """Split documents into neighbouring ranges by shares, in any unit; bounds are Megatron's ``int(round(f * N))``.

    >>> split_documents(10, (0.9, 0.1))
    [range(0, 9), range(9, 10)]
    """
    total = sum(fractions)
    if total <= 0 or min(fractions) < 0:
        raise ValueError(f"shares must be 0 or more and not all 0, not {tuple(fractions)}")
    ends = accumulate(fraction / total for fraction in fractions)
    bounds = [0, *(int(round(end * num_documents)) for end in ends)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
