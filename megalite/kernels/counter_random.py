"""Counter-based random numbers: each number is a function of a key and a counter, in integer arithmetic alone.

`philox` is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its four words cost
120 operations, so it derives keys of 64 bits, one for each token, and `random_below` expands a key to a sequence by a
hash of two operations a bit: the multiply-xorshift hash ``triple32`` (C. Wellons, hash-prospector), whose input and
inner state are mixed with the key. Neither has a state, branches or tables, so both are the same on every device, and
torch.compile fuses them with their consumers.
"""

from typing import TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
"""The largest word of 32 bits."""
CPU_CHUNK_ELEMENTS = 1 << 16
"""On a CPU the words of a chunk stay in a core's cache."""
ACCELERATOR_CHUNK_ELEMENTS = 1 << 26

Word = TypeVar("Word", int, Tensor)


def philox(counter: tuple[Word, Word, Word, Word], key: int) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: return four random words of a counter of four words and a key of 64 bits.

    Words are numbers from 0 to 2^32 - 1: Python's integers, or int64 tensors of one shape.
    """
    a, b, c, d = counter
    low, high = key & WORD, key >> 32 & WORD
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # an int64 product wraps, and keeps the 64 bits that are read
        a, b, c, d = (right >> 32 & WORD) ^ b ^ low, right & WORD, (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a, b, c, d


def random_below(keys: Tensor, first: int, count: int, probability: float) -> Tensor:
    """Return ``[..., count]``, bool: for each key whether the numbers at indices from `first` on are below a bound.

    `keys` ``[2, ...]``, int32, holds two words for each sequence. Each element is True with `probability`, rounded to
    32 bits. Memory beyond the result is bounded.
    """
    # Numbers are compared as signed words, from -2^31 on.
    bound = min(round(probability * 2**32), WORD) - 2**31
    index = torch.arange(first, first + count, device=keys.device, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return _words(keys, index) < bound
    flat = keys.flatten(1)
    below = torch.empty(flat.shape[1], count, dtype=torch.bool, device=keys.device)
    budget = CPU_CHUNK_ELEMENTS if keys.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    rows = max(1, budget // max(1, count))
    for start in range(0, flat.shape[1], rows):
        chunk = slice(start, start + rows)
        torch.lt(_words(flat[:, chunk], index), bound, out=below[chunk])
    return below.view(*keys.shape[1:], count)


def _words(keys: Tensor, index: Tensor) -> Tensor:
    """Hash indices ``[count]`` with keys ``[2, ...]`` to random words ``[..., count]``, int32."""
    first, second = keys.unsqueeze(-1)
    words = first ^ index
    words ^= (words >> 17).bitwise_and_(0x7FFF)  # the mask makes an arithmetic shift a logical one
    words *= 0xED5AD4BB - (1 << 32)
    words ^= second
    words ^= (words >> 11).bitwise_and_(0x1FFFFF)
    words *= 0xAC4C1B51 - (1 << 32)
    words ^= (words >> 15).bitwise_and_(0x1FFFF)
    words *= 0x31848BAB
    return words  # without the last xorshift of triple32, which changes low bits alone
