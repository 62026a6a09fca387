"""Text out of tokens as they come: never half a character, and nothing of what stops it."""

from collections.abc import Callable, Sequence

BROKEN_CHARACTER = "\ufffd"


class TextStream:
    """The text of tokens that follow others, piece by piece.

    A token's text depends on those before it, by a space at the least, so each piece is the difference of two decoded
    texts. Tokens that end within a character wait for its rest.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        self._decode = decode
        self._ids, self._read = list(before), len(before)

    def feed(self, token: int) -> str:
        """Return the text that a token completes; often that of the token, sometimes none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(BROKEN_CHARACTER) else self._take(text)

    def finish(self) -> str:
        """Return what still waits, half a character as U+FFFD."""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        piece = text[len(self._decode(self._ids[: self._read])) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return piece


class StopTexts:
    """Passes text on up to the first of the stop texts, wherever tokens end in it; `found` is set there."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Return the text that belongs to no stop text, whatever comes."""
        self._held += piece
        starts = [start for text in self._texts if (start := self._held.find(text)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """Return what was held back, since nothing comes after it."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], "" if self.found else self._held[length:]
        return text

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = max(map(len, self._texts), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(text.startswith(self._held[-n:]) for text in self._texts)), 0)
