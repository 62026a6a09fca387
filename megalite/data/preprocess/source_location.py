"""Where in a file a document stands, and how that is told."""

from dataclasses import dataclass
from pathlib import Path

from megalite.data.preprocess.inputs import Segment, reading

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document stands: its line or row, counted from 1 in its segment, and the first byte, from 0."""

    number: int
    byte: int | None


@dataclass(frozen=True, slots=True)
class Malformed:
    """What is wrong with a document."""

    place: Place
    reason: str


class Locator:
    """Finds the line of a file that a document of a segment stands in, each part of a file being read once at most."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._byte = self._lines = 0
        self._last = b"\n"

    def describe(self, segment: Segment, malformed: Malformed) -> str:
        """Return ``file:line: byte n: reason``, or ``file: row n: reason``, or that of an element of an array."""
        place = malformed.place
        if place.byte is None:
            return f"{segment.path}: row {segment.rows_before + place.number}: {malformed.reason}"
        if segment.of_array:
            number = segment.rows_before + place.number
            return f"{segment.path}: element {number}: byte {place.byte}: {malformed.reason}"
        known = segment.rows_before if segment.data is not None else self._lines_before(segment)
        return f"{segment.path}:{place.number + known}: byte {place.byte}: {malformed.reason}"

    def _lines_before(self, segment: Segment) -> int:
        if segment.path != self._path or segment.start < self._byte:
            self._path, self._byte, self._lines, self._last = segment.path, 0, 0, b"\n"
        with reading(segment.path), segment.path.open("rb") as file:
            file.seek(self._byte)
            while data := file.read(min(_BLOCK_BYTES, segment.start - self._byte)):
                self._lines += data.count(b"\n")
                self._byte += len(data)
                self._last = data[-1:]
        # A line that began before the segment ends in it, and counts before its lines.
        return self._lines + (self._last != b"\n")
