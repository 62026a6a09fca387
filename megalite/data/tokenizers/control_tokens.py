"""Control tokens: what ends a document, and how text is read when none of it may become one.

A vocabulary marks some of its pieces as control tokens: ends of documents, turns of a chat, places to fill in. Where
the text comes from strangers, their names must stay text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from megalite.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
BEGINNING_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|bos|>")
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")

_BRACKETED = re.compile("\u2581?(?:<.+>|\\[.+\\])", re.DOTALL)


def looks_like_control(name: str) -> bool:
    """Tell whether a piece is spelled as control tokens are, in brackets: vocabularies do not always mark them."""
    return _BRACKETED.fullmatch(name) is not None


def end_of_document(control_tokens: Mapping[str, int]) -> int | None:
    """Return the id of the first of the usual marks that a vocabulary has."""
    return next((control_tokens[name] for name in END_OF_DOCUMENT_NAMES if name in control_tokens), None)


class TextRefused(UserError):
    """A text that a tokenizer cannot encode."""


@contextmanager
def refusals_named() -> Iterator[None]:
    """Turn what a tokenizer's library raises over a text into a `TextRefused` that gives the library's reason."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError
        raise _refused(error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it has no class that can be imported
            raise
        raise _refused(error) from error


def _refused(error: BaseException) -> TextRefused:
    reason = " ".join(str(error).split()) or type(error).__name__
    return TextRefused(f"the tokenizer refuses this text: {reason}")


class PlainText:
    """Encodes text none of which may become a control token, by breaking their names apart where all else fails."""

    def __init__(self, encode: Callable[[str], list[int]], control_tokens: Mapping[str, int]) -> None:
        self._encode = encode
        self._ids = frozenset(control_tokens.values())
        self._names = _any_of(name for name in control_tokens if len(name) > 1)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids = self._encode(text)
        if self._names is None or self._ids.isdisjoint(ids):
            return ids
        cuts = [0, *(match.start() + 1 for match in self._names.finditer(text)), len(text)]
        return [token for start, stop in zip(cuts, cuts[1:], strict=False) for token in self._encode(text[start:stop])]


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
