"""A JSON array in place of lines: cut into its elements, each of which becomes a line with every byte in its place.

Brackets and commas between the elements become spaces and line ends, and line ends within an element spaces, so that
what reads lines reads elements, and tells the bytes of the file. Only a bounded part of the array is held.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import orjson

from megalite.errors import UserError

_BLOCK_BYTES = 1 << 20
_BLANK = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SIGNS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{},\n]', re.DOTALL)
_OPEN, _CLOSE = b"[{", b"]}"


def holds_array(stream: BufferedIOBase, longest: int) -> bool:
    """Tell whether a file is one JSON array, and not lines of which the first is one; `longest` bounds a line."""
    line = stream.readline(longest + 1).removeprefix(_BYTE_ORDER_MARK)
    while line and not line.strip(_BLANK):
        line = stream.readline(longest + 1)
    if not line.lstrip(_BLANK).startswith(b"["):
        return False
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return True
    while data := stream.read(_BLOCK_BYTES):
        if data.strip(_BLANK):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements in a row as lines: their bytes, where in the file the first begins, and how many come before."""

    data: bytes
    start: int
    before: int


def elements(stream: BufferedIOBase, path: Path, size: int, longest: int) -> Iterator[Elements]:
    """Yield the elements of an array in stretches of about `size` bytes; `longest` is what one element may have.

    Raises UserError, naming the byte, where brackets do not fit together, and for an array that is cut short.
    """
    scan = _Scan(path, longest)
    while data := stream.read(_BLOCK_BYTES):
        scan.feed(data)
        if scan.complete >= size:
            yield scan.take()
    scan.require_end()
    if scan.complete:
        yield scan.take()


class _Scan:
    """Goes through an array block by block."""

    def __init__(self, path: Path, longest: int) -> None:
        self._path, self._longest = path, longest
        self._held = bytearray()
        self._start = self._before = self._count = 0
        self._scanned = self._element = 0
        self._depth = 0
        self._ended = False
        self.complete = 0
        """Bytes held of elements that are complete."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the file."""
        self._held += data
        held = self._held
        if self._start == 0 and held.startswith(_BYTE_ORDER_MARK):
            held[: len(_BYTE_ORDER_MARK)] = b"   "
        end, base = len(held), self._scanned
        for match in _SIGNS.finditer(bytes(held[base:])):
            at, sign = base + match.start(), match[0]
            if sign[0] == ord('"'):
                if len(sign) == 1 or not _is_closed(sign):
                    end = at  # it goes on in the next block
                    break
                if b"\n" in sign:
                    # No JSON: it must not become a space, which would be.
                    held[at : at + len(sign)] = sign.replace(b"\n", b"\x01")
            else:
                self._take_sign(at, sign)
        self._scanned = end
        if self._ended and (rest := bytes(held[self.complete :]).strip(_BLANK)):
            raise self._broken(self._start + held.index(rest, self.complete), "ends, and more comes behind it")
        if end - self._element > self._longest or len(held) - self._element > self._longest + _BLOCK_BYTES:
            raise self._broken(
                self._start + self._element, f"has an element of more than {self._longest:,} bytes from here on"
            )

    def take(self) -> Elements:
        """Return the elements that are complete, and hold them no longer."""
        taken = Elements(bytes(self._held[: self.complete]), self._start, self._before)
        del self._held[: self.complete]
        self._start += self.complete
        self._scanned -= self.complete
        self._element -= self.complete
        self._before, self.complete = self._count, 0
        return taken

    def require_end(self) -> None:
        """Raise UserError where the array has not ended."""
        if not self._ended:
            raise self._broken(
                self._start + len(self._held), f"is cut short in element {self._count + 1}: the file ends here"
            )

    def _take_sign(self, at: int, sign: bytes) -> None:
        held = self._held
        if sign == b"\n":
            held[at] = ord(" ")
        elif self._ended:
            return
        elif sign in _OPEN:
            self._depth += 1
            if self._depth == 1:
                held[at] = ord(" ")
                self._element = at
        elif sign in _CLOSE:
            self._depth -= 1
            if self._depth == 0:
                self._close(at, sign)
        elif self._depth == 1:
            self._end_element(at)

    def _close(self, at: int, sign: bytes) -> None:
        if sign != b"]":
            raise self._broken(self._start + at, f"is closed by {sign.decode()!r}")
        if self._count or bytes(self._held[self._element : at]).strip(_BLANK):
            self._end_element(at)
        self._ended = True
        if not self._count:  # an empty array
            self._held[at] = ord(" ")
            self.complete = at + 1

    def _end_element(self, at: int) -> None:
        if not bytes(self._held[self._element : at]).strip(_BLANK):
            raise self._broken(self._start + at, "has an element that is empty before this")
        self._held[at] = ord("\n")
        self._count += 1
        self._element = self.complete = at + 1

    def _broken(self, byte: int, what: str) -> UserError:
        return UserError(
            f"{self._path}: byte {byte}: the JSON array {what}; give a whole array, or one JSON object a line"
        )


def _is_closed(text: bytes) -> bool:
    """Tell whether a text in quotes ends with one that no backslash takes away."""
    if not text.endswith(b'"'):
        return False
    before = text[:-1]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 0
