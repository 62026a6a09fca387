"""The protocol of a tokenizer: text to token ids and back.

In a document text is text: sentencepiece and tiktoken encode what looks like a control token letter by letter. A
Hugging Face tokenizer does as its file says, which commonly reads such strings as the tokens they name; its
`encode_plain` does not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the rest of megalite knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document, if the vocabulary has one."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if the vocabulary has one."""
        ...

    @property
    def leading_id(self) -> int | None:
        """The token that the tokenizer's file puts before every text by itself; `encode` never does."""
        ...

    @property
    def unknown_id(self) -> int | None:
        """The token that stands for what the vocabulary cannot spell, if it has one."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What should be known of the tokenizer's file."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's file, in hexadecimal."""
        ...

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The ids of the tokens that stand for no text, by name."""
        ...

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece or control token by its exact name, or None where the vocabulary has none such."""
        ...

    def token_name(self, token: int) -> str | None:
        """Return the name of a piece or control token by its id, or None where the vocabulary has none such."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens stay text, whatever `encode` does."""
        ...

    def message_encoder(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """Return an encoder of messages, which are text by strangers.

        No special token, no end of a document and none of `names` comes of them. The other tokens that a vocabulary
        adds to its pieces, such as ``<think>``, are read, as transformers reads them.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        ...

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens], the fast way for a corpus."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...
