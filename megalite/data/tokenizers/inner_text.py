"""Tokens of text that stands within a text: where tokenizers put a space before all text and take it off again."""

from collections.abc import Callable, Sequence
from typing import Protocol

from megalite.data.tokenizers.control_tokens import TextRefused


class TextCodec(Protocol):
    """What `InnerText` needs of a tokenizer."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text in which names of control tokens are text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...


class InnerText:
    """Encodes and decodes what stands within a text; names of control tokens stay text, or `encode` decides.

    Where the tokens of two texts do not join to those of one, both are done behind a mark, which is then taken off.
    """

    _MARKS = ("\x01", "\n", ".")
    _BROKEN_CHARACTER = "\ufffd"

    def __init__(self, tokenizer: TextCodec, encode: Callable[[str], list[int]] | None = None) -> None:
        self._tokenizer = tokenizer
        self._encode = encode or tokenizer.encode_plain
        self._mark, self._mark_ids = "", []
        if tokenizer.decode(self._known("a") * 2) == "aa":
            return
        for mark in self._MARKS:
            ids = self._known(mark)
            if ids and tokenizer.decode(ids) == mark:
                self._mark, self._mark_ids = mark, ids
                return

    def _known(self, text: str) -> list[int]:
        """Return the ids of a text, none where the tokenizer has none for it."""
        try:
            return self._encode(text)
        except TextRefused:
            return []

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of ids, its first space included; None where they begin or end within a character."""
        text = self._tokenizer.decode(self._mark_ids + ids)
        if self._BROKEN_CHARACTER in text or not text.startswith(self._mark):
            return None
        return text.removeprefix(self._mark)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text with no space put before it, unless its first letters would join with the mark."""
        ids, taken_off = self._encode(self._mark + text), len(self._mark_ids)
        return ids[taken_off:] if ids[:taken_off] == self._mark_ids else self._encode(text)
