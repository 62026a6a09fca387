"""Tiktoken's encodings from a local file of ranks, a line each: base64 of the token's bytes, a space, its rank.

A rank file says neither how text is split nor what its control tokens are: both go by the encoding's name, which is
the name of the file, ``cl100k_base.tiktoken``. Nothing is fetched.
"""

import binascii
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megalite.data.tokenizers.control_tokens import END_OF_DOCUMENT, refusals_named
from megalite.errors import UserError, nearest

SUFFIX = ".tiktoken"

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K_UPPER, _O200K_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a rank file does not say."""

    split: str
    """The regular expression whose matches are encoded one by one."""
    ranks: int
    """Number of ranks in the file."""
    control_tokens: dict[str, int]


ENCODINGS = {
    "gpt2": Encoding(_GPT2, 50_256, {END_OF_DOCUMENT: 50_256}),
    "r50k_base": Encoding(_GPT2, 50_256, {END_OF_DOCUMENT: 50_256}),
    "p50k_base": Encoding(_GPT2, 50_280, {END_OF_DOCUMENT: 50_256}),
    "p50k_edit": Encoding(
        _GPT2, 50_280, {END_OF_DOCUMENT: 50_256, **{name: 50_281 + i for i, name in enumerate(_FILL_IN)}}
    ),
    "cl100k_base": Encoding(
        _CL100K,
        100_256,
        {
            END_OF_DOCUMENT: 100_257,
            **{name: 100_258 + i for i, name in enumerate(_FILL_IN)},
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": Encoding(_O200K, 199_998, {END_OF_DOCUMENT: 199_999, "<|endofprompt|>": 200_018}),
}


class TiktokenTokenizer:
    """An encoding of tiktoken; in every method the names of its control tokens stay text.

    Raises UserError for an encoding that is not known by `name`, and without the package; ValueError for a file that
    does not hold its ranks.
    """

    def __init__(self, data: bytes, name: str) -> None:
        if name not in ENCODINGS:
            raise UserError(
                f"{name}{SUFFIX}: no encoding of this name is known{nearest(name, ENCODINGS)}; a file of ranks has "
                "the name of its encoding, which says how text is split"
            )
        encoding = ENCODINGS[name]
        ranks = _ranks(data)
        if len(ranks) != encoding.ranks:
            raise ValueError(f"{len(ranks):,} ranks, {name} has {encoding.ranks:,}")
        self._encoding = _tiktoken().Encoding(
            name, pat_str=encoding.split, mergeable_ranks=ranks, special_tokens=encoding.control_tokens
        )
        # The package's own encode_to_numpy looks for control tokens first, which takes as long again.
        self._encode = self._encoding._core_bpe.encode_to_tiktoken_buffer
        self.control_tokens = encoding.control_tokens
        self.vocab_size: int = self._encoding.n_vocab
        self.eod_id: int | None = encoding.control_tokens[END_OF_DOCUMENT]
        self.bos_id = self.leading_id = self.unknown_id = None
        self.notes: Sequence[str] = ()
        self.digest = hashlib.sha256(data).hexdigest()

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece or control token by its exact name."""
        if name in self.control_tokens:
            return self.control_tokens[name]
        try:
            return self._encoding.encode_single_token(name)
        except KeyError:
            return None

    def token_name(self, token: int) -> str | None:
        """Return the name of a control token, or the text of another, by its id."""
        for name, control in self.control_tokens.items():
            if control == token:
                return name
        try:
            return self._encoding.decode_single_token_bytes(token).decode(errors="replace")
        except KeyError:
            return None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        with refusals_named():
            return self._encoding.encode_ordinary(text)

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens stay text."""
        return self.encode(text)

    def message_encoder(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """Return an encoder of messages, which is `encode`: all tokens that stand for no text are special."""
        return self.encode

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens]."""
        none: set[str] = set()
        with refusals_named():
            return [np.frombuffer(self._encode(text, none), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens have none."""
        control = self.control_tokens.values()
        return self._encoding.decode([token for token in ids if token not in control])


def _tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            f"{SUFFIX}: encodings of tiktoken need its package, which is not here; install it with "
            "`pip install 'megalite[tiktoken]'`"
        ) from error
    return tiktoken


def _ranks(data: bytes) -> dict[bytes, int]:
    words = data.split()
    decode = partial(binascii.a2b_base64, strict_mode=True)
    try:
        ranks = dict(zip(map(decode, words[::2]), map(int, words[1::2]), strict=True))
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"a line is no base64 and rank: {error}") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"no rank for byte {missing[0]}")
    return ranks
