"""Megatron's token index, byte for byte: ``PREFIX.bin``, ``PREFIX.idx`` and our ``PREFIX.json``.

``.bin`` is the token ids in a row. ``.idx``, little-endian and unpadded, with N sequences in D - 1 documents::

    0   "MMIDIDX" 00 00      9   u64 version = 1      17  u8 dtype code      18  u64 N      26  u64 D
    34  int32[N] tokens of each sequence, int64[N] byte offset of each in .bin,
        int64[D] first sequence of each document and, last, N;  int8[N] modes, where multimodal

``.json`` says what the tokens were made of; Megatron neither writes nor needs it.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Code 6 and 7 are floating point, in an order on which Megatron and GPT-NeoX disagree: no token ids."""

OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
BLOCK = 1 << 20


def dtype_for(vocab_size: int) -> np.dtype:
    """Return how wide a token is stored: u16 under 65,500 entries, else i32."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


@dataclass(frozen=True, slots=True)
class DatasetSidecar:
    """What ``PREFIX.json`` says about a dataset."""

    vocab_size: int
    tokenizer_sha256: str
    num_tokens: int
    num_documents: int
    max_token_id: int
    token_counts_entropy: float
    """Of the unigram distribution of the tokens, in nats a token: what a model without context can reach at best."""
    eod_id: int | None = None
    """The token put behind every document."""
    eod_token: str | None = None
    """Its name in the tokenizer's vocabulary; not known of datasets that were made before it was kept."""
    bos_id: int | None = None
    """The token put before every document."""
    bos_token: str | None = None
    """Its name in the tokenizer's vocabulary."""
    skipped: int = 0
    """Documents left out because they could not be read."""
    empty: int = 0
    """Documents left out because they hold no token."""
    short: int = 0
    """Documents left out because they are shorter than was asked for."""
    duplicates: int = 0
    """Documents left out because an earlier one is the same."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Keys of conversations that were passed over, and in how many conversations."""
    document_shuffle: int | None = None
    """The seed of the order in which the documents stand, where it is not that of the input."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digests of the files beside, in hexadecimal; the writer fills them in, `verify` compares."""


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return ``PREFIX.suffix``; a prefix may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)
