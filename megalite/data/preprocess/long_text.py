"""Documents of any size in bounded memory: one long text, encoded in parts.

A part ends behind a line end that stands between a visible sign and a letter, or before a space of the kind. There
tokenizers that split text by GPT-2's expression or its heirs split it anyway, and the cache of words for sentencepiece
too, so the ids are those of the whole text. A tokenizer whose pieces reach across lines may differ by a token or so at
a cut.
"""

import re
from collections.abc import Callable, Iterable, Iterator

LONGEST_WHOLE = 1 << 20
"""Characters of a document that is encoded in one piece; longer ones come in parts of half as many."""
PART = LONGEST_WHOLE // 2

_AFTER_LINE_END = re.compile(r"(?<=\S\n)(?=[A-Za-z])")
_BEFORE_SPACE = re.compile(r"(?<=\S)(?= [A-Za-z])")


class LongText:
    """A text that is read as often as it is needed, block by block."""

    def __init__(self, blocks: Callable[[], Iterable[str]]) -> None:
        self.blocks = blocks

    def parts(self) -> Iterator[str]:
        """Yield the text in parts of about `PART` characters."""
        held = ""
        for block in self.blocks():
            held += block
            while len(held) >= LONGEST_WHOLE:
                end = _cut(held)
                yield held[:end]
                held = held[end:]
        if held:
            yield held


def _cut(text: str) -> int:
    for place in (_AFTER_LINE_END, _BEFORE_SPACE):
        if found := place.search(text, PART, LONGEST_WHOLE):
            return found.start()
    return PART
