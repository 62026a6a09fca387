"""Text in UTF-16 or UTF-32 is told from UTF-8 by its first bytes: all text that is read has to be UTF-8."""

import codecs
from pathlib import Path
from shlex import quote

from megalite.errors import UserError

HEAD_BYTES = 1 << 12
"""How much of a file's beginning is looked at."""

_MARKS = (
    # UTF-32's mark begins with the mark of UTF-16.
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)


def read_utf8(path: Path) -> str:
    """Return a file's text without a byte order mark, its line ends as ``\\n``.

    Raises UserError as `require_utf8` does; OSError and UnicodeDecodeError as they come.
    """
    data = path.read_bytes()
    require_utf8(path, data)
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def require_utf8(path: Path, data: bytes) -> None:
    """Raise UserError where a file that begins with `data` is in UTF-16 or UTF-32, with the command that converts it.

    A single byte that is no UTF-8, or zero, is nothing that this finds.
    """
    encoding = _wide_encoding(data[:HEAD_BYTES])
    if encoding is not None:
        raise UserError(
            f"{path}: is in {encoding.upper()}, and UTF-8 is read; convert it: iconv -f {encoding} -t utf-8 "
            f"{quote(str(path))} > {quote(f'utf8-{path.name}')}"
        )


def _wide_encoding(head: bytes) -> str | None:
    """Return iconv's name of the encoding by its mark, or by the zeros that letters of ASCII have in every second byte;
    None for UTF-8 and whatever else."""
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if marked is not None:
        return marked
    pairs = len(head) // 2
    zeros_first, zeros_second = head[::2].count(0), head[1::2].count(0)
    if zeros_second > pairs / 2 and zeros_first < pairs / 16:
        return "utf-16le"
    if zeros_first > pairs / 2 and zeros_second < pairs / 16:
        return "utf-16be"
    return None
